"""DTD: retain what changed since the frame before (TimeChat-Online, arXiv 2504.17343, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.frames import cell_before, cell_change
from tpcompress.pruners.topk import keep_topk, take

LEVELS = ("feature", "pixel")


class DTD(Pruner):
    """d(v) = 1 - cos(x_v, x_u), u the token of the same cell of the frame before (`level: feature`), or the mean of
    |p_v - p_u| over all pixels of a token (`level: pixel`); 1 + the largest d of the row where there is no such token.

    Where a token holds several consecutive images (Qwen's towers merge pairs), p_v is its last image and p_u the first
    image of the token before. `pixel_std`, one number per channel, multiplies the differences: with the standard
    deviations of the image processor they are in units of [0, 1] pixels.

    keep = the budget's tokens of largest d; with a `threshold` t all with cos <= t, or |p_v - p_u| >= t, whatever the
    budget; with `relative` a share: of each frame of n tokens the floor(n t) of least d are dropped. Each frame is
    compared with its immediate predecessor, retained or not. The first frame comes first: within a budget it stays as
    far as that reaches, and with a threshold it stays whole, so that some token always does. So does every cell whose
    predecessor an earlier stage dropped.

    Tokens of images have no frame before: all their d are equal, and the first ones fill the budget. Frames that a
    model takes for images of their own (InternVL, SmolVLM) have none either. In a plain view without `video_BV` every
    rectangle counts as a frame.

    needs  nothing, or pixels with level pixel.     gives  keep_BV, scores_BV = d.
    Paper: feature level; threshold 0.25 (about 85 % of tokens dropped) or 0.5 (about 45 %); original M-RoPE positions,
    which a plan keeps by default. Here the default is an exact budget.
    Cost: one sort of V to find the frames before, and one pass over the features.
    Unlike the official code: pixels are those that the tower was given, normalised, unless `pixel_std` is given
    (officially CLIP's: 0.26862954, 0.26130258, 0.27577711); ties of a share drop the later token; batched. With a
    threshold, and `pixel_std` at level pixel, it retains the official tokens of one video.
    """

    name = "dtd"
    paper = "2504.17343"
    group = "video"
    paper_plan = """
    # DTD (TimeChat-Online): of a video on Qwen2.5-VL the 15 % of tokens that changed most since the frame before, in
    # positions of the whole video. The paper's own budget is a threshold: {type: dtd, threshold: 0.25} drops about 85
    # %, 0.5 about 45 %.
    stages:
      - {pruner: dtd, layer: 0, keep_ratio: 0.15}
    """
    test_arguments = (
        {"level": "pixel"},
        {"level": "pixel", "pixel_std": [0.3, 0.2, 0.1]},
    )
    inexact_arguments = (
        {"threshold": 0.5},
        {"level": "pixel", "threshold": 0.3},
        {"threshold": 0.5, "relative": True},
        {"level": "pixel", "threshold": 0.85, "relative": True},
    )

    def __init__(
        self,
        level: str = "feature",
        threshold: float | None = None,
        relative: bool = False,
        pixel_std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if level not in LEVELS:
            raise ValueError(f"dtd has no level '{level}'; choose one of {', '.join(LEVELS)}.")
        if threshold is not None and not (-1 <= threshold <= 1 if level == "feature" else threshold >= 0):
            possible = "a cosine between -1 and 1" if level == "feature" else "a difference of at least 0"
            raise ValueError(f"dtd at level {level} needs a threshold that is {possible}, got {threshold}.")
        if relative and (threshold is None or not 0 <= threshold <= 1):
            raise ValueError(f"dtd with relative drops a share of each frame, between 0 and 1, got {threshold}.")
        if pixel_std and (level != "pixel" or min(pixel_std) <= 0):
            raise ValueError(
                f"dtd takes pixel_std at level pixel, numbers above 0, one per channel; got {list(pixel_std)} at level "
                f"{level}."
            )
        self.level, self.threshold, self.relative, self.pixel_std = level, threshold, relative, list(pixel_std)
        self.exact_count = threshold is None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pixels"} if self.level == "pixel" else ())

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        before_BV, exists_BV = cell_before(
            tokens.row_BV, tokens.col_BV, tokens.tile_BV, tokens.image_BV, tokens.valid_BV, tokens.canvas
        )
        if tokens.video_BV is not None:
            exists_BV &= tokens.video_BV
        if self.level == "feature":
            change_BV = change(tokens.vision_BVD, before_BV, self.level)
        else:
            assert tokens.pixels_BVC is not None
            change_BV = pixel_change(tokens.pixels_BVC, before_BV, tokens.pixel_images, self.pixel_std)
        change_BV = change_BV.masked_fill(~exists_BV, 0.0)
        scores_BV = torch.where(exists_BV, change_BV, 1 + change_BV.amax(1, keepdim=True))
        if self.threshold is None:
            return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)
        if self.relative:
            frame_BV = tokens.image_BV * (tokens.tile_BV.amax() + 1) + tokens.tile_BV
            dropped_BV = least_of_each(scores_BV, exists_BV, frame_BV, tokens.valid_BV, self.threshold)
            return Selection(tokens.valid_BV & ~dropped_BV, scores_BV)
        least = 1 - self.threshold if self.level == "feature" else self.threshold
        return Selection(tokens.valid_BV & (~exists_BV | (change_BV >= least)), scores_BV)


def change(x_BVD: Tensor, before_BV: Tensor, level: str) -> Tensor:
    """fp32 (B, V): how far each token is from the one before it: 1 - cosine ("feature"), mean |difference| ("pixel").

    Exactly 0 for a token that did not change: what stands still ties, and rounding must not rank it.

    Args:
        x_BVD: features, or pixels of the tokens' patches.
        before_BV: index of the token to compare with.
        level: "feature" or "pixel".
    """
    if level == "pixel":
        return pixel_change(x_BVD, before_BV)
    return cell_change(x_BVD, before_BV)


def pixel_change(pixels_BVC: Tensor, before_BV: Tensor, images: int = 1, std: Sequence[float] = ()) -> Tensor:
    """fp32 (B, V): mean |last image of a token - first image of the token before it|.

    Args:
        pixels_BVC: pixels of each token, its images one after the other, in each the channels one after the other.
        before_BV: index of the token to compare with.
        images: images per token.
        std: factor of each channel; 1 without it.

    Raises:
        ValueError: the pixels of an image are not a multiple of the channels.
    """
    images_BVIC = pixels_BVC.float().unflatten(-1, (images, -1))
    apart_BVC = (images_BVIC[:, :, -1] - take(images_BVIC[:, :, 0], before_BV)).abs()
    if std:
        if apart_BVC.shape[-1] % len(std):
            raise ValueError(f"dtd got {len(std)} numbers in pixel_std, but the images do not have as many channels.")
        apart_BVC = apart_BVC.unflatten(-1, (len(std), -1)) * apart_BVC.new_tensor(std)[:, None]
        apart_BVC = apart_BVC.flatten(2)
    return apart_BVC.mean(-1)


def least_of_each(scores_BV: Tensor, exists_BV: Tensor, frame_BV: Tensor, valid_BV: Tensor, share: float) -> Tensor:
    """bool (B, V): of each frame of n tokens the floor(n share) of least score, among those with a token before them.

    Args:
        scores_BV: change of each token (B, V).
        exists_BV: whether there is a token to compare with.
        frame_BV: number of each token's frame, int64, in sequence order.
        valid_BV: bool (B, V).
        share: from 0 to 1.
    """
    none = torch.iinfo(torch.long).max
    # Sorted by score, then stably by frame: each frame is one run, and a token's place in it is what precedes it.
    order_BV = scores_BV.masked_fill(~exists_BV, torch.inf).flip(1).argsort(dim=1, stable=True)
    order_BV = scores_BV.shape[1] - 1 - order_BV  # of equal scores the later token first
    key_BV = frame_BV.masked_fill(~valid_BV, none).gather(1, order_BV)
    order_BV = order_BV.gather(1, key_BV.argsort(dim=1, stable=True))
    key_BV = frame_BV.masked_fill(~valid_BV, none).gather(1, order_BV).contiguous()
    first_BV = torch.searchsorted(key_BV, key_BV)
    size_BV = torch.searchsorted(key_BV, key_BV, right=True) - first_BV
    place_BV = torch.arange(scores_BV.shape[1], device=scores_BV.device) - first_BV
    goes_BV = place_BV < (size_BV.double() * share).floor()
    return torch.zeros_like(valid_BV).scatter(1, order_BV, goes_BV) & exists_BV & valid_BV
