"""Every registered pruner gets a time, whatever it needs; what fails says why; nothing here judges seconds."""

from __future__ import annotations

import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from bench import views as pruner_views
from bench.pruners import PrunerBench, Row, above, budget, capture, from_json, to_json
from bench.views import FIELDS, Cell, Sizes, Views

from tpcompress.pruners import Pruner, Selection, TokenView, create, list_pruners
from tpcompress.pruners.base import INSTRUCTION, SYSTEM
from tpcompress.pruners.topk import keep_topk
from tpcompress.pruners.views import VIEWS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bench_pruners.py"
TOY = Sizes(hidden=32, heads=2, mlp=48, tower=24, tower_heads=3, pixels=12, words=12)
CELL = Cell(80, 2)


class Needy(Pruner):
    """Needs what its argument says and keeps the first tokens."""

    name = "needy"

    def __init__(self, words: str = "", layers: int = 1) -> None:
        super().__init__()
        self.words, self.layers = words, layers

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.words.split())

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return tuple(range(self.layers))

    def forward(self, tokens: TokenView, num_keep_B: torch.Tensor) -> Selection:
        scores_BV = torch.zeros_like(tokens.vision_BVD[..., 0])
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


class Broken(Needy):
    """Fails the second time."""

    name = "broken"
    calls = 0

    def forward(self, tokens: TokenView, num_keep_B: torch.Tensor) -> Selection:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("no more\nsecond line")
        return super().forward(tokens, num_keep_B)


class Generous(Needy):
    """Keeps everything."""

    name = "generous"

    def forward(self, tokens: TokenView, num_keep_B: torch.Tensor) -> Selection:
        return Selection(tokens.valid_BV, torch.zeros(tokens.valid_BV.shape))


class Looking(Needy):
    """Reads a device tensor on the host, which no graph can hold."""

    name = "looking"

    def forward(self, tokens: TokenView, num_keep_B: torch.Tensor) -> Selection:
        tokens.valid_BV.sum().item()
        return super().forward(tokens, num_keep_B)


class Withdrawing(Needy):
    """Retains nothing."""

    name = "withdrawing"
    keeps_none = True


def run(names, cells=(CELL,), rounds: int = 1, **more) -> PrunerBench:
    bench = PrunerBench(names, cells, rounds, sizes=TOY, **more)
    assert len(list(bench.run())) <= bench.steps
    return bench


def outside(cls: type[Pruner], **more) -> dict:
    return {"type": f"{__name__}.{cls.__name__}", **more}


@pytest.mark.parametrize("name", list_pruners())
@pytest.mark.parametrize("cell", [Cell(36, 1), CELL])
def test_every_registered_pruner_gets_a_time(name, cell):
    pruner, (row,) = create(name), run([name], [cell]).rows
    if pruner.keeps_none:
        assert row.note
        assert row.ratio is None
    elif pruner.needs <= FIELDS.keys():
        assert row.error == ""
        assert len(row.seconds) == len(row.layer) == 1
        assert row.ratio is not None
    else:
        assert "which this benchmark does not provide" in row.error


def test_fields_are_all_of_a_view_and_words_all_that_models_offer():
    named = {name for names in FIELDS.values() for name in names}
    always = {
        "vision_BVD",
        "valid_BV",
        "row_BV",
        "col_BV",
        "tile_BV",
        "image_BV",
        "canvas",
        "soft",
        "video_BV",
        "pixel_images",
    }
    assert named | always == {field.name for field in fields(TokenView)}
    assert set(FIELDS) == VIEWS.keys() - {"joint"}  # which no model offers


@pytest.mark.parametrize("word", FIELDS)
def test_a_need_fills_its_fields_and_no_other(word):
    view = Views(TOY, CELL).make(Needy(word))
    filled = {name for names in FIELDS.values() for name in names if getattr(view, name) is not None}
    assert filled == set(FIELDS[word])


