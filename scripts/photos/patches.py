"""Patch stage: what single patches of the frozen tower tell, as labels; its hidden layer starts the projector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny_base.optim import Optimizers
from torch import Tensor, nn
from torch.nn import functional as F

from photos.batches import GROUPS, LABELS, is_covered, label_matrix
from photos.model import WIDTH
from tpcompress.data.photos.scene import Layout

NOISE = 0.3
"""Standard deviation of the noise on standardised features: without it the head learns the photographs by heart."""

_PATCHES = 1024
_DROPOUT = 0.1


class Scenes:
    """Cached features of scenes with their layouts and the labels of their patches.

    Attributes:
        features: (N, 256, C) float16, as the tower gives them.
        layouts: one per scene.
    """

    def __init__(self, features: Tensor, layouts: Sequence[Layout], like: Scenes | None = None) -> None:
        self.features, self.layouts = features, layouts
        sample = features[:: max(1, len(features) // 500)].float().flatten(0, 1) if like is None else None
        self._labels = torch.stack([label_matrix(layout) for layout in layouts])
        self.mean: Tensor = like.mean if like is not None else _of(sample).mean(0)
        self.std: Tensor = like.std if like is not None else _of(sample).std(0)

    def __len__(self) -> int:
        return len(self.features)

    def standard(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Features of some scenes with mean 0 and deviation 1 in every channel of the training scenes, fp32."""
        return (self.features[indices].float() - self.mean) / self.std

    def labels(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Labels of the patches of some scenes, (B, 256, labels) fp32."""
        return self._labels[indices].float()


def _of(sample: Tensor | None) -> Tensor:
    assert sample is not None
    return sample


class PatchStage:
    """Trains a head of one hidden layer on single patches."""

    name = "patches"

    def __init__(self, train: Scenes, validation: Scenes) -> None:
        self._train, self._validation = train, validation

    def learner(self, seed: int) -> PatchLearner:
        """Create the learner of a seed."""
        return PatchLearner(self._train, self._validation, seed)


class PatchLearner:
    """State of the patch stage for one seed."""

    def __init__(self, train: Scenes, validation: Scenes, seed: int) -> None:
        torch.manual_seed(seed)
        self._train, self._validation, self._seed = train, validation, seed
        width = train.features.shape[-1]
        self.modules = nn.ModuleDict({"hidden": nn.Linear(width, WIDTH), "head": nn.Linear(WIDTH, len(LABELS))})
        nn.init.constant_(self.modules["head"].bias, -3.0)
        self.optimizers = Optimizers(dict(self.modules.named_parameters()))

    def loss(self, step: int, steps: int) -> Tensor:
        """Binary cross entropy summed over the labels, on patches of a few scenes; half of them show an item."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        scenes = torch.randint(len(self._train), (16,), generator=generator)
        x, labels = self._train.standard(scenes).flatten(0, 1), self._train.labels(scenes).flatten(0, 1)
        weight = torch.where(is_covered(labels), 3.0, 1.0)
        picked = torch.multinomial(weight, _PATCHES, generator=generator)
        x = x[picked] + NOISE * torch.randn(_PATCHES, x.shape[-1], generator=generator)
        hidden = F.dropout(F.gelu(self.modules["hidden"](x)), _DROPOUT)
        logits = self.modules["head"](hidden)
        return F.binary_cross_entropy_with_logits(logits, labels[picked], reduction="none").sum(-1).mean()

    @torch.no_grad()
    def evaluate(self, images: int) -> dict[str, float]:
        """Percent of the right label of each group among the patches that have exactly one of it."""
        return patch_accuracy(self.modules, self._validation, images)


@torch.no_grad()
def patch_accuracy(modules: nn.ModuleDict, scenes: Scenes, images: int) -> dict[str, float]:
    """Percent of patches whose best label of a group is right, among those with exactly one label of the group."""
    modules.eval()
    numbers = range(min(images, len(scenes)))
    labels = scenes.labels(numbers)
    logits = modules["head"](F.gelu(modules["hidden"](scenes.standard(numbers))))
    found, start = {}, 0
    for group, members in GROUPS.items():
        columns = slice(start, start + len(members))
        start += len(members)
        if group == "shape":  # not one of several: the head knows them, no gate rests on them
            continue
        one = labels[..., columns].sum(-1) == 1
        right = logits[..., columns].argmax(-1) == labels[..., columns].argmax(-1)
        found[group] = 100 * float(right[one].float().mean())
    return found
