"""The curve of an export is what the loaded folder scores, and an interrupted one goes on."""

import json

import pytest
import torch
from training.helpers import Workplace, save_base, save_chat

import tpcompress as tp
from tpcompress.cli.main import main
from tpcompress.evaluation import budget_curve
from tpcompress.evaluation.budget_curve import read_budgets
from tpcompress.evaluation.scoring.evaluate import evaluate
from tpcompress.export import verify
from tpcompress.export.budgets import CurvePoint
from tpcompress.training.datamodules.chat import ChatData

DRAWN = {"class_path": "RandomBudget", "init_args": {"low": 0.5, "high": 2.0}}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run of one step at 8 to 32 of the vision tokens, with rows to validate on."""
    base, chat = save_base(tmp_path_factory.mktemp("base")), save_chat(tmp_path_factory.mktemp("chat"))
    work = Workplace(base, chat, tmp_path_factory.mktemp("runs"))
    work.fit(data={"val_fraction": 0.4}, model={"schedule": DRAWN}, trainer={"max_steps": 1}, diagnostics={"every": 0})
    return work


@pytest.fixture
def export(work, tmp_path, capsys):
    """Export the run with a curve; what was said and the exit code."""
    for cached in (work.folder / "run").glob("budget_curve*"):
        cached.unlink()

    def run(budgets, *more, ckpt=True):
        source = ["--ckpt", str(work.folder / "run")] if ckpt else []
        code = main(["export", str(tmp_path / "out"), *source, "--budgets", budgets, *more])
        return code, " ".join(" ".join(capsys.readouterr()).split())

    return run


def points_of(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    return [CurvePoint(**point) for point in manifest["budget_curve"]]


def test_the_curve_is_what_the_export_scores(export, work, tmp_path):
    code, said = export("4,16,0.99")
    assert code == 0, said
    points = points_of(tmp_path / "out")
    assert [(p.budget, p.trained) for p in points] == [
        ("4 tokens", False),
        ("16 tokens", True),
        ("0.99 of the tokens", False),
    ]
    assert [p.retained for p in points[:2]] == [4, 16]
    assert points[2].retained > 32
    assert f"16 tokens: {100 * points[1].accuracy:.1f} %" in said
    data = ChatData(str(work.chat / "chat.json"), image_folder=str(work.chat / "images"), val_fraction=0.4)
    rows = list(data.load_rows()[1])
    model, processor = tp.load(tmp_path / "out", keep_tokens=4), tp.load_processor(tmp_path / "out")
    scores = evaluate(model, processor, rows, batch_size=2)
    assert points[0].questions == int(scores.count_IF.sum()) > 0
    assert points[0].accuracy == pytest.approx(scores.score)
    assert points[0].loss == pytest.approx(-scores.overall("log_likelihood"), rel=1e-5)
    assert abs(points[0].loss - points[2].loss) > 1e-4  # or the budgets did nothing
    card = (tmp_path / "out/README.md").read_text()
    assert "| 4 tokens * | 4.0 | " in card
    assert "| 16 tokens | 16.0 | " in card
    assert verify(tmp_path / "out").ok


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(export, work, tmp_path, monkeypatch):
    asked, once = [], budget_curve._point

    def point(model, processor, questions, values, *rest):
        asked.append(values[0].keep_tokens)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return once(model, processor, questions, values, *rest)

    monkeypatch.setattr(budget_curve, "_point", point)
    code, said = export("4,16,32")
    assert code == 130, said
    assert "Interrupted with 1 of 3 budgets measured; run the same command to resume." in said
    assert list(tmp_path.iterdir()) == []
    assert export("4,16,32")[0] == 0
    assert asked == [4, 16, 16, 32]
    assert [p.budget for p in points_of(tmp_path / "out")] == ["4 tokens", "16 tokens", "32 tokens"]
    assert export("4,32", "--overwrite", "true")[0] == 0
    assert asked == [4, 16, 16, 32]
    saved = work.saved()
    name = next(name for name, value in saved["state_dict"].items() if value.ndim == 2)
    unprobed = saved["tpcompress"] | {"probe": {"reason": "changed by the test"}}
    changed = {
        **saved,
        "tpcompress": unprobed,
        "state_dict": {**saved["state_dict"], name: saved["state_dict"][name] * 1.5},
    }
    torch.save(changed, work.last())  # another model, so nothing of the above holds
    assert export("4", "--overwrite", "true")[0] == 0
    torch.save(saved, work.last())
    assert asked == [4, 16, 16, 32, 4]


def test_what_cannot_be_measured(export, work, tmp_path):
    for text in ("x", "4,", "1.5", "4,4", "-1"):
        code, said = export(text)
        assert code == 2
        assert "error: budgets: '" in said
    code, said = export("4/2")
    assert code == 2
    assert "The plan has 1 stage, got 2 budgets" in said
    plan = tmp_path / "plan.yaml"
    plan.write_text("{pruner: uniform, keep_tokens: 16}")
    code, said = export("4", "--base", str(work.base), "--plan", str(plan), ckpt=False)
    assert code == 2
    assert "there is no recipe.yaml; leave --budgets out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    saved, changed = work.saved(), work.saved()
    changed["tpcompress"]["recipe"]["data"]["init_args"]["val_fraction"] = 0.0
    torch.save(changed, work.last())
    code, said = export("4")
    torch.save(saved, work.last())
    assert code == 2
    assert "no rows to validate on; set data val or val_fraction, or leave --budgets out" in said


def test_the_bundled_base_is_asked_the_benchmark(export, tmp_path, monkeypatch):
    monkeypatch.setattr(budget_curve, "IMAGES", 12)
    plan = tmp_path / "plan.yaml"
    plan.write_text("{pruner: uniform, keep_tokens: 16}")
    assert export("0.25,9", "--base", "tiny_llava", "--plan", str(plan), ckpt=False)[0] == 0
    points = points_of(tmp_path / "out")
    assert [(p.retained, p.images, p.trained) for p in points] == [(36, 12, None), (9, 12, None)]
    assert all(p.data.startswith("the built-in benchmark") and p.accuracy > 0.1 for p in points)


def test_budgets_are_read_stage_by_stage():
    tokens, ratio = tp.Budget(keep_tokens=16), tp.Budget(keep_ratio=0.1)
    assert read_budgets("16, 0.1") == [[tokens], [ratio]]
    assert read_budgets("16/0.1") == [[tokens, ratio]]
    with pytest.raises(ValueError, match="budgets: '8,8' names one twice; leave it out"):
        read_budgets("8,8")
