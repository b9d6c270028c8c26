"""The pieces of the cut, on sequences small enough to write out."""

from __future__ import annotations

import pytest
import torch

from tpcompress.families import ImageTokens
from tpcompress.insertion.call import last_prompt_token
from tpcompress.insertion.sequence import Frame, get_tokens, locate, put_tokens, take, take_square

CPU = torch.device("cpu")
V = True
o = False


def test_locate_images_and_prompts() -> None:
    place = torch.tensor([[o, V, V, V, V, o, V, V, o], [o, o, o, V, V, o, o, o, o], [o] * 9])
    images = ImageTokens([4, 2, 2], [(2, 2), (1, 2), (1, 2)])
    rows = locate(place, images, "image")
    assert rows.owner == [0, 0, 1]
    assert rows.total == rows.count == [4, 2, 2]
    assert rows.index_RV.tolist()[0] == [1, 2, 3, 4]
    assert rows.index_RV.tolist()[1][:2] == [6, 7]
    assert rows.index_RV.tolist()[2][:2] == [3, 4]
    assert rows.valid_RV.tolist() == [[V] * 4, [V, V, o, o], [V, V, o, o]]
    assert rows.canvas == (2, 2)
    whole = locate(place, images, "prompt")
    assert whole.owner == [0, 1]
    assert whole.total == [6, 2]
    assert whole.index_RV.tolist()[0] == [1, 2, 3, 4, 6, 7]
    assert whole.canvas == (3, 2), "grids of one width stand on top of each other"
    odd = locate(place, ImageTokens([4, 2, 2], [(4, 1), (1, 2), (1, 2)]), "prompt")
    assert odd.canvas == (1, 6), "grids of different width form one run"


def test_more_tokens_than_positions() -> None:
    with pytest.raises(ValueError, match="2 images bring 8 vision tokens, but the batch has only 4 positions"):
        locate(torch.ones(1, 4, dtype=torch.bool), ImageTokens([4, 4], [(2, 2)] * 2), "image")


def test_retain_and_retained() -> None:
    rows = locate(torch.tensor([[V, V, V, o, V]]), ImageTokens([3, 1], [(1, 3), (1, 1)]), "image")
    kept = rows.retain(torch.tensor([[V, o, V], [V, o, o]]), [2, 1])
    assert kept.count == [2, 1]
    assert kept.total == [3, 1]
    assert kept.index_RV[0].tolist() == [0, 2]
    assert kept.token_RV[0].tolist() == [0, 2]
    assert kept.retained_RV().tolist() == [[V, o, V], [V, o, o]]


def test_cut_right_aligns_and_keeps_order() -> None:
    place = torch.tensor([[o, V, V, V, o, o], [o, o, V, V, V, o]])
    rows = locate(place, ImageTokens([3, 3], [(1, 3)] * 2), "image")
    frame, local = Frame.full(2, 6, CPU).cut(rows, torch.tensor([[o, V, o], [V, o, V]]), [1, 2], hide=False)
    assert local is not None
    assert frame.lengths == [4, 5]
    assert frame.width == 5
    assert frame.present_BN is not None
    assert frame.index_BN[0][frame.present_BN[0]].tolist() == [0, 2, 4, 5]
    assert frame.present_BN.tolist() == [[o, V, V, V, V], [V] * 5]
    assert frame.index_BN[1].tolist() == [0, 1, 2, 4, 5]
    assert frame.lost == [2, 1]
    compact = frame.index_BN - frame.shift_BN
    assert compact[0][1:].tolist() == [0, 1, 2, 3]
    assert compact[1].tolist() == [0, 1, 2, 3, 4]
    labels = torch.tensor([[-100, -100, -100, -100, 8, 9], [-100] * 5 + [7]])
    assert frame.labels(labels).tolist() == [[-100, -100, -100, 8, 9], [-100] * 4 + [7]]
    hidden, none = Frame.full(2, 6, CPU).cut(rows, torch.tensor([[o, V, o], [V, o, V]]), [1, 2], hide=True)
    assert none is None
    assert hidden.present_BN.tolist() == [[V, o, V, o, V, V], [V, V, V, o, V, V]]
    assert hidden.width == 6


def test_cut_makes_room_of_padding() -> None:
    place = torch.tensor([[V, V, V, V, o], [o, o, o, o, o]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    rows = locate(place, ImageTokens([4], [(2, 2)]), "image")
    frame, _ = Frame.full(2, 5, CPU, mask).cut(rows, torch.tensor([[V, o, o, V]]), [2], hide=False)
    assert frame.lengths == [3, 2]
    assert frame.index_BN[:, -2:].tolist() == [[3, 4], [3, 4]]
    assert frame.padding(mask).tolist() == [[V, V, V], [o, V, V]]


def test_take_broadcasts_and_finds_the_batch() -> None:
    index = torch.tensor([[0, 2], [1, 2]])
    one = torch.arange(3)[None]
    assert take(one, index, -1).tolist() == [[0, 2], [1, 2]]
    rows = torch.arange(18).view(3, 2, 3)  # three position rows, as in M-RoPE
    assert take(rows, index, -1).tolist() == [[[0, 2], [4, 5]], [[6, 8], [10, 11]], [[12, 14], [16, 17]]]
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(take(hidden, index, 1)[1], hidden[1, [1, 2]])
    square = torch.arange(9).view(1, 1, 3, 3)
    assert take_square(square, index)[1, 0].tolist() == [[4, 5], [7, 8]]


def test_put_and_get_tokens() -> None:
    hidden = torch.zeros(2, 3, 1)
    cells = torch.tensor([[1, 2], [3, 3]])
    valid = torch.tensor([[V, V], [V, o]])
    out = put_tokens(hidden, cells, valid, torch.tensor([[[1.0], [2.0]], [[3.0], [9.0]]]), ragged=True)
    assert out.flatten().tolist() == [0, 1, 2, 3, 0, 0]
    assert hidden.abs().sum() == 0, "the caller's tensor stays"
    assert get_tokens(out, cells).flatten().tolist() == [1, 2, 3, 3]


def test_last_prompt_token() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100] * 5, [4, 4, 4, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert last_prompt_token(labels, mask, 3, 5, CPU).tolist() == [1, 2, 0]
    assert last_prompt_token(None, mask, 3, 5, CPU).tolist() == [4, 2, 4]
    assert last_prompt_token(None, None, 3, 5, CPU).tolist() == [4, 4, 4]
