"""Held-out rows share no image with training rows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tpcompress.data.split import held_out


def rows_with(*images: object) -> list[dict]:
    return [{"images": list(found), "conversations": []} for found in images]


def test_rows_with_the_same_image_stay_together():
    rows = rows_with(*[(f"{index // 5}.png",) for index in range(100)])
    for seed in range(5):
        train, held = held_out(rows, 0.2, seed=seed)
        assert sorted(train + held) == list(range(100))
        assert len(held) == 20
        assert not {rows[i]["images"][0] for i in train} & {rows[i]["images"][0] for i in held}
    assert held_out(rows, 0.2, seed=1) == held_out(rows, 0.2, seed=1) != held_out(rows, 0.2, seed=2)
    assert [len(held_out(rows, count=count)[1]) for count in (5, 12, 40)] == [5, 10, 40]


def test_shared_images_join_rows_over_several_steps():
    rows = rows_with(("a", "b"), ("b", "c"), ("c",), ("d",), ("e",), ())
    for seed in range(8):
        train, held = held_out(rows, 0.5, seed=seed)
        for side in (train, held):
            assert len({0, 1, 2} & set(side)) in (0, 3)


SAME = {
    "bytes": ({"bytes": b"x", "path": "1"}, {"bytes": b"x", "path": "2"}, {"bytes": b"y", "path": "1"}),
    "images": (Image.new("L", (2, 2), 3), Image.new("L", (2, 2), 3), Image.new("L", (2, 2), 4)),
    "dict of a path": ({"bytes": None, "path": "a"}, "a", "b"),
    "frames": (["a", "b"], ["b", "c"], ["d"]),
    "arrays": (np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2, 3))),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("column", ["images", "videos"])
def test_images_are_the_same_by_content_or_path(kind, column):
    rows = [{"images": [], column: [medium]} for medium in SAME[kind]]
    for seed in range(4):
        train, held = held_out(rows, count=1, seed=seed)
        assert (train, held) == ([0, 1], [2])


def test_what_cannot_be_split_is_refused():
    cases = [
        ("at least 2 usable rows, got 1", rows_with(("a",)), {"fraction": 0.5}),
        ("All 3 rows share images", rows_with(("a",), ("a",), ("a",)), {"fraction": 0.5}),
        ("either the fraction or the count", rows_with((), ()), {}),
        ("either the fraction or the count", rows_with((), ()), {"fraction": 0.1, "count": 1}),
    ]
    for message, rows, options in cases:
        with pytest.raises(ValueError, match=message):
            held_out(rows, **options)
