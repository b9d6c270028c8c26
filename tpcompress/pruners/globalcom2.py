"""GlobalCom2: the thumbnail decides how many tokens each crop retains, and which with it (arXiv 2501.05179)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import place_inside, places
from tpcompress.pruners.tiles import from_overview, mosaic, sum_of_parts
from tpcompress.pruners.topk import on, rank
from tpcompress.pruners.tower_attention import SOURCES, check_share, check_source, saliency


class GlobalCom2(Pruner):
    """Crop j of J retains the share r (1 + p_j - 1 / J) of its tokens, p = softmax over crops of s_j / temperature, s_j

    the sum of the thumbnail's attention over the crop; the thumbnail retains r, by its own attention. keep = in crop j
    the tokens of largest

    alpha g_i / |g| + (1 - alpha) a_i / |a|,  g the thumbnail's attention at the token's place (bilinear), a its own.

    r follows from the budget: parts are shared out by Webster's method (keys (place + 1/2) / (share n)), so the count
    is exact, no part has more than its tokens, and a smaller budget is part of a larger one.

    Crops are those of a row of two rectangles, a thumbnail and a mosaic (LLaVA-NeXT, LLaVA-OneVision). An image of one
    rectangle has no thumbnail to lead it: top-k by its attention. Where tiles are rectangles of their own (InternVL,
    Idefics 3, SmolVLM), or frames, their places in the thumbnail are not to be seen: all retain the same share, by
    their own attention.

    needs  tower_cls, or tower_received with attention received.     gives  keep_BV, scores_BV = - place in this order.
    Paper: r 0.25 and 0.1 of LLaVA-NeXT's tokens, temperature 10, alpha 0.5.
    Cost: one attention row of the tower, a few sorts of V.
    Unlike the official code: attention is that of layer -2 and the mean over heads; s_j sums over what lies over the
    crop after the padding was cut (there equal cells of the thumbnail); the exact budget, above (there every share is
    rounded down). All parts of the method for images are here; its variant for videos is not.
    """

    name = "globalcom2"
    paper = "2501.05179"
    group = "attention in the vision tower"
    paper_plan = """
    # GlobalCom2: a quarter of LLaVA-NeXT's tokens before the language model; renumbered.
    stages:
      - {pruner: globalcom2, layer: 0, keep_ratio: 0.25}
    positions: compact
    """
    test_arguments = (
        {"alpha": 0.0, "attention": "received"},
        {"alpha": 1.0, "temperature": 0.1},
    )

    def __init__(self, alpha: float = 0.5, temperature: float = 10.0, attention: str = "class") -> None:
        super().__init__()
        check_share(self.name, "alpha", alpha)
        check_source(self.name, attention)
        if not temperature > 0:
            raise ValueError(f"globalcom2 needs a temperature above 0, got {temperature}; a large one shares evenly.")
        self.alpha, self.temperature, self.attention = alpha, temperature, attention

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SOURCES[self.attention]})

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        own_BV = saliency(tokens, self.attention).masked_fill(~tokens.valid_BV, 0.0)
        valid_BV, parts = tokens.valid_BV, mosaic(tokens)
        crop_BV = parts.tiled_B1 & valid_BV & ~parts.overview_BV
        lead_BV = from_overview(own_BV, parts, tokens.canvas)
        mixed_BV = self.alpha * self._unit(lead_BV, parts.part_BV) + (1 - self.alpha) * self._unit(
            own_BV, parts.part_BV
        )
        best_BV = rank(torch.where(crop_BV, mixed_BV, own_BV), valid_BV)
        inside_BV = place_inside(best_BV, parts.part_BV, valid_BV)[0]
        size_BV = sum_of_parts(valid_BV.float(), parts.part_BV)
        share_BV = torch.where(crop_BV, self._shares(own_BV, parts.overview_BV, parts.crop_BV, crop_BV, size_BV), 1.0)
        key_BV = ((inside_BV + 0.5) / (share_BV * size_BV.clamp(min=1))).masked_fill(~valid_BV, torch.inf)
        place_BV = places(key_BV, best_BV)
        return Selection((place_BV < on(num_keep_B, key_BV)[:, None]) & valid_BV, -place_BV.float())

    def _shares(self, own_BV: Tensor, over_BV: Tensor, crop_BV: Tensor, in_crop_BV: Tensor, size_BV: Tensor) -> Tensor:
        """1 + p_j - 1 / J for each token of a crop j."""
        logit_BV = sum_of_parts(own_BV.masked_fill(~over_BV, 0.0), crop_BV) / self.temperature
        most_B1 = logit_BV.masked_fill(~in_crop_BV, -torch.inf).amax(1, keepdim=True).clamp(min=-1e30)
        # Every token of a crop has an equal part of what its crop adds to the sum over crops.
        each_BV = in_crop_BV / size_BV.clamp(min=1)
        power_BV = (logit_BV - most_B1).exp()
        total_B1 = (power_BV.double() * each_BV).sum(1, keepdim=True).float()
        crops_B1 = each_BV.sum(1, keepdim=True, dtype=torch.float64).round().float().clamp(min=1)
        tiny = torch.finfo(torch.float32).tiny
        return 1 + power_BV / total_B1.clamp(min=tiny) - 1 / crops_B1

    @staticmethod
    def _unit(x_BV: Tensor, part_BV: Tensor) -> Tensor:
        """x over the norm of x in each part."""
        return x_BV / sum_of_parts(x_BV.square(), part_BV).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
