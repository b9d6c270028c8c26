"""Twig: a few decoder blocks of its own read the sequence; what their last prompt word attends to is retained.

B rows, V vision tokens, S sequence length, N = V + S, D hidden size, H heads, d head size.
"""

from __future__ import annotations

from math import gcd, log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompress.pruners.base import BETWEEN, SYSTEM, TokenView
from tpcompress.pruners.parts import Scores
from tpcompress.pruners.scorers.weighted import WeightedScorer, spread


class Twig(WeightedScorer):
    """score_v = log mean over heads of A[last prompt word, v] in the last of `layers` causal blocks of its own.

    The blocks grow on the hidden states at the stage. They can be trained like a short model: in training
    `Scores.text_BSD` holds what they make of the whole sequence, for a label loss through the model's own last norm
    and head (fp32; its columns of vision tokens and padding mean nothing). Without that loss the gradient of the
    scores reaches all weights but the values and what follows them in the last block.

    A row's sequence is: words before its vision tokens, its vision tokens, all later words, answers. Neither
    separators nor tokens of other images are in it. No answer changes a score: what comes later is not seen. The query
    is the last valid vision token if no word follows one. The logarithm keeps the order of the attention, whose
    numbers are too small and too uneven for scores that are standardised.

    needs  text.     Source: TwigVLM (arXiv 2503.14075), section 3: 3 layers behind layer 2.
    Cost: O(layers (N D^2 (4 + 3 expand) + N^2 D)); vision tokens are in N twice, since no view says which columns of
    the sequence are theirs.     Starts: random blocks whose outputs are small; equal tokens are ranked by `spread`.
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
        assert tokens.text_BSD is not None
        V = tokens.valid_BV.shape[1]
        real_BN, order_BN, query_B = sequence(tokens)
        itself_NN = torch.eye(real_BN.shape[1], dtype=torch.bool, device=real_BN.device)
        seen_BNN = (real_BN[:, None] & (order_BN[:, None] <= order_BN[:, :, None])) | itself_NN
        x_BND = torch.cat([tokens.vision_BVD.to(self.dtype), tokens.text_BSD.to(self.dtype)], 1)
        x_BND = x_BND.masked_fill(~real_BN[..., None], 0.0)
        for block in self.below:
            x_BND = block(x_BND, seen_BNN)
        scores_BV = self.last.log_attention(x_BND, seen_BNN, query_B)[:, :V]
        scores_BV = scores_BV.masked_fill(~tokens.valid_BV, 0.0) + spread(tokens.valid_BV)
        return Scores(scores_BV, text_BSD=self.last(x_BND, seen_BNN)[:, V:] if self.training else None)


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

    def forward(self, x_BND: Tensor, seen_BNN: Tensor) -> Tensor:
        """Hidden states behind the block; `seen_BNN` says which columns (last) each column sees."""
        h_BND = self.norm(x_BND)
        query_BHNd, key_BHNd, value_BHNd = (self._split(layer(h_BND)) for layer in (self.query, self.key, self.value))
        read_BHNd = F.scaled_dot_product_attention(query_BHNd, key_BHNd, value_BHNd, seen_BNN[:, None])
        x_BND = x_BND + self.output(read_BHNd.transpose(1, 2).flatten(2))
        h_BND = self.norm_mlp(x_BND)
        return x_BND + self.down(F.silu(self.gate(h_BND)) * self.up(h_BND))

    def log_attention(self, x_BND: Tensor, seen_BNN: Tensor, query_B: Tensor) -> Tensor:
        """Logarithm (B, N) of the attention, mean over heads, that column `query_B` of each row pays to each other."""
        B, _, D = x_BND.shape
        h_BND, index_B11 = self.norm(x_BND), query_B[:, None, None]
        query_BH1d = self._split(self.query(h_BND.gather(1, index_B11.expand(B, 1, D))))
        logits_BHN = (query_BH1d @ self._split(self.key(h_BND)).mT)[:, :, 0] * query_BH1d.shape[-1] ** -0.5
        seen_BN = seen_BNN.gather(1, index_B11.expand(B, 1, seen_BNN.shape[-1]))[:, 0]
        log_BHN = logits_BHN.masked_fill(~seen_BN[:, None], -1e4).log_softmax(-1)
        return log_BHN.logsumexp(1) - log(self.heads)

    def _split(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sequence(tokens: TokenView) -> tuple[Tensor, Tensor, Tensor]:
    """The row's sequence over the columns [vision tokens, whole sequence].

    Returns:
        bool (B, N), which columns belong to it; int64 (B, N), their order; int64 (B,), the column of the query.
    """
    role_BS, valid_BV = tokens.text_role_BS, tokens.valid_BV
    assert role_BS is not None
    (_, S), V = role_BS.shape, valid_BV.shape[1]
    column_S, number_V = torch.arange(S, device=role_BS.device), torch.arange(V, device=role_BS.device)
    word_BS = role_BS > 0
    last_B1 = torch.where(word_BS, column_S, -1).amax(1, keepdim=True)
    # Behind the prompt come answers, and padding that only later padding sees.
    text_BS = word_BS | ((column_S > last_B1) & (last_B1 >= 0))
    order_BS = column_S + torch.where(role_BS == SYSTEM, 0, S + V)
    order_BN = torch.cat([(S + number_V).expand_as(valid_BV), order_BS], 1)
    later_B = torch.where(role_BS >= BETWEEN, column_S, -1).amax(1)
    query_B = torch.where(later_B >= 0, V + later_B, torch.where(valid_BV, number_V, 0).amax(1))
    return torch.cat([valid_BV, text_BS], 1), order_BN, query_B
