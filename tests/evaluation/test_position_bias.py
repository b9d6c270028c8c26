"""The uniformity index against its formula, maps against what was retained, and where a comparison writes them."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tpcompress import PruningPlan, Stage, attach, detach, record
from tpcompress.data import ChatCollator
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.evaluation.figures.position_bias import bias_figure
from tpcompress.evaluation.position_bias import PositionBias, RetentionMap, position_bias, uniformity
from tpcompress.evaluation.scoring.evaluate import evaluate
from tpcompress.families.layout import Grid, Layout, plain
from tpcompress.insertion.trace import StageTrace, Trace


def at_random(images: int, places: int, keep: int, seed: int = 0) -> np.ndarray:
    order = np.random.default_rng(seed).random((images, places)).argsort(1)
    return (order < keep).astype(float)


def by_loops(kept: np.ndarray) -> float:
    """The index of the docstring, one image and one place at a time."""
    images, places = len(kept), len(kept[0])
    budget, excess = float(np.mean(kept)), 0.0
    for i in range(images):
        others = [float(np.mean([kept[j][c] for j in range(images) if j != i])) for c in range(places)]
        for c in range(places):
            excess += np.sign(round(others[c] - sum(others) / places, 9)) * (kept[i][c] - float(np.mean(kept[i])))
    return 1 - excess / images / (2 * places * budget * (1 - budget))


def trace_of(kept: torch.Tensor, layouts: list[tuple[Layout, ...]], owner: list[int], stage: int = 0) -> Trace:
    total, counts = [kept.shape[1]] * len(kept), kept.sum(1).tolist()
    return Trace([StageTrace(stage, stage, total, total, counts, 0, 0, kept, owner, layouts)])


def test_the_index_is_its_formula():
    kept = at_random(9, 12, 4)
    kept[:, :2] = 1  # some places are favourites
    assert uniformity(kept).value == pytest.approx(by_loops(kept), abs=1e-9)
    assert uniformity(kept * 0.5).value == pytest.approx(by_loops(kept * 0.5), abs=1e-9)


def test_always_the_same_places_are_zero_and_chance_is_one_at_any_number_of_images():
    same = np.tile(at_random(1, 144, 16), (40, 1))
    assert uniformity(same) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))
    for images in (5, 40, 640):
        draws = [uniformity(at_random(images, 144, 16, seed)) for seed in range(20)]
        assert np.mean([value for value, _ in draws]) > 0.95, images
    assert uniformity(at_random(640, 144, 16)).value > 0.97


def test_half_the_picture_is_in_between_and_the_interval_shrinks_with_images():
    kept = np.zeros((400, 144))
    kept[:, :72] = at_random(400, 72, 16)
    value, ci95 = uniformity(kept)
    expected = 1 - 0.5 / (1 - 16 / 144)  # half of the tokens would have to move
    assert value == pytest.approx(expected, abs=0.02)
    assert ci95 >= 0
    mixed = kept.copy()
    mixed[::2] = at_random(200, 144, 16)
    assert value < uniformity(mixed).value < 1
    assert uniformity(mixed[:100]).ci95 > uniformity(mixed).ci95 > 0


@pytest.mark.parametrize("kept", [np.ones((4, 6)), np.zeros((4, 6)), at_random(1, 6, 2), np.zeros((0, 6))])
def test_nothing_can_be_said_where_all_or_nothing_is_kept_or_of_one_image(kept):
    assert all(math.isnan(number) for number in uniformity(kept))


def test_maps_are_what_was_retained():
    kept = torch.tensor(at_random(3, 12, 5), dtype=torch.bool)
    bias = PositionBias()
    bias.add(trace_of(kept[:2], [(plain(3, 4),)] * 2, [0, 1]))
    bias.add(trace_of(kept[2:], [(plain(3, 4),)], [0]))
    (one,) = bias.maps()
    assert one.num_images == 3
    np.testing.assert_allclose(one.frequency, kept.float().mean(0).reshape(3, 4), atol=1e-6)


def test_questions_about_one_image_are_averaged():
    kept = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    bias = PositionBias()
    bias.add(trace_of(kept, [(plain(2, 2),)] * 3, [0, 1, 2]), images=[7, 7, 3])
    (one,) = bias.maps()
    assert one.num_images == 2
    np.testing.assert_allclose(one.frequency, [[0.25, 0.25], [0, 0.5]])


def test_tiles_are_averaged_and_other_shapes_are_stretched_over_the_same_area():
    layouts = (Layout((Grid(2, 2), Grid(2, 2, newline=True))),)
    tiled = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    bias = PositionBias()
    bias.add(trace_of(tiled, [layouts], [0]))
    fine = torch.zeros(4, 4, dtype=torch.bool)
    fine[:2, 2:] = True
    bias.add(trace_of(fine.reshape(1, 16), [(plain(4, 4),)], [0]))
    odd = torch.tensor([[1, 1, 0]], dtype=torch.bool)
    bias.add(trace_of(odd, [(plain(1, 3),)], [0]))
    (one,) = bias.maps()
    assert one.num_images == 3
    expected = np.array([[0.5, 0], [0, 0.5]]) + np.array([[0, 1], [0, 0]]) + np.array([[1, 1 / 3], [1, 1 / 3]])
    np.testing.assert_allclose(one.frequency, expected / 3, atol=1e-6)


def test_any_model_and_loader_every_stage(vqa, processor, rows):
    attach(vqa, PruningPlan([Stage("divprune", keep_tokens=20), Stage("uniform", 1, keep_tokens=9)]))
    batches = [ChatCollator(processor)(list(rows.select(range(i, i + 3)))) for i in (0, 3)]
    first, second = position_bias(vqa, batches)
    assert (first.stage, first.layer, second.stage, second.layer) == (0, 0, 1, 1)
    assert first.num_images == second.num_images == 6
    assert first.frequency.shape == (8, 8)
    assert first.frequency.sum() == pytest.approx(20, abs=1e-4)
    assert second.frequency.sum() == pytest.approx(9, abs=1e-4)
    detach(vqa)
    with pytest.raises(ValueError, match="No plan is attached"):
        position_bias(vqa, batches)


def test_evaluation_shows_every_batch_and_scores_the_same(vqa, processor, rows):
    attach(vqa, PruningPlan([Stage("divprune", keep_tokens=20)]))
    plain_scores, bias = evaluate(vqa, processor, rows, batch_size=5), PositionBias()
    scores = evaluate(vqa, processor, rows, batch_size=5, watch=lambda trace, meta: bias.add(trace, meta.rows))
    assert (scores.value_IF == plain_scores.value_IF).all()
    (one,) = bias.maps()
    assert one.num_images == len(rows)
    with record(vqa) as trace, torch.no_grad():
        batch = ChatCollator(processor, pack=True)(list(rows))
        batch.pop("meta")
        vqa(**batch)
    np.testing.assert_allclose(one.frequency.ravel(), trace.stages[0].retained_RV.float().mean(0), atol=1e-6)


def test_a_map_survives_its_file(tmp_path):
    bias = PositionBias()
    bias.add(trace_of(torch.tensor(at_random(4, 12, 5), dtype=torch.bool), [(plain(3, 4),)] * 4, [0, 1, 2, 3]))
    (one,) = bias.maps()
    one.save(tmp_path / "deep" / "map.npz")
    again = RetentionMap.load(tmp_path / "deep" / "map.npz")
    np.testing.assert_array_equal(one.frequency, again.frequency)
    assert (one.stage, one.layer, one.num_images, one.places, one.thirds) == (
        again.stage, again.layer, again.num_images, again.places, again.thirds,
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="No retention map"):
        RetentionMap.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="no retention map"):
        bias_figure({}, tmp_path / "none.png")


def test_a_comparison_writes_them_and_a_second_run_draws_them_again(tmp_path):
    values = {"budgets": [16], "num_images": 6, "training_free": ["uniform", "divprune"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    run_comparison(str(tmp_path / "c.yaml"), tmp_path / "out", Console(quiet=True))
    text = (tmp_path / "out" / "report.json").read_text()
    by_pruner = {row["pruner"]: row for row in json.loads(text)["rows"]}
    assert by_pruner[None]["uniformity"] is None
    assert by_pruner["uniform"]["uniformity"] == pytest.approx(0, abs=1e-6)
    assert 0 < by_pruner["divprune"]["uniformity"] <= 1
    assert by_pruner["divprune"]["uniformity_thirds_ci95"] >= 0
    assert "## Where retained tokens lie" in (tmp_path / "out" / "report.md").read_text()
    assert "uniformity_ci95" in (tmp_path / "out" / "report.csv").read_text().splitlines()[0]
    (tmp_path / "out" / "position_bias.png").unlink()
    run_comparison(str(tmp_path / "c.yaml"), tmp_path / "out", Console(quiet=True))
    assert (tmp_path / "out" / "position_bias.png").stat().st_size
    assert len(list((tmp_path / "out" / "position_bias").glob("*.npz"))) == 2
    assert Report.from_json(text).to_json() == text
