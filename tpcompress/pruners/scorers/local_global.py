"""Local and global: a token's own features, its neighbours, its image, its novelty and the question give its score.

B rows, V vision tokens, D hidden size, W width, S sequence length, H heads, N cells of the canvas.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.scorers.weighted import WeightedScorer
from tpcompress.pruners.topk import novelty


class LocalGlobal(WeightedScorer):
    """LayerNorm -> width; own token + 3 x 3 neighbours + image mean + novelty [+ the question] -> one score.

        h_v = gelu(W_r LN(x_v) + W_n new_v [+ question_v]),     new_v = (1 - max cos to earlier, to any other token)
        score_v = w . gelu(W_l h_v + conv3x3(h)_v + W_i mean_u h_u) + a . new_v

    Without novelty a rule that scores each token for itself cannot keep one of several equal tokens. The score starts
    as the novelty itself (a = (1, 0)), which is a fair training-free rule, and what the network adds to it starts at
    zero (w = 0), so a fresh scorer ties as `novelty` does: the earlier token is the better one.

    needs  nothing, or text.     Source: ours; the estimators it was chosen with are in the training notes.
    Cost: O(V D W + V W^2 + V^2 D); with the question O((V + S) D^2 + V S D) more.

    Args:
        width: W.
        question: let each token attend to the text tokens of the prompt. The scorer then does part of the visual search
            itself, and a wrong question breaks it; without it the scorer never sees a prompt.

    Raises:
        ValueError: the width is none.
    """

    name = "local_global"
    untrained_equivalent = "novelty"
    test_arguments = (
        {"question": True},
        {"width": 8},
    )

    def __init__(self, width: int = 64, question: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"local_global needs width >= 1, got {width}; 64 is the default.")
        self.width, self.with_question = width, question
        self.question: QuestionAttention | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text"} if self.with_question else ())

    def config(self) -> dict[str, Any]:
        return super().config() | {"question": self.with_question}  # the attribute of that name has the weights

    def make(self, hidden_size: int) -> None:
        width = self.width
        self.norm = nn.LayerNorm(hidden_size)
        self.reduce = nn.Linear(hidden_size, width)
        self.local = nn.Linear(width, width)
        self.neighbours = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.image = nn.Linear(width, width, bias=False)
        self.novelty = nn.Linear(2, width, bias=False)
        self.score = nn.Linear(width, 1)
        self.start = nn.Linear(2, 1, bias=False)
        self.question = QuestionAttention(hidden_size, width) if self.with_question else None
        with torch.no_grad():
            self.score.weight.zero_()
            self.start.weight.copy_(torch.tensor([[1.0, 0.0]]))

    def rate(self, tokens: TokenView) -> Scores:
        x_BVD = self.norm(tokens.vision_BVD.to(self.dtype))
        new_BV2 = novelty(x_BVD, tokens.valid_BV).to(self.dtype)
        h_BVW = self.reduce(x_BVD) + self.novelty(new_BV2)
        if self.question is not None:
            h_BVW = h_BVW + self.question(x_BVD, tokens)
        h_BVW = F.gelu(h_BVW).masked_fill(~tokens.valid_BV[..., None], 0.0)
        mean_B1W = h_BVW.sum(1, keepdim=True) / tokens.valid_BV.sum(1)[:, None, None].clamp(min=1)
        mixed_BVW = self.local(h_BVW) + self._neighbourhood(h_BVW, tokens) + self.image(mean_B1W)
        return Scores((self.score(F.gelu(mixed_BVW)) + self.start(new_BV2))[..., 0])

    def _neighbourhood(self, h_BVW: Tensor, tokens: TokenView) -> Tensor:
        """3 x 3 convolution over the canvas; positions without a token read as zero, so images may differ in shape."""
        B, _, W = h_BVW.shape
        rows, cols = tokens.canvas
        cell_BVW = (tokens.row_BV * cols + tokens.col_BV)[..., None].expand_as(h_BVW)
        canvas_BNW = h_BVW.new_zeros(B, rows * cols, W).scatter_add(1, cell_BVW, h_BVW)
        out_BWN = self.neighbours(canvas_BNW.mT.reshape(B, W, rows, cols)).flatten(2)
        return out_BWN.mT.gather(1, cell_BVW)


class QuestionAttention(nn.Module):
    """Each vision token attends to the prompt text; near-identity projections, so equal text tokens match from the
    start.

    A prompt without text tokens adds nothing.
    """

    def __init__(self, hidden_size: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = next(n for n in (heads, 2, 1) if hidden_size % n == 0 and width % n == 0)
        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, width, bias=False)
        self.match = nn.Linear(self.heads, width, bias=False)
        with torch.no_grad():
            for weight in (self.query.weight, self.key.weight):
                weight.mul_(0.1).add_(torch.eye(hidden_size))

    def forward(self, x_BVD: Tensor, tokens: TokenView) -> Tensor:
        assert tokens.text_BSD is not None and tokens.text_valid_BS is not None
        text_BSD = self.norm(tokens.text_BSD.to(x_BVD.dtype))
        query_BHVd = self.query(x_BVD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_BHSd = self.key(text_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        logits_BHVS = query_BHVd @ key_BHSd.mT / query_BHVd.shape[-1] ** 0.5
        logits_BHVS = logits_BHVS.masked_fill(~tokens.text_valid_BS[:, None, None], -1e4)
        value_BHSw = self.value(text_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read_BVW = (logits_BHVS.softmax(-1) @ value_BHSw).transpose(1, 2).flatten(2)
        read_BVW = read_BVW + self.match(logits_BHVS.amax(-1).transpose(1, 2))
        # Without a text token the weights are those of everything that may not be read, answers among it.
        return read_BVW.masked_fill(~tokens.text_valid_BS.any(1)[:, None, None], 0.0)
