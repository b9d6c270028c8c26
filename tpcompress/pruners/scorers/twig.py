"""Twig: a few decoder blocks of its own read the sequence; what the last prompt token attends to is retained.

B rows, V vision tokens, S sequence length, D hidden size, H heads, d head size.
"""

from __future__ import annotations

from math import gcd, log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.scorers.weighted import WeightedScorer, spread


class Twig(WeightedScorer):
    """score_v = log mean over heads of A[last prompt token, v] in the last of `layers` causal blocks of its own.

    The blocks grow on the hidden states at the stage. They can be trained like a short model: in training
    `Scores.text_BSD` holds what they make of the whole sequence, for a label loss through the model's own last norm
    and head (fp32; its columns of vision tokens and padding mean nothing). Without that loss the gradient of the
    scores reaches all weights but the values and what follows them in the last block.

    A row's sequence is that of the model, with its own vision tokens, all text tokens and the answers; neither
    separators nor tokens of other images are in it. No answer changes a score: what comes later is not seen. The query
    is the last vision token if no text token follows it. The logarithm keeps the order of the attention, whose numbers
    are too small and too uneven for scores that are standardised.

    needs  text.     Source: TwigVLM (arXiv 2503.14075), section 3: 3 layers after layer 2.
    Cost: O(layers (S D^2 (4 + 3 expand) + S^2 D)).     Starts: random blocks whose outputs are small; equal tokens are
    ranked by `spread`.
    Unlike the official code: blocks do not start as later layers of the model and have no rotary embedding (what
    comes out of a decoder layer has places in it); the twig is a scorer only, no draft model for decoding.

    Args:
        layers: number of blocks.
        heads: attention heads; the largest common divisor with the hidden size counts.
        expand: width of the blocks' SwiGLU, in hidden sizes.

    Raises:
        ValueError: one of them is not at least 1.
    """

    name = "twig"
    test_arguments = (
        {"layers": 1, "heads": 2, "expand": 1},
        {"heads": 3},
    )

    def __init__(self, layers: int = 3, heads: int = 8, expand: int = 2) -> None:
        super().__init__()
        if min(layers, heads, expand) < 1:
            raise ValueError(f"twig needs layers, heads and expand >= 1, got {layers}, {heads}, {expand}.")
        self.layers, self.heads, self.expand = layers, heads, expand

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text"})

    def make(self, hidden_size: int) -> None:
        *below, self.last = (Block(hidden_size, self.heads, self.expand) for _ in range(self.layers))
        self.below = nn.ModuleList(below)

    def rate(self, tokens: TokenView) -> Scores:
        assert tokens.text_BSD is not None and tokens.column_BV is not None
        x_BSD = tokens.text_BSD.to(self.dtype)
        real_BS, query_B = sequence(tokens)
        column_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        seen_BSS = real_BS[:, None] & (column_S <= column_S[:, None]) | (column_S == column_S[:, None])
        x_BSD = put(tokens.vision_BVD.to(self.dtype), x_BSD, tokens).masked_fill(~real_BS[..., None], 0.0)
        for block in self.below:
            x_BSD = block(x_BSD, seen_BSS)
        scores_BV = self.last.log_attention(x_BSD, seen_BSS, query_B).gather(1, tokens.column_BV)
        scores_BV = scores_BV.masked_fill(~tokens.valid_BV, 0.0) + spread(tokens.valid_BV)
        return Scores(scores_BV, text_BSD=self.last(x_BSD, seen_BSS) if self.training else None)


class Block(nn.Module):
    """RMSNorm, causal attention, RMSNorm, SwiGLU: a decoder layer without places."""

    def __init__(self, hidden_size: int, heads: int, expand: int) -> None:
        super().__init__()
        self.heads = gcd(heads, hidden_size)
        self.norm, self.norm_mlp = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(hidden_size, expand * hidden_size, bias=False) for _ in range(2))
        self.down = nn.Linear(expand * hidden_size, hidden_size, bias=False)
        with torch.no_grad():
            for weight in (self.output.weight, self.down.weight):
                weight.mul_(0.1)

    def forward(self, x_BSD: Tensor, seen_BSS: Tensor) -> Tensor:
        """Hidden states after the block; `seen_BSS` is True where a query (second dimension) sees a key (third)."""
        h_BSD = self.norm(x_BSD)
        query_BHSd, key_BHSd, value_BHSd = (self._split(layer(h_BSD)) for layer in (self.query, self.key, self.value))
        read_BHSd = F.scaled_dot_product_attention(query_BHSd, key_BHSd, value_BHSd, seen_BSS[:, None])
        x_BSD = x_BSD + self.output(read_BHSd.transpose(1, 2).flatten(2))
        h_BSD = self.norm_mlp(x_BSD)
        return x_BSD + self.down(F.silu(self.gate(h_BSD)) * self.up(h_BSD))

    def log_attention(self, x_BSD: Tensor, seen_BSS: Tensor, query_B: Tensor) -> Tensor:
        """Logarithm (B, S) of the attention, mean over heads, that column `query_B` of each row pays to each other."""
        B, _, D = x_BSD.shape
        h_BSD, index_B11 = self.norm(x_BSD), query_B[:, None, None]
        query_BH1d = self._split(self.query(h_BSD.gather(1, index_B11.expand(B, 1, D))))
        logits_BHS = (query_BH1d @ self._split(self.key(h_BSD)).mT)[:, :, 0] * query_BH1d.shape[-1] ** -0.5
        seen_BS = seen_BSS.gather(1, index_B11.expand(B, 1, seen_BSS.shape[-1]))[:, 0]
        log_BHS = logits_BHS.masked_fill(~seen_BS[:, None], -1e4).log_softmax(-1)
        return log_BHS.logsumexp(1) - log(self.heads)

    def _split(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sequence(tokens: TokenView) -> tuple[Tensor, Tensor]:
    """The columns that belong to a row's sequence, bool (B, S), and the column of its query, int64 (B,)."""
    role_BS, valid_BV = tokens.text_role_BS, tokens.valid_BV
    assert role_BS is not None and tokens.column_BV is not None
    word_BS, column_S = role_BS > 0, torch.arange(role_BS.shape[1], device=role_BS.device)
    last_word_B = torch.where(word_BS, column_S, -1).amax(1)
    last_vision_B = tokens.column_BV.masked_fill(~valid_BV, -1).amax(1)
    # Behind the prompt come answers, and padding that only later padding sees.
    text_BS = word_BS | ((column_S > last_word_B[:, None]) & (last_word_B[:, None] >= 0))
    vision_BS = put(valid_BV, torch.zeros_like(text_BS), tokens)
    return text_BS | vision_BS, last_word_B.maximum(last_vision_B).clamp(min=0)


def put(value_BVx: Tensor, onto_BSx: Tensor, tokens: TokenView) -> Tensor:
    """The sequence with new values (B, S, ..) in the columns of the row's vision tokens."""
    S = onto_BSx.shape[1]
    # Padding holds the column of another token: it is written into one that is cut off.
    column_BV = tokens.column_BV.masked_fill(~tokens.valid_BV, S)  # type: ignore[union-attr]
    column_BVx = column_BV[(..., *[None] * (value_BVx.ndim - 2))].expand_as(value_BVx)
    longer_BSx = torch.cat([onto_BSx, onto_BSx[:, :1]], 1)
    return longer_BSx.scatter(1, column_BVx, value_BVx)[:, :S]
