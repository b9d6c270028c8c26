"""VidCom2: retain what is unlike its video and its frame, more of the frames that stand out (arXiv 2505.14454)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import place_inside, places
from tpcompress.pruners.frames import frame_mean
from tpcompress.pruners.topk import on, rank, take

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Variances a of the Gaussians whose sum compares a token with a centre."""
COMPATS = ("official", "vllm")


class VidCom2(Pruner):
    """G(z, c) = sum over a in (1/8, 1/4, 1/2, 1, 2) of exp(-|z - c|^2 / 2a), z = normalised x on the half of the
    channels that vary least. v = G(z, mean of the video), u = G(z, mean of its frame); both are larger for a token that
    is more like the rest.

    Share of frame t: w_t = 1 + p_t - mean p, p = softmax over frames of -mean v_t / temperature. The token of place j
    in its frame, 0 = lowest v + u, has the key (j + 1/2) / w_t; first tokens of frames come before all others, those of
    frames with larger -mean v first. keep = the budget's tokens of smallest key: shares as close to w_t as an exact
    count allows, no frame empty if the budget has a token for each, and a smaller budget is part of a larger one.

    With `compat: official` frame t retains max(1, round(r n min(1 / r, w_t))) of its n tokens, r = budget / tokens, and
    with `compat: vllm` the first max(T, budget) in the order of these, then of v + u: what the official code and vLLM
    retain, whose counts differ from the budget.

    An image is one frame: u = v, and the tokens that are least like it stay. Tiles of an image count as frames, and so
    do the frames of all videos of a row, which has one budget.

    needs  nothing.     gives  keep_BV, scores_BV = - place in this order.
    Paper: r = 0.25, temperature 0.01, tokens after the projector, original positions.
    Cost: a few passes over the features, two sorts of V.
    Unlike the official code: the exact budget, above; LLaVA-Video's newline tokens are not vision tokens here; ties go
    to the earlier token and the smaller channel.
    """

    name = "vidcom2"
    paper = "2505.14454"
    group = "video"
    paper_plan = """
    # VidCom2: a quarter of a video's tokens before the language model, in positions of the whole video.
    stages:
      - {pruner: vidcom2, layer: 0, keep_ratio: 0.25}
    """
    test_arguments = ({"temperature": 1.0},)
    inexact_arguments = ({"compat": "official"}, {"compat": "vllm"})

    def __init__(self, temperature: float = 0.01, compat: str | None = None) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"vidcom2 needs a temperature above 0, got {temperature}; a large one shares evenly.")
        if compat is not None and compat not in COMPATS:
            raise ValueError(f"vidcom2 has no compat '{compat}'; choose one of {', '.join(COMPATS)}.")
        self.temperature, self.compat = temperature, compat
        self.exact_count = compat is None

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        valid_BV, count_B1 = tokens.valid_BV, on(num_keep_B, tokens.vision_BVD)[:, None]
        column_BV = torch.arange(valid_BV.shape[1], device=valid_BV.device).expand_as(valid_BV)
        frame_BV = place_inside(column_BV, tokens.tile_BV, valid_BV)[1]
        alike_BV, video_BV = likeness(tokens.vision_BVD, frame_BV, valid_BV)
        share_BV, unusual_BV, size_BV, frames_B1 = self._shares(video_BV, frame_BV, valid_BV)
        overall_BV = rank(-alike_BV, valid_BV)
        inside_BV = place_inside(overall_BV, frame_BV, valid_BV)[0]
        if self.compat is None:
            key_BV = (inside_BV + 0.5) / share_BV
            # Before all others, the frame that stands out most first: all keys are above 0.
            stands_BV = rank(unusual_BV, valid_BV)
            first_BV = -2 + stands_BV / valid_BV.shape[1]
            key_BV = torch.where(inside_BV == 0, first_BV, key_BV).masked_fill(~valid_BV, torch.inf)
            place_BV = places(key_BV, stands_BV)  # shares that differ by less than fp32 holds
            return Selection((place_BV < count_B1) & valid_BV, -place_BV.float())
        ratio_B1 = count_B1 / valid_BV.sum(1, keepdim=True).clamp(min=1)
        own_BV = ((ratio_B1 * share_BV).clamp(max=1) * size_BV).round().clamp(min=1)
        keep_BV = (inside_BV < own_BV) & valid_BV
        place_BV = places((~keep_BV).long() + (~valid_BV).long(), overall_BV)
        if self.compat == "vllm":
            keep_BV = (place_BV < count_B1.maximum(frames_B1)) & valid_BV
        return Selection(keep_BV, -place_BV.float())

    def _shares(self, video_BV: Tensor, frame_BV: Tensor, valid_BV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each token that of its frame: w_t, -mean v_t, its number of tokens; and the number of frames (B, 1)."""
        mean_BT, size_BT = frame_mean(video_BV[..., None], frame_BV, valid_BV)
        unusual_BT = (-mean_BT[..., 0]).masked_fill(size_BT == 0, -torch.inf)
        frames_B1 = (size_BT > 0).sum(1, keepdim=True).clamp(min=1)
        best_B1 = unusual_BT.amax(1, keepdim=True)
        share_BT = 1 + ((unusual_BT - best_B1) / self.temperature).softmax(1) - 1 / frames_B1
        return *(x_BT.gather(1, frame_BV) for x_BT in (share_BT, unusual_BT, size_BT)), frames_B1  # type: ignore[return-value]


def likeness(x_BVD: Tensor, frame_BV: Tensor, valid_BV: Tensor) -> tuple[Tensor, Tensor]:
    """How much each token is like the rest: v + u, and v alone, fp32 (B, V).

    Args:
        x_BVD: features.
        frame_BV: number of each token's frame, from 0 without gaps.
        valid_BV: bool (B, V).
    """
    # In fp64 and rounded in the end, where tokens of equal numbers tie wherever they stand.
    z_BVC = F.normalize(take_channels(x_BVD.double(), valid_BV), dim=-1)
    whole_BVC, _ = frame_mean(z_BVC, torch.zeros_like(frame_BV), valid_BV)
    frame_BVC, _ = frame_mean(z_BVC, frame_BV, valid_BV)
    video_BV = gaussians(z_BVC, whole_BVC[:, :1])
    return (video_BV + gaussians(z_BVC, take(frame_BVC, frame_BV))).float(), video_BV.float()


def take_channels(x_BVD: Tensor, valid_BV: Tensor) -> Tensor:
    """The half of the channels whose variance over a row's tokens is lowest, (B, V, D // 2), at least one."""
    D = x_BVD.shape[-1]
    real_BV1 = valid_BV[..., None].double()
    count_B11 = real_BV1.sum(1, keepdim=True).clamp(min=1)
    x64_BVD = x_BVD.double()
    mean_B1D = (x64_BVD * real_BV1).sum(1, keepdim=True) / count_B11
    variance_BD = ((x64_BVD - mean_B1D).square() * real_BV1).sum(1) / count_B11[:, 0]
    # In fp32, where channels of equal numbers tie however long their row is.
    channel_BC = variance_BD.float().argsort(dim=1, stable=True)[:, : max(D // 2, 1)].sort(1).values
    return x_BVD.gather(2, channel_BC[:, None].expand(-1, x_BVD.shape[1], -1))


def gaussians(z_BVC: Tensor, centre_BVC: Tensor) -> Tensor:
    """Sum of Gaussians of the distance to a centre, one per width, (B, V) in the dtype of `z_BVC`."""
    apart_BV = (z_BVC - centre_BVC).square().sum(-1)
    return torch.stack([(-apart_BV / (2 * width)).exp() for width in WIDTHS]).sum(0)