def test_shapes_of_a_view_are_those_of_the_model():
    view = Views(TOY, CELL).make(Needy(" ".join(FIELDS), layers=3))
    B, V, S, Q, L = 2, 80, 92, 12, 3
    for name, shape in {
        "vision_BVD": (B, V, 32), "text_BSD": (B, S, 32), "keys_BVD": (B, V, 32), "text_values_BSD": (B, S, 32),
        "attention_BHV": (B, 2, V), "attention_prompt_BHQV": (B, 2, Q, V), "input_prompt_BQD": (B, Q, 32),
        "tower_cls_BLHV": (B, L, 3, V), "tower_keys_BLHVD": (B, L, 3, V, 8), "tower_features_BLVD": (B, L, V, 24),
        "projector_BVC": (B, V, 24), "pixels_BVC": (B, V, 12),
    }.items():  # fmt: skip
        assert getattr(view, name).shape == shape, name
    assert view.project(view.projector_BVC).shape == (B, V, 32)
    assert view.canvas == (20, 4)
    assert view.tile_BV[0].tolist() == [tile for tile in range(5) for _ in range(16)]
    assert view.row_BV[1].max() == 19


def test_words_stand_around_the_vision_tokens():
    view = Views(TOY, CELL).make(Needy("text attention_prompt"))
    role, column = view.text_role_BS[0], view.prompt_column_BQ[0]
    assert role.tolist() == [SYSTEM] * 6 + [0] * 80 + [INSTRUCTION] * 6
    assert torch.equal(column, role.nonzero()[:, 0])
    assert torch.equal(view.prompt_role_BQ[0], role[column])
    assert torch.equal(view.text_valid_BS[0], role == INSTRUCTION)


def test_attention_stays_fp32_and_the_rest_has_the_dtype():
    view = Views(TOY, CELL, dtype=torch.bfloat16).make(Needy("attention tower_received keys projector"))
    assert view.keys_BVD.dtype == view.vision_BVD.dtype == view.project(view.projector_BVC).dtype == torch.bfloat16
    for weight in (view.attention_BHV, view.tower_received_BLHV):
        assert weight.dtype == torch.float32
        assert torch.allclose(weight.sum(-1), torch.ones(()))


def test_pruners_share_tensors_until_there_are_too_many(monkeypatch):
    views = Views(TOY, CELL)
    first = views.make(Needy("keys"))
    assert views.make(Needy("keys text")).keys_BVD is first.keys_BVD
    monkeypatch.setattr(pruner_views, "HELD", 0)
    other = views.make(Needy("values"))
    assert other.vision_BVD is first.vision_BVD
    again = views.make(Needy("keys"))
    assert again.keys_BVD is not first.keys_BVD
    assert torch.equal(again.keys_BVD, first.keys_BVD)


def test_what_fails_gets_a_row_and_the_others_go_on():
    names = [
        outside(Needy, words="wishes"), outside(Broken), outside(Generous), outside(Withdrawing),
        outside(Needy, colour=1), "uniform",
    ]  # fmt: skip
    unknown, broken, generous, withdrawing, argument, fine = run(names, rounds=2).rows
    assert unknown.error.startswith("needy needs wishes, which this benchmark does not provide; it provides text, keys")
    assert broken.error == "no more"
    assert generous.error == "generous kept [80, 80] of 80, expected [9, 9]"
    assert (withdrawing.note != "", withdrawing.error, withdrawing.ratio) == (True, "", None)
    assert "colour" in argument.error
    assert fine.error == ""
    assert len(fine.ratios) == 2


def test_an_interrupted_run_keeps_what_it_has():
    bench = PrunerBench(["random", "uniform"], [CELL, Cell(36, 1)], 2, sizes=TOY)
    steps = bench.run()
    for _ in range(6):  # the warm-up, the layer, one pruner, and the next is about to start
        next(steps)
    steps.close()
    assert sorted(len(row.seconds) for row in bench.rows) == [0, 0, 0, 1]


def test_a_layer_of_one_sample_stands_for_a_batch(monkeypatch):
    seen = []
    monkeypatch.setattr("bench.pruners.clock", lambda run, device: run() is not None or 1.0)
    monkeypatch.setattr(
        "bench.pruners.Layer.prefill",
        lambda self, tokens, samples: seen.append(samples) or (lambda: None),
    )
    assert [run(["uniform"], full=full).rows[0].layer for full in (False, True)] == [[2.0], [1.0]]
    assert seen == [1, 2]


def test_rows_go_through_json():
    rows, settings = run(["random", "uniform"], rounds=2).rows, {"dtype": "float32", "full": False}
    assert from_json(to_json(rows, settings)) == (rows, settings)


