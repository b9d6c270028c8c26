"""Scenes of the photo benchmark: the same every time, of unseen photographs in the test, balanced, with evidence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from photo_standins import write_standins

from tpcompress.bundled import base_path
from tpcompress.data.photos import FAMILIES, ONE_PATCH, load_photos, make_row
from tpcompress.data.photos.builder import draw_photos, scene_of
from tpcompress.data.photos.catalogue import CELLS, COUNTS, OBJECTS, PLACES, SIDES, SPLITS, files_of
from tpcompress.data.photos.questions import WORDS, Question, ask, cell_of
from tpcompress.data.photos.scene import GRID, PATCH, SIDE, Dot, Evidence, Item, Layout
from tpcompress.data.photos.store import load_photographs

SCENES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_standins(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def scenes(folder: Path) -> list[tuple[np.ndarray, Layout, list[Question]]]:
    photographs = load_photographs("test", folder)
    return [scene_of(photographs, "test", 0, index) for index in range(SCENES)]


# ------------------------------------------------------------------ photographs


def test_no_photograph_is_in_training_and_test() -> None:
    for name, (train, test) in {**OBJECTS, **PLACES}.items():
        assert files_of(train), name
        assert files_of(test), name
    sides = [
        {path for entry in (*OBJECTS.values(), *PLACES.values()) for path in files_of(entry[side])} for side in (0, 1)
    ]
    assert not sides[0] & sides[1]


def test_a_listing_names_files_by_folder() -> None:
    assert files_of("a/b: x y; c: z") == ["a/b/x", "a/b/y", "c/z"]


def test_validation_shows_the_photographs_of_training_in_other_scenes(folder: Path) -> None:
    loaded = {split: load_photographs(split, folder) for split in SPLITS}
    assert loaded["validation"] is loaded["train"]
    assert loaded["test"] is not loaded["train"]
    pixels = {split: scene_of(loaded[split], split, 0, 0)[0] for split in SPLITS}
    assert not np.array_equal(pixels["validation"], pixels["train"])


def test_without_photographs_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCOMPRESS_PHOTOS", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"scripts/build_photos\.py"):
        load_photos("test", 1)
    with pytest.raises(FileNotFoundError, match=r"scripts/build_photos\.py"):
        base_path("photo_llava")


def test_an_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="train, validation, test"):
        load_photos("dev", 1, folder=folder)


# ------------------------------------------------------------------ scenes


def test_a_scene_is_the_same_every_time(folder: Path, scenes: list) -> None:
    again = scene_of(load_photographs("test", folder), "test", 0, 3)
    assert np.array_equal(again[0], scenes[3][0])
    assert again[1:] == scenes[3][1:]
    rows = load_photos("test", 4, folder=folder)
    assert np.array_equal(np.asarray(rows[3]["images"][0]), scenes[3][0])
    drawn = draw_photos("test", 4, folder=folder)[3]
    assert drawn["conversations"] == rows[3]["conversations"]


def test_seeds_and_scenes_differ(folder: Path) -> None:
    photographs = load_photographs("test", folder)
    rows = [make_row(photographs, "test", seed, index) for seed in (0, 1) for index in (0, 1)]
    assert len({row["images"][0].tobytes() for row in rows}) == 4


def test_items_lie_inside_and_apart(scenes: list) -> None:
    for pixels, layout, _ in scenes:
        assert pixels.shape == (SIDE, SIDE, 3)
        for item in layout.items:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            assert item.patches
        dots = [item.dot.colour for item in layout.items if item.dot is not None]
        assert len(dots) == len(set(dots))


@pytest.mark.parametrize(("dot", "patches"), [((8, 9), 1.0), ((40, 44), 6.0)])
def test_the_size_of_the_evidence_is_a_knob(folder: Path, dot: tuple[float, float], patches: float) -> None:
    photographs = load_photographs("test", folder)
    layouts = [scene_of(photographs, "test", 0, index, Evidence(dot=dot))[1] for index in range(10)]
    found = [len(item.dot.patches) for layout in layouts for item in layout.items if item.dot is not None]
    assert abs(float(np.mean(found)) - patches) < 0.6 * patches


def test_sizes_outside_of_a_scene_are_refused() -> None:
    with pytest.raises(ValueError, match="dot is a range of pixels"):
        Evidence(dot=(2, 5))


# ------------------------------------------------------------------ questions


def test_every_family_is_asked_with_words_that_the_base_knows(scenes: list) -> None:
    asked = [question for _, _, questions in scenes for question in questions]
    assert {question.family for question in asked} == set(FAMILIES)
    assert {word for question in asked for word in (*question.text.split(), question.answer)} <= set(WORDS)
    assert max(Counter((i, q.family) for i, (_, _, qs) in enumerate(scenes) for q in qs).values()) <= 2


def test_answers_are_balanced(scenes: list) -> None:
    """No family is answered by its most frequent answer, least of all `exist`."""
    answers: dict[str, Counter] = {family: Counter() for family in FAMILIES}
    for _, _, questions in scenes:
        for question in questions:
            answers[question.family][question.answer] += 1
    assert answers["exist"]["yes"] == answers["exist"]["no"]
    limits = {"exist": 0.5, "count": 0.45, "relation": 0.45, "scene": 0.4}
    for family, found in answers.items():
        assert max(found.values()) / found.total() <= limits.get(family, 0.35), (family, found)


def layout_of(*items: Item) -> Layout:
    return Layout("sea", items, items[0].name)


def item(name: str, x: int, y: int, side: int = 40, dot: Dot | None = None) -> Item:
    box = (x - side // 2, y - side // 2, x + side // 2, y + side // 2)
    patches = tuple(
        r * GRID + c for r in range(box[1] // PATCH, box[3] // PATCH) for c in range(box[0] // PATCH, box[2] // PATCH)
    )
    return Item(name, box, patches, dot)


def test_answers_by_hand() -> None:
    dot = Dot("red", 112, 200, (231,))
    layout = layout_of(item("bird", 37, 37), item("bird", 187, 37), item("tool", 112, 187, 60, dot))
    found = {(q.family, q.text): q.answer for _ in range(20) for q in ask(layout, Random(_))}
    assert found["scene", "what place"] == "sea"
    assert found["where", "where tool"] == "bottom"
    assert found["cell", "what at top-left"] == "bird"
    assert found["colour", "colour on tool"] == "red"
    assert found["holder", "what under red"] == "tool"
    assert found["dot", "where red"] == "bottom"
    assert found["count", "count bird"] == COUNTS[1]
    assert ("where", "where bird") not in found  # there are two
    assert not any(family == "small" for family, _ in found)  # two are equally small


def test_relations_by_hand() -> None:
    layout = layout_of(item("bird", 37, 112), item("tool", 187, 112), item("tree", 187, 30))
    found = {q.text: q.answer for seed in range(40) for q in ask(layout, Random(seed)) if q.family == "relation"}
    assert found["side of bird from tool"] == "left"
    assert found["side of tool from bird"] == "right"
    assert found["side of tree from tool"] == "above"
    assert found["side of tool from tree"] == "below"
    assert set(found.values()) == set(SIDES)


def test_places_near_a_border_between_cells_are_not_asked_for() -> None:
    questions = ask(layout_of(item("bird", 75, 37)), Random(0))
    assert not {"where", "cell"} & {question.family for question in questions}


def test_cells_are_thirds_row_by_row() -> None:
    assert [CELLS[cell_of(x, y)] for x, y in ((0, 0), (112, 112), (223, 223), (223, 0))] == [
        "top-left", "centre", "bottom-right", "top-right",
    ]  # fmt: skip


# ------------------------------------------------------------------ evidence


def test_evidence_is_what_is_asked_about(scenes: list) -> None:
    for _, layout, questions in scenes:
        patches = {item.name: set(item.patches) for item in layout.items}
        shown = {patch for item in layout.items for patch in item.patches}
        for question in questions:
            evidence, words = set(question.evidence), question.text.split()
            assert evidence <= set(range(GRID * GRID))
            assert bool(evidence) is not (question.family == "exist" and question.answer == "no")
            if question.family == "where":
                assert evidence == patches[words[-1]]
            elif question.family in ("holder", "colour"):
                colour = words[-1] if question.family == "holder" else question.answer
                (held,) = [item for item in layout.items if item.dot is not None and item.dot.colour == colour]
                assert question.evidence == held.dot.patches + held.patches
                assert held.name == (question.answer if question.family == "holder" else words[-1])
            elif question.family == "scene":
                assert not evidence & shown


def test_families_that_need_the_answer_to_find_their_evidence_say_so(scenes: list) -> None:
    leaks = {question.family for _, _, questions in scenes for question in questions if question.leaks}
    assert leaks == {"exist", "cell", "small"}
    assert not leaks & set(ONE_PATCH)


def test_dots_are_of_about_one_patch(scenes: list) -> None:
    sizes = [len(item.dot.patches) for _, layout, _ in scenes for item in layout.items if item.dot is not None]
    assert 1.0 <= float(torch.tensor(sizes).float().mean()) <= 2.5
