"""DART: retain the vision tokens that duplicate a few pivots least (arXiv 2502.11494, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import INSTRUCTION, Pruner, Selection, TokenView
from tpcompress.pruners.compat.dart import OFFICIAL, check_reduction, official_count, official_order
from tpcompress.pruners.greedy import products
from tpcompress.pruners.topk import hash_uniform, keep_topk, on, take

PIVOTS = ("key_norm", "value_norm", "attention", "hidden_norm", "random")
SPACES = ("", "normed", "hidden")
WORDS = ("instruction", "prompt")


class DART(Pruner):
    """keep = vision pivots + from the rest, pivot by pivot, the tokens with the lowest cos(h_pivot, h_v).

    Pivots are the tokens of largest (`largest: false`: smallest) criterion, the ablation of the paper's table 8:
        key_norm      ||k||_1 of the keys of the layer before (needs keys, so `layer` >= 1)
        value_norm    ||v||_1 of its values (needs values)
        attention     mean over heads of A[last prompt token, v]; for a text token its attention to all vision tokens,
                      which is our reading: the paper does not define a text pivot's attention (needs attention)
        hidden_norm   ||h||_2 of the hidden states (any layer)
        random        a hash of `seed` and the token's place
    `norm_power` 1 or 2 replaces the power of a norm; 0 leaves the one above. h is the hidden state after the language
    model's last norm (`space: normed`, as in the official code) or as it is (`space: hidden`, the default with
    hidden_norm, which may stand before the language model). Text pivots steer the choice and are not counted; they come
    from the text tokens after the image (`words: instruction`; from all text tokens where there are none) or from all
    text tokens (`words: prompt`). Vision pivots come first, from the best criterion down, then text pivots. Every pivot
    takes an equal share of what is left of the budget, the first ones one more where it does not divide.

    needs  normed or nothing; keys, values or attention by `pivot`; text with text_pivots > 0.
    gives  keep_BV, scores_BV = 1 on vision pivots, else -max_p cos(h_p, h_v).
    Paper: 4 + 4 pivots, keys, layer 2.     Cost: P x V cosines and one sort of V per pivot.
    Unlike the official code: exact counts, batched, pivots visited in the order above, fewer text tokens than text
    pivots allowed (the others share their part), each image pruned (there the first one), padding and answers never
    read. `compat: llava` or `compat: qwen` selects the tokens of the official code; see
    `tpcompress/pruners/compat/dart.py`. Embedding-level DART of TensorRT-Edge-LLM, before the language model: `pivot:
    hidden_norm, norm_power: 1, words: prompt`; its quota is ceil(V (1 - reduction)) per image, a plan's is rounded.
    """

    name = "dart"
    paper = "2502.11494"
    group = "duplication and diversity"
    paper_plan = """
    # DART (arXiv 2502.11494): 64 of 576 tokens from layer 2 on, 4 vision and 4 text pivots of largest ||k||_1. With
    # {type: dart, compat: llava} it is 68 of 576, as the official code retains.
    stages:
      - {pruner: dart, layer: 2, keep_tokens: 64}  # K = 2
    """
    more_plans = {
        "dart_input": """
        # DART before the language model, as TensorRT-Edge-LLM runs it: 75 % of each image's tokens at its default
        # reduction. Pivots are the 4 embeddings of largest L1 norm of each image and of the prompt.
        stages:
          - pruner: {type: dart, pivot: hidden_norm, norm_power: 1, words: prompt}
            layer: 0
            keep_ratio: 0.75  # reduction ratio 0.25
        """,
    }
    test_arguments = (
        {"pivot": "hidden_norm"},
        {"text_pivots": 0},
        {"vision_pivots": 0, "text_pivots": 2},
        {"vision_pivots": 9, "text_pivots": 3},
        {"pivot": "value_norm", "largest": False},
        {"pivot": "attention"},
        {"pivot": "attention", "text_pivots": 0, "space": "hidden"},
        {"pivot": "random", "seed": 3},
        {"pivot": "hidden_norm", "norm_power": 1, "words": "prompt"},
    )
    inexact_arguments = (
        {"compat": "llava"},
        {"compat": "qwen", "reduction": 0.667},
        {"compat": "llava", "text_pivots": 0, "vision_pivots": 3},
    )

    def __init__(
        self,
        vision_pivots: int = 4,
        text_pivots: int = 4,
        pivot: str = "key_norm",
        largest: bool = True,
        norm_power: int = 0,
        space: str = "",
        words: str = "instruction",
        seed: int = 0,
        compat: str = "",
        reduction: float = 0.0,
    ) -> None:
        super().__init__()
        if vision_pivots < 0 or text_pivots < 0 or vision_pivots + text_pivots == 0:
            raise ValueError(f"dart needs at least one pivot, got vision {vision_pivots} and text {text_pivots}.")
        choices = {
            "pivot criterion": (pivot, PIVOTS),
            "space": (space, SPACES),
            "words": (words, WORDS),
            "compat": (compat, ("", *OFFICIAL)),
            "norm_power": (norm_power, (0, 1, 2)),
        }
        for what, (given, known) in choices.items():
            if given not in known:
                raise ValueError(f"dart has no {what} {given!r}; choose one of {', '.join(map(repr, known))}.")
        check_reduction(compat, reduction)
        self.vision_pivots, self.text_pivots, self.pivot, self.largest = vision_pivots, text_pivots, pivot, largest
        self.norm_power, self.space, self.words, self.seed = norm_power, space, words, seed
        self.compat, self.reduction = compat, reduction
        self.exact_count = not compat

    @property
    def needs(self) -> frozenset[str]:
        views = {"key_norm": {"keys"}, "value_norm": {"values"}, "attention": {"attention"}}.get(self.pivot, set())
        if self.pivot == "attention" and self.text_pivots:
            views = views | {"attention_prompt"}
        if self._normed:
            views = views | {"normed"}
        return frozenset(views | {"text"} if self.text_pivots or self.compat else views)

    @property
    def _normed(self) -> bool:
        return self.space == "normed" or (not self.space and self.pivot != "hidden_norm")

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        x_BVD = tokens.normed_BVD if self._normed else tokens.vision_BVD
        assert x_BVD is not None
        x_BVD, sign = x_BVD.float(), 1 if self.largest else -1
        count_B = on(num_keep_B, x_BVD)
        if self.compat:
            count_B = official_count(
                tokens.valid_BV.sum(1), count_B, self.vision_pivots, self.text_pivots, self.compat, self.reduction
            )
        pivot_BP, _, chosen_BP = pick_pivots(sign * self._criterion(tokens), tokens.valid_BV, self.vision_pivots)
        chosen_BP = chosen_BP & (torch.arange(chosen_BP.shape[1], device=x_BVD.device) < count_B[:, None])
        taken_BV = torch.zeros_like(tokens.valid_BV).scatter(1, pivot_BP, chosen_BP)
        feature_BPD, place_BP = take(x_BVD, pivot_BP), pivot_BP
        if self.text_pivots:
            text_BSD, word_BS = tokens.text_normed_BSD if self._normed else tokens.text_BSD, self._words(tokens)
            assert text_BSD is not None
            index_BP, _, found_BP = pick_pivots(sign * self._text_criterion(tokens, word_BS), word_BS, self.text_pivots)
            feature_BPD = torch.cat([feature_BPD, take(text_BSD.float(), index_BP)], 1)
            chosen_BP = torch.cat([chosen_BP, found_BP], 1)
            after_BS = tokens.valid_BV.sum(1, keepdim=True) + word_BS.cumsum(1) - 1
            place_BP = torch.cat([place_BP, after_BS.gather(1, index_BP)], 1)
        if self.compat:
            order_BP = official_order(tokens, place_BP)
            feature_BPD, chosen_BP = take(feature_BPD, order_BP), chosen_BP.gather(1, order_BP)
        unit_BVD = F.normalize(x_BVD, dim=-1)
        similar_BPV = torch.stack([products(unit_BVD, f_BD) for f_BD in F.normalize(feature_BPD, dim=-1).unbind(1)], 1)
        keep_BV = least_similar(similar_BPV, chosen_BP, taken_BV, tokens.valid_BV, count_B)
        scores_BV = -similar_BPV.masked_fill(~chosen_BP[..., None], -torch.inf).amax(1)
        return Selection(keep_BV, scores_BV.nan_to_num(neginf=-1.0, posinf=1.0).masked_fill(taken_BV, 1.0))

    def _words(self, tokens: TokenView) -> Tensor:
        """bool (B, S): the text tokens that may be pivots."""
        assert tokens.text_role_BS is not None and tokens.text_valid_BS is not None
        if self.words == "prompt":
            return tokens.text_role_BS > 0
        return tokens.text_role_BS == INSTRUCTION if self.compat else tokens.text_valid_BS

    def _criterion(self, tokens: TokenView) -> Tensor:
        """What vision pivots are ranked by (B, V)."""
        if self.pivot == "attention":
            assert tokens.attention_BHV is not None
            return tokens.attention_BHV.float().mean(1)
        if self.pivot == "random":
            return hash_uniform(self.seed, tokens.valid_BV.cumsum(1))
        return self._norm({"key_norm": tokens.keys_BVD, "value_norm": tokens.values_BVD}, tokens.vision_BVD)

    def _text_criterion(self, tokens: TokenView, word_BS: Tensor) -> Tensor:
        """What text pivots are ranked by (B, S)."""
        if self.pivot == "attention":
            assert tokens.attention_prompt_BHQV is not None and tokens.prompt_column_BQ is not None
            weight_BQV = tokens.attention_prompt_BHQV.float().mean(1)
            # In fp64: the order of the sum, which padding changes, must not break a near tie another way.
            weight_BQ = weight_BQV.masked_fill(~tokens.valid_BV[:, None], 0.0).sum(-1, dtype=torch.float64).float()
            return torch.zeros_like(word_BS, dtype=torch.float).scatter(1, tokens.prompt_column_BQ, weight_BQ)
        if self.pivot == "random":
            # The n-th text token, not the n-th column: padding of the batch moves columns.
            return hash_uniform(self.seed + 1, word_BS.cumsum(1))
        return self._norm({"key_norm": tokens.text_keys_BSD, "value_norm": tokens.text_values_BSD}, tokens.text_BSD)

    def _norm(self, views: dict[str, Tensor | None], hidden: Tensor | None) -> Tensor:
        view = views.get(self.pivot, hidden)
        assert view is not None
        return view.float().norm(self.norm_power or (2 if self.pivot == "hidden_norm" else 1), -1)


def pick_pivots(norm_BV: Tensor, valid_BV: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` valid tokens of largest norm, from the largest down: (index (B, P), picked (B, V), exists (B, P))."""
    num = min(num, norm_BV.shape[1])
    masked_BV = norm_BV.masked_fill(~valid_BV, -torch.inf)
    index_BP = masked_BV.argsort(dim=1, descending=True, stable=True)[:, :num]
    exists_BP = valid_BV.gather(1, index_BP)
    return index_BP, torch.zeros_like(valid_BV).scatter(1, index_BP, exists_BP), exists_BP