def test_who_is_above_one_layer():
    rows = [
        Row("quick", 576, 1, 64, [0.5, 0.1, 0.2], [1.0, 1.0, 1.0]),
        Row("slow", 576, 1, 64, [1.5, 3.0, 0.9], [1.0, 2.0, 1.0]),
        Row("slowest", 2880, 8, 320, [7.0], [2.0]),
        Row("failed", 576, 1, 64, [9.0], [1.0], error="no"),
    ]
    assert [row.ratio for row in rows] == [0.2, 1.5, 3.5, None]
    assert [row.pruner for row in above(rows)] == ["slowest", "slow"]
    assert above(rows, 4) == []


@pytest.mark.parametrize(("tokens", "tiles"), [(576, (1, 24)), (2880, (5, 24)), (36, (1, 6)), (8, (2, 2))])
def test_tiles(tokens, tiles):
    assert Cell(tokens, 1).tiles == tiles
    assert Cell(tokens, 1).keep == {576: 64, 2880: 320, 36: 4, 8: 1}[tokens]


def test_what_cannot_be_measured():
    with pytest.raises(
        ValueError, match="Cannot use 577 vision tokens in 1 samples: tokens must divide into equal squares"
    ):
        Cell(577, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        Cell(576, 0)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        PrunerBench(["random"], [CELL], 0)


def script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    size = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TOY).items()]
    monkeypatch.setattr(sys, "argv", ["bench", *size, "--tokens", "36", "80", "--batch", "1", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


def test_the_script_prints_one_table_and_writes_json(monkeypatch, capsys, tmp_path):
    out = tmp_path / "pruners.json"
    assert script(monkeypatch, "--pruners", "random", "uniform", "--rounds", "2", "--json", str(out)) == 0
    text = capsys.readouterr().out
    assert "Time of a selection / time of one decoder layer" in text
    assert "36 > 4, batch 1" in text
    assert "80 > 9, batch 1" in text
    assert "above one layer" in text.lower()
    rows, settings = from_json(out.read_text())
    assert [(row.pruner, row.tokens, len(row.seconds)) for row in rows] == [
        ("random", 36, 2), ("uniform", 36, 2), ("random", 80, 2), ("uniform", 80, 2),
    ]  # fmt: skip
    assert settings["hidden"] == 32


def test_the_script_names_errors_and_unknown_pruners(monkeypatch, capsys):
    assert script(monkeypatch, "--pruners", "uniform", f"{__name__}.Generous", "--rounds", "1") == 1
    assert "generous kept" in capsys.readouterr().out
    assert script(monkeypatch, "--pruners", "unifrom") == 2
    assert "Did you mean uniform?" in capsys.readouterr().err


def test_the_script_shows_what_there_is_when_interrupted(monkeypatch, capsys, tmp_path):
    def stop(self):
        yield "a step"
        self.rows[0].seconds.append(0.5)
        self.rows[0].layer.append(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(PrunerBench, "run", stop)
    out = tmp_path / "pruners.json"
    assert script(monkeypatch, "--pruners", "random", "--json", str(out)) == 0
    text = capsys.readouterr().out
    assert "Interrupted" in text
    assert "0.500 [0.500, 0.500]" in text
    assert "not reached" in text
    assert [len(row.seconds) for row in from_json(out.read_text())[0]] == [1, 0]


@pytest.mark.gpu
def test_a_gpu_measures_in_milliseconds_and_tries_graphs(monkeypatch, capsys):
    names = [outside(Needy, words="keys attention"), outside(Looking), "random"]
    bench = PrunerBench(names, [CELL], 2, "cuda", torch.bfloat16, full=True, sizes=TOY)
    assert len(list(bench.run())) == bench.steps
    plain, looking, _ = bench.rows
    assert [row.error for row in bench.rows] == ["", "", ""]
    assert plain.graph == "yes"
    assert looking.graph.startswith("no: ")
    view = Views(TOY, CELL, "cuda").make(Needy())  # a capture that failed breaks nothing behind it
    assert capture(Needy(), view, budget(CELL, "cuda")) == "yes"
    assert script(monkeypatch, "--device", "cuda", "--rounds", "1", "--pruners", "uniform") == 0
    assert " ms" in capsys.readouterr().out
