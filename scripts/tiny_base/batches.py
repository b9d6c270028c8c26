"""Build batches: patch labels, pixels, and all questions about an image packed into one sequence."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from tiny_base.model import BOS_ID, EOS_ID, VISION_TOKENS
from tpcompress.data.benchmark.builder import image_rng
from tpcompress.data.benchmark.render import render
from tpcompress.data.benchmark.symbolic import ImageSpec, Kind, draw_image_spec, patch_labels
from tpcompress.data.benchmark.vocabulary import FAMILIES, GRID, LABELS, WORDS

IMAGE_MEAN = (0.48, 0.46, 0.41)
IMAGE_STD = (0.27, 0.26, 0.28)
IGNORED = -100
_LABEL_IDS = {label: i for i, label in enumerate(LABELS)}
_WORD_IDS = {word: i for i, word in enumerate(WORDS)}
# More questions than in a benchmark row: they share the vision tokens and therefore cost little.
_QUESTIONS = 3


@dataclass(frozen=True)
class Pack:
    """All questions about B images, each tensor (B, T).

    Attributes:
        segments: number of the question, from 1; 0 on padding.
        families: index of the question's family; 0 on padding.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    families: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Batch:
    """Images of a batch with packed questions, patch labels (B, V, K), and pixels (B, 3, H, W) if rendered."""

    specs: list[ImageSpec]
    pack: Pack
    labels: Tensor
    pixels: Tensor | None


def make_batch(split: str, seed: int, indices: range, kinds: tuple[Kind, ...], drawn: bool) -> Batch:
    """Build a batch of the images `indices` of a split and seed, with kinds in turn and pixels only if `drawn`."""
    specs, images = [], []
    for index in indices:
        rng = image_rng(split, seed, index)
        spec = draw_image_spec(rng, kinds[index % len(kinds)], limit=_QUESTIONS)
        specs.append(spec)
        if drawn:
            images.append(render(spec, rng, split))
    labels = torch.from_numpy(np.stack([label_matrix(spec) for spec in specs]))
    return Batch(specs, pack_questions(specs), labels, to_pixels(images) if drawn else None)


def label_matrix(spec: ImageSpec) -> np.ndarray:
    """Labels of every patch, 0 or 1, shape (V, K)."""
    covered, rest = patch_labels(spec)
    matrix = np.zeros((VISION_TOKENS, len(LABELS)), np.float32)
    matrix[:, [_LABEL_IDS[label] for label in rest]] = 1
    for (column, row), labels in covered.items():
        matrix[row * GRID + column] = 0
        matrix[row * GRID + column, [_LABEL_IDS[label] for label in labels]] = 1
    return matrix


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """Normalise RGB images as the image processor does; (B, 3, H, W)."""
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def jitter(pixels: Tensor, seed: int, step: int) -> Tensor:
    """Add noise and change brightness and contrast per image, depending on (seed, step) only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    shape = (len(pixels), 1, 1, 1)
    noise = torch.randn(pixels.shape, generator=generator) * torch.rand(shape, generator=generator) * 0.15
    contrast = 1 + 0.1 * (2 * torch.rand(shape, generator=generator) - 1)
    brightness = 0.15 * (2 * torch.rand(shape, generator=generator) - 1)
    return pixels * contrast + brightness + noise


def shown_patches(labels: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Ascending positions (B, count) of `count` patches per image: those covered by items, and random others."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order = torch.rand(labels.shape[:2], generator=generator) + is_covered(labels)
    return order.topk(count, dim=1).indices.sort(dim=1).values


def is_covered(labels: Tensor) -> Tensor:
    """Whether a patch belongs to an item, (B, V): such patches have at least two labels, the background has one."""
    return labels.sum(-1) > 1


def pack_questions(specs: list[ImageSpec]) -> Pack:
    """Concatenate the questions about each image; each starts at position 0."""
    rows = [_pack_row(spec) for spec in specs]
    length = max(len(row[0]) for row in rows)
    columns = zip(*rows, strict=True)
    padded = (
        torch.tensor([column + [fill] * (length - len(column)) for column in part])
        for part, fill in zip(columns, (0, 0, 0, 0, IGNORED), strict=True)
    )
    return Pack(*padded)


def answer_logits(model: LlavaForConditionalGeneration, vision: Tensor, where: Tensor, pack: Pack) -> Tensor:
    """Logits of packed questions, (B, T, words); each question attends to the vision tokens and itself.

    Args:
        model: model to train.
        vision: vision tokens, (B, V, D).
        where: positions of the vision tokens in the full grid, (B, V).
        pack: questions; their positions follow the full grid for any V.
    """
    text = model.get_input_embeddings()(pack.ids)
    positions = torch.cat([where, VISION_TOKENS + pack.positions], 1)
    segments = F.pad(pack.segments, (vision.shape[1], 0))
    visible = segments[:, :, None] == segments[:, None, :]
    visible[:, :, : vision.shape[1]] = True
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([vision, text], 1),
        attention_mask=visible.tril()[:, None],
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, vision.shape[1] :])


def answer_loss(logits: Tensor, pack: Pack) -> Tensor:
    """Cross entropy per answer word, averaged within each family and summed over the families in the batch.

    With a plain mean, difficult and rare families contribute too little, and questions about shapes are not learned.
    """
    targets = pack.targets[:, 1:]
    labelled = targets != IGNORED
    loss = F.cross_entropy(logits[:, :-1][labelled], targets[labelled], reduction="none")
    families = pack.families[:, 1:][labelled]
    return torch.stack([loss[families == family].mean() for family in families.unique()]).sum()


def exact_matches(logits: Tensor, batch: Batch) -> dict[str, list[bool]]:
    """For every family, whether all words of each answer have the highest logit, as in greedy decoding."""
    targets = batch.pack.targets[:, 1:]
    right = (logits[:, :-1].argmax(-1) == targets) | (targets == IGNORED)
    matches: dict[str, list[bool]] = defaultdict(list)
    for row, spec in enumerate(batch.specs):
        for number, question in enumerate(spec.questions, start=1):
            own = batch.pack.segments[row, 1:] == number
            matches[question.family].append(bool(right[row][own].all()))
    return matches


@cache
def _word_ids(text: str) -> list[int]:
    return [_WORD_IDS[word] for word in text.split()]


def _pack_row(spec: ImageSpec) -> tuple[list[int], ...]:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    families: list[int] = []
    targets: list[int] = []
    for number, question in enumerate(spec.questions, start=1):
        prompt, answer = [BOS_ID, *_word_ids(question.text)], [*_word_ids(question.answer), EOS_ID]
        length = len(prompt) + len(answer)
        ids += prompt + answer
        positions += range(length)
        segments += [number] * length
        families += [FAMILIES.index(question.family)] * length
        targets += [IGNORED] * len(prompt) + answer
    return ids, positions, segments, families, targets
