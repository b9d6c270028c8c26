"""FastV: retain the vision tokens that the last prompt token attends to most (arXiv 2403.06764, section 4).

B rows, V vision tokens, H attention heads, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import head_mean, keep_topk

QUERIES = {
    "last_prompt": "attention",
    "all_prompt": "attention_prompt",
    "last_vision": "attention_last_vision",
}
"""The view of each `query_source`."""


class FastV(Pruner):
    """score(v) = mean over heads and queries of A[query, v] in the layer before the stage.

    The query is the last prompt token; `all_prompt` takes every text token of the prompt (text tokens before an image
    do not see it and lower all its scores alike), `last_vision` the row's last vision token: the control FastV_VIS,
    which no prompt steers (arXiv 2502.11501, section 5).

    needs  the view of `QUERIES[query_source]` (so `layer` >= 1).     gives  keep_BV, scores_BV.
    Paper: the last prompt token, K = 2 (`layer: 2`), half of the tokens. Cost: one row of attention, or one per text
        token.
    Unlike the official code: only these query rows are recomputed from the layer's own projections, so the model
    stays on sdpa or flash attention; batched; the query is the last *prompt* token, in training, too, where the
    official last token would be part of the answer; ranked once, where one official variant ranks anew at each
    decoded token. Of the official roundings of a ratio (round, int) the budget has the first.

    Args:
        query_source: "last_prompt", "all_prompt" or "last_vision".

    Raises:
        ValueError: there is no such source.
    """

    name = "fastv"
    paper = "2403.06764"
    group = "attention in the language model"
    paper_plan = """
    # FastV: after the second layer, half of the tokens, by the attention of the last prompt token (288 of
    # LLaVA-1.5's 576).
    stages:
      - {pruner: fastv, layer: 2, keep_ratio: 0.5}  # K = 2, R = 50 %
    """
    test_arguments = (
        {"query_source": "all_prompt"},
        {"query_source": "last_vision"},
    )

    def __init__(self, query_source: str = "last_prompt") -> None:
        super().__init__()
        if query_source not in QUERIES:
            raise ValueError(f"fastv has no query source '{query_source}'; choose one of {', '.join(QUERIES)}.")
        self.query_source = query_source

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({QUERIES[self.query_source]})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        if self.query_source == "all_prompt":
            assert tokens.attention_prompt_BHQV is not None and tokens.prompt_role_BQ is not None
            scores_BV = fastv_score(tokens.attention_prompt_BHQV, tokens.prompt_role_BQ > 0)
        else:
            last = self.query_source == "last_prompt"
            row_BHV = tokens.attention_BHV if last else tokens.attention_last_vision_BHV
            assert row_BHV is not None
            scores_BV = fastv_score(row_BHV[:, :, None])
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


def fastv_score(attention_BHQV: Tensor, query_BQ: Tensor | None = None) -> Tensor:
    """Mean attention over heads and queries, fp32 (B, V).

    Args:
        attention_BHQV: attention of each query to each vision token.
        query_BQ: False where a shorter row has no query; without it all count. A row without any scores 0.
    """
    if query_BQ is None:
        return head_mean(attention_BHQV.flatten(1, 2))
    sum_BV = attention_BHQV.masked_fill(~query_BQ[:, None, :, None], 0.0).sum((1, 2), dtype=torch.float64)
    count_B1 = query_BQ.sum(1, keepdim=True).clamp(min=1) * attention_BHQV.shape[1]
    return (sum_BV / count_B1).float()
