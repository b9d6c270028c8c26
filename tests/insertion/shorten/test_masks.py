"""The caller's own 4-D masks: several questions about one image in one row, none of which sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import PLACEHOLDER, TOKENS
from torch import Tensor

from tpcompress.insertion.attach import attach, mode
from tpcompress.insertion.plan import PruningPlan, Stage

PREFIX, QUESTIONS = 4 + TOKENS + 2, (5, 7, 3)

PLANS = {
    "none": None,
    "stage 0": [Stage("pool", 0, keep_tokens=20)],
    "layer 2": [Stage("divprune", 2, keep_tokens=9)],
    "three": [
        Stage("uniform", 0, keep_tokens=40),
        Stage("divprune", 2, keep_tokens=17),
        Stage("random", 4, keep_tokens=5),
    ],
}


def packed(padding: int = 0, side: str = "right") -> tuple[dict[str, Tensor], Tensor, list[dict[str, Tensor]]]:
    """(row with all questions, its bool mask, the questions one by one)."""
    g = torch.Generator().manual_seed(0)
    words = lambda n: torch.randint(3, 90, (n,), generator=g)  # noqa: E731
    prefix = torch.cat([words(4), torch.full((TOKENS,), PLACEHOLDER), words(2)])
    questions = [words(n) for n in QUESTIONS]
    pixels = torch.randn(1, 3, 32, 32, generator=g)
    block = torch.cat([torch.full((PREFIX,), -1), *[torch.full((n,), i) for i, n in enumerate(QUESTIONS)]])
    ids = torch.cat([prefix, *questions])
    positions = torch.cat([torch.arange(PREFIX), *[torch.arange(n) + PREFIX for n in QUESTIONS]])
    S = len(ids)
    allowed = torch.ones(S, S, dtype=torch.bool).tril() & ((block[:, None] == block) | (block == -1))
    if padding:
        filler = torch.zeros(padding, dtype=torch.long)
        order = (lambda a, b: torch.cat([a, b])) if side == "right" else (lambda a, b: torch.cat([b, a]))
        ids, positions = order(ids, filler), order(positions, filler)
        wide = torch.eye(S + padding, dtype=torch.bool)
        start = 0 if side == "right" else padding
        wide[start : start + S, start : start + S] = allowed
        allowed = wide
    row = {"input_ids": ids[None], "position_ids": positions[None], "pixel_values": pixels}
    alone = []
    for question in questions:
        one = torch.cat([prefix, question])[None]
        alone.append({"input_ids": one, "attention_mask": torch.ones_like(one), "pixel_values": pixels})
    return row, allowed[None, None], alone


def as_float(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("padding", [(0, "right"), (6, "right"), (6, "left")], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_packed_questions_equal_each_alone(
    model: Any, name: str, positions: str, kind: str, padding: tuple[int, str]
) -> None:
    row, allowed, alone = packed(*padding)
    mask = allowed if kind == "bool" else as_float(allowed)
    dropped = 0
    if PLANS[name] is not None:
        attach(model, PruningPlan(PLANS[name], positions=positions))
        dropped = TOKENS - PLANS[name][-1].keep_tokens
    out = model(**row, attention_mask=mask).logits
    assert out.shape[1] == row["input_ids"].shape[1] - dropped
    ends = out.shape[1] - (padding[0] if padding[1] == "right" else 0)
    start = ends - sum(QUESTIONS)
    for question, n in zip(alone, QUESTIONS, strict=True):
        expected = model(**question).logits[:, -n:]
        assert (out[:, start : start + n] - expected).abs().max() < 1e-5
        start += n
    if PLANS[name] is None:
        return
    with mode(model, "mask"):
        hidden = model(**row, attention_mask=mask).logits
    assert hidden.shape[1] == row["input_ids"].shape[1]
    ends = hidden.shape[1] - (padding[0] if padding[1] == "right" else 0)
    real = slice(ends - sum(QUESTIONS), ends)
    short = slice(real.start - dropped, real.stop - dropped)
    assert (hidden[:, real] - out[:, short]).abs().max() < 1e-5
    with mode(model, "off"):
        plain = model(**row, attention_mask=mask).logits
    assert (plain[:, real] - hidden[:, real]).abs().max() > 0.05, "control: pruning must change the logits"


@pytest.mark.parametrize("name", ["stage 0", "layer 2", "three"])
@torch.no_grad()
def test_ragged_batch_of_packed_rows(model: Any, name: str) -> None:
    """Two images in one row, one in the other: fillers appear, and no token attends to them."""
    row, allowed, _ = packed()
    S = row["input_ids"].shape[1]
    extra = torch.full((1, TOKENS), PLACEHOLDER)
    two_ids = torch.cat([row["input_ids"][:, :4], extra, row["input_ids"][:, 4:]], 1)
    two_positions = torch.cat([torch.arange(4 + TOKENS)[None], row["position_ids"][:, 4:] + TOKENS], 1)
    W = S + TOKENS
    two_allowed = torch.ones(W, W, dtype=torch.bool).tril()
    two_allowed[4 + TOKENS :, 4 + TOKENS :] &= allowed[0, 0, 4:, 4:]
    one_allowed = torch.eye(W, dtype=torch.bool)
    one_allowed[TOKENS:, TOKENS:] = allowed[0, 0]
    filler = torch.zeros(1, TOKENS, dtype=torch.long)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    batch = {
        "input_ids": torch.cat([torch.cat([filler, row["input_ids"]], 1), two_ids]),
        "position_ids": torch.cat([torch.cat([filler, row["position_ids"]], 1), two_positions]),
        "pixel_values": pixels,
    }
    attach(model, PruningPlan(PLANS[name]))
    out = model(**batch, attention_mask=torch.stack([one_allowed, two_allowed])[:, None]).logits
    first = model(**row | {"pixel_values": pixels[:1]}, attention_mask=allowed).logits
    given = {"input_ids": two_ids, "position_ids": two_positions, "pixel_values": pixels[1:]}
    second = model(**given, attention_mask=two_allowed[None, None]).logits
    n = sum(QUESTIONS)
    assert (out[0, -n:] - first[0, -n:]).abs().max() < 1e-5
    assert (out[1, -n:] - second[0, -n:]).abs().max() < 1e-5


@torch.no_grad()
def test_eager_takes_the_same_masks(model: Any, eager_model: Any) -> None:
    row, allowed, _ = packed()
    attach(model, PruningPlan(PLANS["three"]))
    attach(eager_model, PruningPlan(PLANS["three"]))
    out = model(**row, attention_mask=allowed).logits
    assert (eager_model(**row, attention_mask=as_float(allowed)).logits - out).abs().max() < 1e-5
