"""Tower stage: train the vision tower to predict the object-level labels of every patch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiny_base.batches import is_covered, jitter, make_batch
from tiny_base.model import WIDTH, build_model
from tiny_base.optim import Optimizers
from tpcompress.data.benchmark.symbolic import Kind
from tpcompress.data.benchmark.vocabulary import LABELS

# Digits and documents are the hardest kinds and are therefore more frequent than in the benchmark.
KINDS: tuple[Kind, ...] = ("scene", "digits", "document", "digits", "chart", "document", "scene", "digits")
_COVERED_WEIGHT = 8.0
IMAGE_WEIGHT = 0.1


class TowerStage:
    """Trains the vision tower with a linear head."""

    name = "tower"

    def __init__(self, images: int = 32):
        self._images = images

    def learner(self, seed: int) -> "TowerLearner":
        """Create the learner of a seed."""
        return TowerLearner(seed, self._images)


class TowerLearner:
    """State of the tower stage for one seed."""

    def __init__(self, seed: int, images: int):
        self._seed, self._images = seed, images
        self.tower = build_model(seed).model.vision_tower
        self.head = nn.Linear(WIDTH, len(LABELS))
        # The CLS token predicts which labels occur in the image, so that CLS-based pruners get meaningful attention.
        self.image_head = nn.Linear(WIDTH, len(LABELS))
        nn.init.constant_(self.head.bias, -3.0)
        nn.init.constant_(self.image_head.bias, -1.0)
        self.modules = nn.ModuleDict({"tower": self.tower, "head": self.head, "image_head": self.image_head})
        trained = {name: p for name, p in self.modules.named_parameters() if "post_layernorm" not in name}
        self.optimizers = Optimizers(trained)

    def loss(self, step: int, steps: int) -> Tensor:
        """Loss on the patch labels, plus a small loss on the labels of the image."""
        indices = range(step * self._images, (step + 1) * self._images)
        batch = make_batch("train", self._seed, indices, KINDS, drawn=True)
        hidden = self.tower(jitter(batch.pixels, self._seed, step)).last_hidden_state
        image = image_loss(self.image_head(hidden[:, 0]), batch.labels)
        return label_loss(self.head(hidden[:, 1:]), batch.labels) + IMAGE_WEIGHT * image

    @torch.no_grad()
    def evaluate(self, images: int) -> dict[str, float]:
        """Percent of patches with all labels of a group correct, among patches with a label of the group."""
        self.modules.eval()
        right, seen = dict.fromkeys(_groups(), 0.0), dict.fromkeys(_groups(), 0.0)
        for start in range(0, images, 32):
            batch = make_batch("validation", 0, range(start, start + 32), KINDS, drawn=True)
            found = (self.head(self.tower(batch.pixels).last_hidden_state[:, 1:]) > 0).float()
            for group, columns in _groups().items():
                truth, bearing = batch.labels[..., columns], batch.labels[..., columns].any(-1)
                right[group] += float((found[..., columns] == truth).all(-1)[bearing].sum())
                seen[group] += float(bearing.sum())
        return {group: 100 * right[group] / max(seen[group], 1.0) for group in right}


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy summed over labels; patches of items have a larger weight than background patches."""
    weight = torch.where(is_covered(labels), _COVERED_WEIGHT, 1.0)[..., None]
    return (F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * weight).sum() / weight.sum()


def image_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy on the labels that occur in the image; logits (B, K), labels (B, V, K)."""
    return F.binary_cross_entropy_with_logits(logits, labels.amax(1))


def _groups() -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(LABELS):
        groups.setdefault(label.partition(":")[0], []).append(i)
    return groups
