"""Batches of cached features: labels of patches, and questions about a scene packed behind its vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from photos.model import BOS_ID, EOS_ID, PAD_ID, VISION_TOKENS, WORD_IDS, Reader
from tpcompress.data.photos.catalogue import CELLS, COLOURS, OBJECTS, PLACES
from tpcompress.data.photos.questions import FAMILIES, Question, cell_of
from tpcompress.data.photos.scene import GRID, PATCH, Layout

IGNORED = -100
GROUPS: Final = {
    "class": tuple(OBJECTS),
    "colour": tuple(COLOURS),
    "place": tuple(PLACES),
    "cell": CELLS,
    "shape": ("smallest", "centre"),
}
LABELS: Final = tuple(label for group in GROUPS.values() for label in group)
"""Labels of a patch; `smallest` is a patch of a small item, `centre` the middle patch of any item."""

_LABEL_IDS = {label: i for i, label in reversed(list(enumerate(LABELS)))}  # the cell `centre` comes first
_CENTRE = len(LABELS) - 1
_SMALL_AREA = 40 * 40
_CELLS = torch.tensor(
    [cell_of((p % GRID) * PATCH + PATCH / 2, (p // GRID) * PATCH + PATCH / 2) for p in range(VISION_TOKENS)]
)


@dataclass(frozen=True)
class Pack:
    """All questions about B scenes, each tensor (B, T): ids, positions, number of the question (0: padding), targets.

    Attributes:
        targets: the word to predict from each place: the answer from the last word before it, <eos> from the answer.
        families: index of the question's family.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    families: Tensor
    targets: Tensor


def label_matrix(layout: Layout) -> Tensor:
    """Labels of every patch, 0 or 1, (256, labels) uint8."""
    matrix = torch.zeros(VISION_TOKENS, len(LABELS), dtype=torch.uint8)
    shown: set[int] = set()
    for item in layout.items:
        patches = list(item.patches)
        shown.update(patches)
        matrix[patches, _LABEL_IDS[item.name]] = 1
        if item.area < _SMALL_AREA:
            matrix[patches, _LABEL_IDS["smallest"]] = 1
        if item.dot is not None:
            matrix[list(item.dot.patches), _LABEL_IDS[item.dot.colour]] = 1
        x, y = item.centre
        matrix[int(y // PATCH) * GRID + int(x // PATCH), _CENTRE] = 1
    free = [patch for patch in range(VISION_TOKENS) if patch not in shown]
    matrix[free, _LABEL_IDS[layout.place]] = 1
    matrix[torch.arange(VISION_TOKENS), len(OBJECTS) + len(COLOURS) + len(PLACES) + _CELLS] = 1
    return matrix


def is_covered(labels: Tensor) -> Tensor:
    """Whether a patch shows an item, (...): it has a class."""
    return labels[..., : len(OBJECTS)].amax(-1) > 0


def pack_questions(asked: Sequence[Sequence[Question]]) -> Pack:
    """Concatenate `<bos> question answer` of all questions about each scene; each starts at position 0."""
    rows: list[tuple[list[int], ...]] = []
    for questions in asked:
        row: tuple[list[int], ...] = ([], [], [], [], [])
        for number, question in enumerate(questions, start=1):
            prompt = [BOS_ID, *(WORD_IDS[word] for word in question.text.split())]
            answer = WORD_IDS[question.answer]
            length = len(prompt) + 1
            row[0].extend([*prompt, answer])
            row[1].extend(range(length))
            row[2].extend([number] * length)
            row[3].extend([FAMILIES.index(question.family)] * length)
            row[4].extend([IGNORED] * (len(prompt) - 1) + [answer, EOS_ID])
        rows.append(row)
    longest = max(len(row[0]) for row in rows)
    fills = (PAD_ID, 0, 0, 0, IGNORED)
    columns = zip(*rows, strict=True)
    return Pack(
        *(
            torch.tensor([values + [fill] * (longest - len(values)) for values in column])
            for column, fill in zip(columns, fills, strict=True)
        )
    )


def answer_logits(reader: Reader, vision: Tensor, pack: Pack) -> Tensor:
    """Logits of packed questions, (B, T, words): each question attends to all vision tokens and to itself."""
    B, V, _ = vision.shape
    text = reader.language_model.embed_tokens(pack.ids).to(vision.dtype)
    positions = torch.cat([torch.arange(V).expand(B, -1), V + pack.positions], 1)
    segments = F.pad(pack.segments, (V, 0))
    visible = segments[:, :, None] == segments[:, None, :]
    visible[:, :, :V] = True
    hidden = reader.language_model(
        inputs_embeds=torch.cat([vision, text], 1),
        attention_mask=visible.tril()[:, None],
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    return reader.model.lm_head(hidden[:, V:])


def answer_loss(logits: Tensor, pack: Pack) -> Tensor:
    """Cross entropy per answer word, the mean within each family, then over the families of the batch."""
    labelled = pack.targets != IGNORED
    loss = F.cross_entropy(logits[labelled].float(), pack.targets[labelled], reduction="none")
    families = pack.families[labelled]
    return torch.stack([loss[families == family].mean() for family in families.unique()]).mean()


def exact_matches(logits: Tensor, pack: Pack) -> dict[str, list[bool]]:
    """For every family, whether all words of each answer have the highest logit, as in greedy decoding."""
    right = (logits.argmax(-1) == pack.targets) | (pack.targets == IGNORED)
    matches: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    segments, families = pack.segments, pack.families
    for row in range(len(segments)):
        for number in range(1, int(segments[row].max()) + 1):
            own = segments[row] == number
            matches[FAMILIES[int(families[row][own][0])]].append(bool(right[row][own].all()))
    return matches
