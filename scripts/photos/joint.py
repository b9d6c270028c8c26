"""Joint stage: start the projector from the patch stage, then train projector and language model on all 256 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import torch
from tiny_base.optim import Optimizers
from torch import Tensor, nn
from torch.nn import functional as F

from photos.batches import LABELS, answer_logits, answer_loss, exact_matches, is_covered, pack_questions
from photos.model import WIDTH, WORD_IDS, Reader
from photos.patches import NOISE, PatchLearner, Scenes
from tpcompress.data.photos.builder import question_rng
from tpcompress.data.photos.questions import FAMILIES, ask

_LABEL_WEIGHT = 0.05
_RIDGE = 1e-4
_ASKED = 4
"""Questions of a family about a scene: more than in the benchmark, since they share its tokens and cost little."""

_PLUGGED = 400


class JointStage:
    """Trains projector and language model on the answers."""

    name = "joint"

    def __init__(self, train: Scenes, validation: Scenes, patches: PatchLearner, batch: int = 24) -> None:
        self._train, self._validation, self._patches, self._batch = train, validation, patches, batch

    def learner(self, seed: int) -> JointLearner:
        """Create the learner of a seed."""
        reader = Reader(seed)
        head = nn.Linear(WIDTH, len(LABELS))
        head.load_state_dict(self._patches.modules["head"].state_dict())
        plug(reader, self._patches.modules["hidden"], self._train)
        return JointLearner(reader, head, self._train, self._validation, seed, self._batch)


class JointLearner:
    """State of the joint stage for one seed."""

    def __init__(
        self, reader: Reader, head: nn.Linear, train: Scenes, validation: Scenes, seed: int, batch: int
    ) -> None:
        self.reader, self.head = reader, head
        self.modules = nn.ModuleDict({"reader": reader, "head": head})
        self._train, self._validation, self._seed, self._batch = train, validation, seed, batch
        self.optimizers = Optimizers(dict(self.modules.named_parameters()), adam_gain=2.0)

    def loss(self, step: int, steps: int) -> Tensor:
        """Answer loss from all vision tokens, plus a small label loss on the projector's first layer."""
        passes, scenes = self._scenes(step)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        x = self._train.standard(scenes)
        x = x + NOISE * torch.randn(x.shape, generator=generator)
        # Other questions in every pass: a scene has more than are asked at once.
        asked = [ask(self._train.layouts[int(i)], Random(f"{self._seed}/{passes}/{int(i)}"), _ASKED) for i in scenes]
        pack, labels = pack_questions(asked), self._train.labels(scenes)
        with fast():
            hidden = F.gelu(self.reader.projector.linear_1(x))
            logits = answer_logits(self.reader, self.reader.projector.linear_2(hidden), pack)
            named = self.head(hidden)
        naming = F.binary_cross_entropy_with_logits(named.float(), labels, reduction="none").sum(-1)
        weight = torch.where(is_covered(labels), 2.0, 0.5)
        return answer_loss(logits, pack) + _LABEL_WEIGHT * (naming * weight).mean()

    def _scenes(self, step: int) -> tuple[int, Tensor]:
        """Number of the pass over the scenes, and the scenes of a step."""
        per_pass = max(1, len(self._train) // self._batch)
        passes, at = divmod(step, per_pass)
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(self._seed * 1009 + passes))
        return passes, order[at * self._batch : (at + 1) * self._batch]

    def evaluate(self, images: int) -> dict[str, float]:
        """Exact match in percent on scenes of the validation split."""
        return exact_match(self.reader, self._validation, "validation", images)


@contextmanager
def fast() -> Iterator[None]:
    """bf16 matrices: twice as fast on CPUs that multiply them natively, and a little slower on others."""
    with torch.autocast("cpu", torch.bfloat16):
        yield


@torch.no_grad()
def exact_match(
    reader: Reader, scenes: Scenes, split: str, images: int, blind: bool = False, seed: int = 0
) -> dict[str, float]:
    """Exact match per family in percent; `blind` replaces all features by their mean."""
    reader.eval()
    matches: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    count = min(images, len(scenes))
    for start in range(0, count, 32):
        numbers = range(start, min(start + 32, count))
        x = scenes.standard(numbers) * (0 if blind else 1)
        pack = pack_questions([ask(scenes.layouts[i], question_rng(split, seed, i)) for i in numbers])
        with fast():
            logits = answer_logits(reader, reader.projector(x), pack)
        for family, right in exact_matches(logits, pack).items():
            matches[family] += right
    return {family: 100 * sum(right) / len(right) for family, right in matches.items() if right}


@torch.no_grad()
def plug(reader: Reader, hidden: nn.Module, scenes: Scenes) -> None:
    """Start the projector without gradient steps.

    Its first layer is the hidden layer of the patch stage; its second is the ridge regression from there to the sum of
    the embeddings of each patch's labels, so that the language model first meets words that it can compare.
    """
    projector, words = reader.projector, reader.language_model.embed_tokens.weight
    projector.linear_1.load_state_dict(hidden.state_dict())
    table = words[[WORD_IDS[label] for label in LABELS]].clone()
    table[-1] = 0.2 * torch.randn(WIDTH)  # the middle of an item has no word
    moments, targets = torch.zeros(WIDTH + 1, WIDTH + 1), torch.zeros(WIDTH + 1, WIDTH)
    for start in range(0, min(_PLUGGED, len(scenes)), 50):
        numbers = range(start, min(start + 50, len(scenes)))
        labels = scenes.labels(numbers).flatten(0, 1)
        u = F.gelu(projector.linear_1(scenes.standard(numbers))).flatten(0, 1)
        u = torch.cat([u, torch.ones(len(u), 1)], 1)
        weighted = u * torch.where(is_covered(labels), 4.0, 1.0)[:, None]
        moments += weighted.T @ u
        targets += weighted.T @ (labels @ table)
    solution = torch.linalg.solve(moments + _RIDGE * moments.diag().mean() * torch.eye(WIDTH + 1), targets)
    projector.linear_2.weight.copy_(solution[:-1].T)
    projector.linear_2.bias.copy_(solution[-1])
