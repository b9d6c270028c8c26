"""Joint stage: initialise the projector by ridge regression, then train the whole model."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tiny_base.batches import answer_logits, answer_loss, exact_matches, is_covered, jitter, make_batch
from tiny_base.language import OTHERS, SCENE, LanguageLearner
from tiny_base.model import VISION_TOKENS, build_model, patch_features
from tiny_base.optim import Optimizers
from tiny_base.tower import IMAGE_WEIGHT, KINDS, TowerLearner, image_loss, label_loss
from tpcompress.data.benchmark.vocabulary import FAMILIES, LABELS

_LABEL_WEIGHT = 0.3
_RIDGE = 1e-4


class JointStage:
    """Trains the whole model, starting from the language and tower stages."""

    name = "joint"

    def __init__(
        self, language: LanguageLearner, tower: TowerLearner, scenes: int = 16, others: int = 12, plugged: int = 768
    ):
        self._language, self._tower = language, tower
        self._scenes, self._others, self._plugged = scenes, others, plugged

    def learner(self, seed: int) -> "JointLearner":
        """Create the learner of a seed; the seed changes the images, not the two trained parts."""
        model = build_model(seed)
        model.model.vision_tower.load_state_dict(self._tower.tower.state_dict())
        model.model.language_model.load_state_dict(self._language.language_model.state_dict())
        plug(model, self._tower.head, self._language.table.table.detach(), seed, self._plugged)
        image_head = deepcopy(self._tower.image_head)
        return JointLearner(model, image_head, seed, self._scenes, self._others)


class JointLearner:
    """State of the joint stage for one seed."""

    def __init__(
        self, model: LlavaForConditionalGeneration, image_head: nn.Linear, seed: int, scenes: int, others: int
    ):
        self.model, self.image_head = model, image_head
        self.modules = nn.ModuleDict({"model": model, "image_head": image_head})
        self._seed, self._sizes = seed, ((SCENE, scenes), (OTHERS, others))
        trained = {name: p for name, p in self.modules.named_parameters() if "post_layernorm" not in name}
        self.optimizers = Optimizers(trained)

    def loss(self, step: int, steps: int) -> Tensor:
        """Answer loss from pixels, plus label losses on the projector's first layer and the CLS token."""
        projector = self.model.model.multi_modal_projector
        answers, naming = torch.zeros(()), torch.zeros(())
        for part, (kinds, size) in enumerate(self._sizes):
            batch = make_batch("train", 100 + self._seed, range(step * size, (step + 1) * size), kinds, drawn=True)
            pixels = jitter(batch.pixels, 100 + self._seed, 2 * step + part)
            hidden = self.model.model.vision_tower(pixels).last_hidden_state
            named = projector.linear_1(hidden[:, 1:])
            vision = projector.linear_2(projector.act(named))
            logits = answer_logits(self.model, vision, torch.arange(VISION_TOKENS).expand(size, -1), batch.pack)
            answers = answers + answer_loss(logits, batch.pack) / len(FAMILIES)
            image = image_loss(self.image_head(hidden[:, 0]), batch.labels)
            naming = naming + label_loss(named[..., : len(LABELS)], batch.labels) + IMAGE_WEIGHT * image
        return answers + _LABEL_WEIGHT * naming / len(self._sizes)

    def evaluate(self, images: int) -> dict[str, float]:
        """Exact match in percent on held-out images."""
        return exact_match(self.model, "validation", images)


@torch.no_grad()
def exact_match(
    model: LlavaForConditionalGeneration, split: str, images: int, seed: int = 0, blind: bool = False
) -> dict[str, float]:
    """Exact match per family in percent on rendered images, half of them scenes; `blind` blanks every image."""
    model.eval()
    matches: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for start in range(0, images // 2, 32):
        for kinds in (SCENE, OTHERS):
            batch = make_batch(split, seed, range(start, min(start + 32, images // 2)), kinds, drawn=True)
            pixels = batch.pixels * 0 if blind else batch.pixels
            vision = model.model.multi_modal_projector(patch_features(model, pixels))
            where = torch.arange(VISION_TOKENS).expand(len(pixels), -1)
            for family, right in exact_matches(answer_logits(model, vision, where, batch.pack), batch).items():
                matches[family] += right
    return {family: 100 * sum(right) / len(right) for family, right in matches.items() if right}


@torch.no_grad()
def plug(model: LlavaForConditionalGeneration, head: nn.Linear, table: Tensor, seed: int, images: int) -> None:
    """Initialise the projector without gradient steps.

    The first layer is the label head of the tower; the second is the ridge regression from its outputs to the ideal
    vision tokens that the language model was trained on.
    """
    model.eval()
    projector = model.model.multi_modal_projector
    projector.linear_1.weight[: len(LABELS)] = head.weight
    projector.linear_1.bias[: len(LABELS)] = head.bias
    size = projector.linear_1.out_features + 1
    moments, targets = torch.zeros(size, size), torch.zeros(size, table.shape[1])
    for start in range(0, images, 32):
        batch = make_batch("train", 100 + seed, range(start, start + 32), KINDS, drawn=True)
        hidden = projector.act(projector.linear_1(patch_features(model, batch.pixels))).flatten(0, 1)
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
        weighted = hidden * torch.where(is_covered(batch.labels), 4.0, 1.0).flatten()[:, None]
        moments += weighted.T @ hidden
        targets += weighted.T @ (batch.labels @ table).flatten(0, 1)
    solution = torch.linalg.solve(moments + _RIDGE * moments.diag().mean() * torch.eye(size), targets)
    projector.linear_2.weight.copy_(solution[:-1].T)
    projector.linear_2.bias.copy_(solution[-1])
