"""Positions after a cut: unused values are closed up, in plain rows and in rows of M-RoPE."""

from __future__ import annotations

import pytest
import torch
from support import tiny_model
from torch import Tensor

from tpcompress.insertion.shorten.positions import closed_up, rotary

V = True
o = False

PICTURE = torch.tensor([
    [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
    [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
    [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
])[:, None]  # fmt: skip
"""(3, 1, 10): two words, an image of 2 x 3, two words. It spans three positions, so the words go on at 5."""


def close(alive: list[bool], positions: Tensor = PICTURE, real: list[bool] | None = None) -> tuple[Tensor, int]:
    mask = None if real is None else torch.tensor([real])
    moved, lost = closed_up(positions, mask, torch.tensor([alive]))
    return moved[:, 0], int(lost)


def test_nothing_dropped_moves_nothing() -> None:
    moved, lost = close([V] * 10)
    assert torch.equal(moved, PICTURE[:, 0])
    assert lost == 0


def test_a_value_stays_while_any_axis_uses_it() -> None:
    # Of the image only the first and the last column of the first row stay: 2 and 4 are used, 3 is free.
    moved, lost = close([V, V, V, o, V, o, o, o, V, V])
    assert lost == 1
    assert moved[:, [2, 4]].tolist() == [[2, 2], [2, 2], [2, 3]]
    assert moved[:, -2:].tolist() == [[4, 5]] * 3
    # One token alone, in the last column: 2 (time, row) and 4 (column) are used.
    moved, lost = close([V, V, o, o, V, o, o, o, V, V])
    assert lost == 1
    assert moved[:, 4].tolist() == [2, 2, 3]
    # The second row's first token: 2 and 3 are used, 4 is free.
    moved, lost = close([V, V, o, o, o, V, o, o, V, V])
    assert lost == 1
    assert moved[:, 5].tolist() == [2, 3, 2]
    assert moved[:, -1].tolist() == [5] * 3


def test_a_picture_that_is_gone_leaves_no_gap() -> None:
    moved, lost = close([V, V, *[o] * 6, V, V])
    assert lost == 3
    assert moved[:, [0, 1, 8, 9]].tolist() == [[0, 1, 2, 3]] * 3


def test_gaps_of_the_unpruned_model_stay() -> None:
    # Frames of a video two apart in time: 3 is unused, so it is not freed either.
    times = torch.tensor([[0, 2, 4, 5], [0, 2, 2, 5], [0, 2, 2, 5]])[:, None]
    moved, lost = close([V, V, V, V], times)
    assert lost == 0
    moved, lost = close([V, V, o, V], times)
    assert lost == 1
    assert moved[:, [0, 1, 3]].tolist() == [[0, 2, 4]] * 3


def test_padding_neither_uses_nor_frees_a_value() -> None:
    padded = torch.cat([torch.ones(3, 1, 2, dtype=torch.long), PICTURE], 2)
    real = [o, o, *[V] * 10]
    moved, lost = close([V, V, V, V, V, o, V, o, o, o, V, V], padded, real)
    alone, same = close([V, V, V, o, V, o, o, o, V, V])
    assert lost == same == 1
    assert torch.equal(moved[:, 2:], alone)


def test_samples_close_up_apart() -> None:
    alive = torch.tensor([[V, V, V, o, V, o, o, o, V, V], [V, V, *[o] * 6, V, V], [V] * 10])
    moved, lost = closed_up(PICTURE.expand(3, 3, 10), None, alive)
    assert lost.tolist() == [[1], [3], [0]]
    for b in range(3):
        assert torch.equal(moved[:, b], close(alive[b].tolist())[0])


def test_order_is_kept_for_random_cuts() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        positions = torch.randint(0, 12, (3, 1, 9), generator=g)
        alive = torch.rand(1, 9, generator=g) < 0.5
        moved, lost = closed_up(positions, None, alive)
        kept, before = moved[:, alive], positions[:, alive]
        assert torch.equal(kept[..., None] < kept.flatten(), before[..., None] < before.flatten())
        used, still = set(positions.flatten().tolist()), set(before.flatten().tolist())
        freed = used - still
        assert int(lost) == len(freed)
        expected = [value - sum(free < value for free in freed) for value in before.flatten().tolist()]
        assert kept.flatten().tolist() == expected


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "ernie4_5_vl_moe"])
def test_rotary_is_what_the_model_gives_its_layers(family: str) -> None:
    model = tiny_model(family)
    text = model.model.language_model
    seen = []
    hook = text.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    hidden, positions = torch.randn(1, 5, 64), torch.tensor([[3, 4, 7, 8, 12]])
    if family != "llava":
        positions = torch.stack([positions, positions + 1, positions * 2])
    with torch.no_grad():
        text(inputs_embeds=hidden, position_ids=positions, attention_mask=torch.ones(1, 5, dtype=torch.long))
        made = rotary(text, hidden, positions, "full_attention")
        if positions.ndim == 3:
            with_text_row = rotary(text, hidden, torch.cat([positions[:1], positions]), "full_attention")
            assert all(torch.equal(a, b) for a, b in zip(made, with_text_row, strict=True))
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(made, seen[0], strict=True))


def test_kinds_of_layers_may_turn_differently() -> None:
    text = tiny_model("gemma3").model.language_model
    hidden, positions = torch.randn(1, 3, 64), torch.tensor([[0, 5, 90]])
    cos, sliding = (rotary(text, hidden, positions, kind)[0] for kind in ("full_attention", "sliding_attention"))
    assert not torch.allclose(cos, sliding)
