"""A small network that gives each vision token one score, from itself, its neighbours, its image and the question.

B rows, V vision tokens, D hidden size, W width, S sequence length, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.topk import novelty


class Scorer(nn.Module):
    """LayerNorm -> width; own token + 3 x 3 neighbours + image mean + novelty [+ the question] -> one score.

    Without novelty a rule that scores each token for itself cannot keep one of several equal tokens. The score starts
    as the novelty itself, which is a fair training-free rule, and what the network adds to it starts at zero.
    """

    def __init__(self, hidden_size: int, width: int, with_text: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.reduce = nn.Linear(hidden_size, width)
        self.local = nn.Linear(width, width)
        self.neighbours = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.image = nn.Linear(width, width, bias=False)
        self.novelty = nn.Linear(2, width, bias=False)
        self.score = nn.Linear(width, 1)
        self.start = nn.Linear(2, 1, bias=False)
        self.question = QuestionAttention(hidden_size, width) if with_text else None
        with torch.no_grad():
            self.score.weight.zero_()
            self.start.weight.copy_(torch.tensor([[1.0, 0.0]]))

    def forward(self, tokens: TokenView) -> Tensor:
        x_BVD = self.norm(tokens.vision_BVD.to(self.norm.weight.dtype))
        new_BV2 = novelty(x_BVD, tokens.valid_BV).to(x_BVD.dtype)
        h_BVW = self.reduce(x_BVD) + self.novelty(new_BV2)
        if self.question is not None:
            h_BVW = h_BVW + self.question(x_BVD, tokens)
        h_BVW = F.gelu(h_BVW).masked_fill(~tokens.valid_BV[..., None], 0.0)
        mean_B1W = h_BVW.sum(1, keepdim=True) / tokens.valid_BV.sum(1)[:, None, None].clamp(min=1)
        mixed_BVW = self.local(h_BVW) + self._neighbourhood(h_BVW, tokens) + self.image(mean_B1W)
        return (self.score(F.gelu(mixed_BVW)) + self.start(new_BV2))[..., 0].float()

    def _neighbourhood(self, h_BVW: Tensor, tokens: TokenView) -> Tensor:
        """3 x 3 convolution over the canvas; positions without a token read as zero, so images may differ in shape."""
        B, _, W = h_BVW.shape
        rows, cols = tokens.canvas
        cell_BVW = (tokens.row_BV * cols + tokens.col_BV)[..., None].expand_as(h_BVW)
        canvas_BNW = h_BVW.new_zeros(B, rows * cols, W).scatter_add(1, cell_BVW, h_BVW)
        out_BWN = self.neighbours(canvas_BNW.mT.reshape(B, W, rows, cols)).flatten(2)
        return out_BWN.mT.gather(1, cell_BVW)


class QuestionAttention(nn.Module):
    """Each vision token attends to the prompt text; near-identity projections, so equal words match from the start."""

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
        text_BSD = self.norm(tokens.text_BSD.to(self.norm.weight.dtype))
        query_BHVd = self.query(x_BVD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_BHSd = self.key(text_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        logits_BHVS = query_BHVd @ key_BHSd.mT / query_BHVd.shape[-1] ** 0.5
        # A finite floor: a prompt without text gives uniform attention, not NaN.
        logits_BHVS = logits_BHVS.masked_fill(~tokens.text_valid_BS[:, None, None], -1e4)
        value_BHSw = self.value(text_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read_BVW = (logits_BHVS.softmax(-1) @ value_BHSw).transpose(1, 2).flatten(2)
        return read_BVW + self.match(logits_BHVS.amax(-1).transpose(1, 2))
