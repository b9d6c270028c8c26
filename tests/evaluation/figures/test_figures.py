import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image
from support import family_folder

import tpcompress as tp
from tpcompress.evaluation.compare.accuracy_figure import accuracy_figure
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.figures.contact_sheet import EDGE, contact_sheet
from tpcompress.evaluation.figures.retained import Retained, retained_figure, retained_masks
from tpcompress.models import load_base, load_processor


def row(arm, pruner=None, keep=None, score=0.5, **more) -> Row:
    fields = {"retained_tokens": keep or 64, "ci95": 0.02, "families": {"a": score}, "learnt": ["a"]}
    return Row(arm, pruner, keep, score=score, **(fields | more))


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 2
        return image.size


@pytest.mark.parametrize("budgets", [(16,), (4, 16, 32)])
def test_accuracy_is_drawn_for_one_and_several_budgets(tmp_path, budgets):
    rows = [row("dense", score=0.9), row("dense_ft", score=0.91)]
    for keep in budgets:
        rows += [row("training_free", name, keep, 0.01 * keep + 0.2) for name in ("dart", "pool")]
        rows += [row("training_aware", "pool", keep, 0.02 * keep + 0.2, seed=seed) for seed in (0, 1)]
        rows += [row("dense_ft", "pool", keep, 0.3), row("training_aware", "dart", keep, 0.4, control_score=0.3)]
    accuracy_figure(Report(rows, None, {"blind": {"a": 0.1}}), tmp_path / "new" / "accuracy.png")
    assert min(size_of(tmp_path / "new" / "accuracy.png")) > 500


def test_half_finished_reports_are_drawn(tmp_path):
    for number, rows in enumerate([[row("dense")], [row("training_free", "pool", 4)], [row("dense_ft", "pool", 4)]]):
        accuracy_figure(Report(rows), tmp_path / f"{number}.png")
        size_of(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        accuracy_figure(Report(), tmp_path / "none.png")


@pytest.mark.parametrize("pruner", ["divprune", "fastv", "uniform"])
def test_masks_are_those_of_the_trace(vqa, processor, rows, pruner):
    tp.attach(vqa, tp.PruningPlan([tp.Stage(pruner, layer=1, keep_tokens=9)]))
    samples = retained_masks(vqa.train(), processor, rows.select(range(3)))
    assert vqa.training
    assert [sample.keep.shape for sample in samples] == [(8, 8)] * 3
    assert [sample.keep.sum() for sample in samples] == [9] * 3
    assert all(sample.cells is None for sample in samples)
    assert samples[0].question == rows[0]["conversations"][0][0]["content"]
    small = np.asarray(rows[0]["images"][0].resize((32, 32), Image.Resampling.BICUBIC)) / 255
    assert np.abs(samples[0].image - small).mean() < 0.02


def test_cells_of_a_merging_pruner_hold_one_retained_token_each(vqa, processor, rows):
    tp.attach(vqa, tp.PruningPlan([tp.Stage("pool", keep_tokens=16)]))
    (sample,) = retained_masks(vqa, processor, rows.select(range(1)))
    cells = sample.cells
    assert np.bincount(cells.ravel()).tolist() == [4] * 16
    assert sorted(cells[sample.keep].tolist()) == list(range(16))
    assert (cells[0::2, 0::2] == cells[1::2, 1::2]).all()


@pytest.mark.parametrize(
    ("family", "images"),
    [
        ("llava", 2),
        pytest.param("internvl", 1, marks=pytest.mark.slow),
        pytest.param("smolvlm", 1, marks=pytest.mark.slow),
    ],
)
def test_cells_of_tiles_and_of_several_images_stay_in_their_own(family, images, tmp_path):
    folder = str(family_folder(family))
    model = tp.attach(load_base(folder).eval(), tp.PruningPlan([tp.Stage("pool", keep_ratio=0.25)]))
    shown = [Image.effect_noise((120 + 40 * n, 60), 80).convert("RGB") for n in range(images)]
    talk = [{"role": "user", "content": "<image>\n" * images + "what ?"}, {"role": "assistant", "content": "a"}]
    rows = [{"images": shown, "conversations": [talk], "families": ["chat"]}]
    (sample,) = retained_masks(model, load_processor(folder), rows)
    parts = [sample, *([sample.overview] if sample.overview else [])]
    assert (family != "llava") == (sample.overview is not None)
    for part in parts:
        assert part.cells.shape == part.keep.shape
        assert len(set(part.cells.ravel())) == part.keep.sum(), "one cell for each retained token"
        assert len(set(part.cells[part.keep])) == part.keep.sum(), "each in a cell of its own"
    contact_sheet({"budget": {"pool": [sample]}}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        yellow = np.abs(np.asarray(sheet.convert("RGB")).astype(int) - 255 * EDGE).max(-1) < 3
    assert yellow.any()


def test_retained_tokens_are_drawn_side_by_side(tmp_path):
    image, keep = np.random.default_rng(0).random((32, 32, 3)), np.eye(8, dtype=bool)
    cells = np.arange(64).reshape(8, 8) // 8
    samples = {"one": [Retained(image, keep, question="why ?")] * 2, "two": [Retained(image, keep, cells)] * 2}
    retained_figure(samples, tmp_path / "retained.png")
    assert size_of(tmp_path / "retained.png")[0] > 700
    for wrong in ({}, {"one": []}, {"one": samples["one"], "two": samples["two"][:1]}):
        with pytest.raises(ValueError, match="Every pruner needs the same images"):
            retained_figure(wrong, tmp_path / "retained.png")


def test_a_model_without_plan_or_image_is_refused(vqa, processor, rows):
    with pytest.raises(ValueError, match="No plan is attached"):
        retained_masks(vqa, processor, rows.select(range(1)))
    tp.attach(vqa, tp.PruningPlan([tp.Stage("pool", keep_tokens=16)]))
    with tp.mode(vqa, "off"), pytest.raises(ValueError, match="Row 0 was not pruned"):
        retained_masks(vqa, processor, rows.select(range(1)))


def test_nothing_global_changes(tmp_path):
    before = dict(matplotlib.rcParams)
    accuracy_figure(Report([row("dense"), row("training_free", "pool", 4)]), tmp_path / "a.png")
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