def least_similar(similar_BPV: Tensor, pivot_BP: Tensor, taken_BV: Tensor, valid_BV: Tensor, count_B: Tensor) -> Tensor:
    """Fill the budget: each pivot in turn takes its share of the free tokens least similar to it.

    Args:
        similar_BPV: cosine of pivot p and vision token v (B, P, V).
        pivot_BP: False where the pivot does not exist (it gets no share).
        taken_BV: vision tokens kept already.
        valid_BV: bool (B, V).
        count_B: the exact budget, on the same device.

    Returns:
        bool (B, V) with `count` True per row.
    """
    left_B = count_B - taken_BV.sum(1)
    pivots_B = pivot_BP.sum(1).clamp(min=1)
    place_BP = pivot_BP.cumsum(1) - 1
    share_BP = (left_B // pivots_B)[:, None] + (place_BP < (left_B % pivots_B)[:, None])
    for p in range(similar_BPV.shape[1]):
        free_BV = valid_BV & ~taken_BV
        share_B = share_BP[:, p].masked_fill(~pivot_BP[:, p], 0)
        taken_BV = taken_BV | keep_topk(-similar_BPV[:, p], free_BV, share_B)
    # Without any pivot (no vision pivot asked for, no text) the first tokens fill the budget.
    return taken_BV | keep_topk(
        torch.zeros_like(valid_BV, dtype=torch.float), valid_BV & ~taken_BV, count_B - taken_BV.sum(1)
    )
