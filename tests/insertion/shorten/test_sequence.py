"""The pieces of the cut, on sequences small enough to write out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpcompress.families import Grid, Layout, Tiles
from tpcompress.insertion.call import last_prompt_token
from tpcompress.insertion.shorten.columns import get_tokens, put_tokens, take, take_square
from tpcompress.insertion.shorten.locate import locate
from tpcompress.insertion.shorten.sequence import BudgetRows, Frame

CPU = torch.device("cpu")
V = True
o = False


def image(*grids: tuple[int, int], newline: bool = False, tail: int = 0) -> Layout:
    """Rectangles one after the other; all or none of them with a newline after every row."""
    return Layout(tuple(Grid(rows, cols, newline) for rows, cols in grids), tail)


def locate_images(place: list[list[bool]], layouts: list[Layout], scope: str = "image", **more: Any) -> BudgetRows:
    return locate({"image": torch.tensor(place)}, {"image": layouts}, scope, **more)


def test_locate_images_and_prompts() -> None:
    place = [[o, V, V, V, V, o, V, V, o], [o, o, o, V, V, o, o, o, o], [o] * 9]
    layouts = [image((2, 2)), image((1, 2)), image((1, 2))]
    rows = locate_images(place, layouts)
    assert rows.owner == rows.owner_R.tolist() == [0, 0, 1]
    assert rows.total == rows.count == [4, 2, 2]
    assert rows.layouts == [(layout,) for layout in layouts]
    assert rows.index_RV.tolist()[0] == [1, 2, 3, 4]
    assert rows.index_RV.tolist()[1][:2] == [6, 7]
    assert rows.index_RV.tolist()[2][:2] == [3, 4]
    assert rows.valid_RV.tolist() == [[V] * 4, [V, V, o, o], [V, V, o, o]]
    assert rows.ragged
    assert rows.table_RV4[0].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert rows.canvas == (2, 2)


def test_locate_under_the_scope_of_a_prompt() -> None:
    place = [[o, V, V, V, V, o, V, V, o], [o, o, o, V, V, o, o, o, o], [o] * 9]
    rows = locate_images(place, [image((4, 1)), image((1, 2)), image((1, 2))], "prompt")
    assert rows.owner == [0, 1]
    assert rows.total == [6, 2]
    assert rows.index_RV.tolist()[0] == [1, 2, 3, 4, 6, 7]
    assert rows.table_RV4[0].tolist() == [
        [0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0], [4, 0, 1, 1], [4, 1, 1, 1],
    ], "images of one prompt stand on top of each other and keep their numbers"  # fmt: skip
    assert rows.canvas == (5, 2)


def test_separators_are_no_vision_tokens() -> None:
    place = [[o, *[V] * 11, o]]
    layout = Layout((Grid(1, 2), Grid(2, 3, newline=True)), tail=1)
    assert (layout.count, layout.placeholders, layout.canvas) == (8, 11, (3, 3))
    rows = locate_images(place, [layout])
    # An overview at 1 and 2, a row at 3 to 5, its newline at 6, a row at 7 to 9, its newline at 10, the tail at 11.
    assert rows.index_RV.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9]]
    assert rows.table_RV4[0, :, 2].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert rows.table_RV4[0, :, 0].tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    keep = torch.tensor([[o, o, o, o, V, o, o, o]])
    frame, _ = Frame.full(1, 13, CPU).cut(rows, keep, [1], hide=False)
    assert frame.index_BN.tolist() == [[0, 5, 6, 10, 11, 12]], "separators are never dropped"


def test_neighbouring_tiles_are_one_image_where_a_family_says_so() -> None:
    tiles = [image((2, 1))] * 4
    place = [[o, V, V, V, V, o, V, V], [V, V, o, o, o, o, o, o]]
    joined = locate_images(place, tiles, tiles=Tiles(gap=0))
    assert joined.owner == [0, 0, 1], "not across a gap, and not from one sample into the next"
    assert joined.total == [4, 2, 2]
    assert joined.layouts == [(image((2, 1), (2, 1)),), (image((2, 1)),), (image((2, 1)),)]
    assert joined.table_RV4[0].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 1, 0], [3, 0, 1, 0]]
    apart = locate_images(place, tiles)
    assert apart.total == [2, 2, 2, 2]
    assert apart.owner == [0, 0, 0, 1]


def test_tiles_are_not_joined_across_the_end_of_a_row() -> None:
    place = [[o, o, V, V], [V, V, o, o]]
    assert locate_images(place, [image((1, 2))] * 2, tiles=Tiles(gap=0)).owner == [0, 1]


def test_rectangles_are_images_of_their_own_where_a_family_says_so() -> None:
    """Idefics gives one feature per sample, and text stands between its tiles."""
    place = [[o, V, V, o, V, V], [V, V, o, o, o, o]]
    features = [image((1, 2), (1, 2)), image((1, 2))]
    rows = locate_images(place, features, splits_tiles=True)
    assert rows.owner == [0, 0, 1]
    assert rows.total == [2, 2, 2]
    assert rows.index_RV.tolist() == [[1, 2], [4, 5], [0, 1]]
    assert rows.layouts == [(image((1, 2)),)] * 3
    assert locate_images(place, features, "prompt", splits_tiles=True).table_RV4[0, :, 3].tolist() == [0, 0, 1, 1]
    assert locate_images(place, features).total == [4, 2]


def test_tiles_with_a_token_between_them_are_one_image() -> None:
    """LFM2-VL: start, marker, tile, marker, tile, end; between two images at least an end and a start."""
    place = [[o, o, V, V, o, V, V, o, o, o, V, o], [o, V, V, o, o, o, o, o, o, o, o, o]]
    tiles = [image((1, 2)), image((2, 1)), image((1, 1)), image((1, 2))]
    rows = locate_images(place, tiles, tiles=Tiles(gap=1))
    assert rows.owner == [0, 0, 1]
    assert rows.total == [4, 1, 2]
    assert rows.layouts == [(image((1, 2), (2, 1)),), (image((1, 1)),), (image((1, 2)),)]
    assert rows.index_RV[0].tolist() == [2, 3, 5, 6]
    assert rows.table_RV4[0].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [2, 0, 1, 0]]
    assert locate_images(place, tiles, "tile", tiles=Tiles(gap=1)).total == [2, 2, 1, 2]


@pytest.mark.parametrize("embedded", [False, True])
def test_the_token_before_an_overview_ends_an_image(embedded: bool) -> None:
    """SmolVLM: as many tokens stand between two images without text as between two rows of tiles."""
    #        row1 V  row2 V  over V end over V end row1 V over V
    ids = [[7, 1, 0, 7, 2, 0, 7, 9, 0, 7, 7, 9, 0, 7, 7, 1, 0, 7, 9, 0, 7], [3, 9, 0, 7] + [3] * 17]
    tokens = torch.tensor(ids)
    feature = [image(*[(1, 1)] * 6), image((1, 1))]
    given = torch.nn.functional.one_hot(tokens, 10).float() if embedded else tokens
    more = {"tiles": Tiles(closes=True), "splits_tiles": True, "tokens": given}
    rows = locate_images((tokens == 0).tolist(), feature, **more)
    assert rows.owner == [0, 0, 0, 1]
    assert rows.total == [3, 1, 2, 1]
    assert rows.index_RV[0].tolist() == [2, 5, 8]
    assert locate_images((tokens == 0).tolist(), feature, "tile", **more).total == [1] * 7
    whole = locate_images((tokens == 0).tolist(), feature, "prompt", **more)
    assert whole.total == [6, 1]
    assert whole.table_RV4[0, :, 3].tolist() == [0, 0, 0, 1, 2, 2]
    assert [layout.count for layout in whole.layouts[0]] == [3, 1, 2]


def test_the_scope_of_a_tile_splits_every_layout() -> None:
    """An overview and a tile with newlines, as in LLaVA-NeXT, and the frames of a video."""
    tiled = Layout((Grid(1, 2), Grid(2, 1, newline=True)), tail=1)
    rows = locate_images([[o, *[V] * 7, o]], [tiled], "tile")
    assert rows.total == [2, 2]
    assert rows.index_RV.tolist() == [[1, 2], [3, 5]], "newlines at 4 and 6 and the tail at 7 are no vision tokens"
    video = locate(
        {"video": torch.tensor([[V, V, o, V, V]])}, {"video": [Layout((Grid(1, 2),) * 2, video=True)]}, "tile"
    )
    assert video.total == [2, 2]
    assert all(layout.video for row in video.layouts for layout in row)


def test_frames_of_a_video_are_rectangles() -> None:
    video = Layout((Grid(1, 2),) * 3, video=True)
    place = torch.tensor([[o, V, V, o, V, V, o, V, V, o]])  # a time stamp before every frame
    rows = locate({"video": place}, {"video": [video]}, "image")
    assert rows.index_RV.tolist() == [[1, 2, 4, 5, 7, 8]]
    assert rows.table_RV4[0, :, 2].tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.table_RV4[0, :, 3].tolist() == [0] * 6
    assert rows.canvas == (3, 2)


def test_images_and_videos_of_one_prompt_follow_the_sequence() -> None:
    #         video      image         video
    line = [o, V, V, o, V, V, V, V, o, V, V, o]
    images = torch.tensor([[o, o, o, o, V, V, V, V, o, o, o, o], [o] * 12])
    videos = torch.tensor([line, [V, V, *[o] * 10]]) & ~images
    places = {"image": images, "video": videos}
    clip = Layout((Grid(1, 2),), video=True)
    layouts = {"image": [image((2, 2))], "video": [clip, clip, clip]}
    apart = locate(places, layouts, "image")
    assert apart.owner == [0, 0, 0, 1], "images first, then videos"
    assert apart.total == [4, 2, 2, 2]
    whole = locate(places, layouts, "prompt")
    assert whole.owner == [0, 1]
    assert whole.total == [8, 2]
    assert whole.index_RV.tolist()[0] == [1, 2, 4, 5, 6, 7, 9, 10]
    assert whole.table_RV4[0, :, 3].tolist() == [1, 1, 0, 0, 0, 0, 2, 2], "each token keeps the number of its picture"
    assert whole.index_RV.tolist()[1][:2] == [0, 1]
    assert whole.layouts[0] == (image((2, 2)), clip, clip)


def test_a_sample_without_images_may_bring_an_empty_feature() -> None:
    """Idefics gives every sample a feature."""
    rows = locate_images([[o, V, V], [o, o, o], [V, V, o]], [image((1, 2)), Layout((Grid(0, 2),)), image((1, 2))])
    assert rows.owner == [0, 2]
    assert rows.index_RV.tolist() == [[1, 2], [0, 1]]


def test_retain_and_retained() -> None:
    rows = locate_images([[V, V, V, o, V]], [image((1, 3)), image((1, 1))])
    kept = rows.retain(torch.tensor([[V, o, V], [V, o, o]]), [2, 1])
    assert kept.count == [2, 1]
    assert kept.total == [3, 1]
    assert kept.index_RV[0].tolist() == [0, 2]
    assert kept.token_RV[0].tolist() == [0, 2]
    assert kept.table_RV4[0, :, 1].tolist() == [0, 2], "a token keeps its place on the grid"
    assert kept.retained_RV().tolist() == [[V, o, V], [V, o, o]]


def test_cut_right_aligns_and_keeps_order() -> None:
    rows = locate_images([[o, V, V, V, o, o], [o, o, V, V, V, o]], [image((1, 3))] * 2)
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
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    rows = locate_images([[V, V, V, V, o], [o] * 5], [image((2, 2))])
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
