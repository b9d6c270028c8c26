"""The layer from which vision tokens are not needed: the divergence against masks, the choice, and the command."""

import io
import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from support import batch, tiny_model

from tpcompress import PruningPlan, Stage, attach, detach
from tpcompress.data import PromptCollator
from tpcompress.data.benchmark import load_benchmark
from tpcompress.evaluation import find_layer
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.evaluation.find_layer import calibration_samples, run_find_layer, withdrawals
from tpcompress.evaluation.layer_search import LayerScore, LayerSearch, shown
from tpcompress.families import resolve
from tpcompress.insertion.attach import is_attached
from tpcompress.models import load_processor

OPTIONS = {
    "data": None, "image_folder": None, "num_samples": 6, "threshold": 0.01, "layers": None, "out": None, "seed": 0,
    "dtype": "float32", "device": "cpu",
}  # fmt: skip


def run(model: str = "tiny_llava", **options) -> tuple[LayerSearch, str]:
    console = Console(record=True, width=120, file=io.StringIO())
    search = run_find_layer(model, **(OPTIONS | options), console=console)
    return search, console.export_text()


def search_of(*means: float, threshold: float = 0.01) -> LayerSearch:
    scores = tuple(LayerScore(layer, kl, kl, kl, 1.0) for layer, kl in enumerate(means))
    return LayerSearch(scores, 8, len(means), threshold)


@contextmanager
def hidden_from(model, layer: int, ids: torch.Tensor):
    """No decoder layer from `layer` on can see a placeholder: masks only, nothing is cut."""
    parts = resolve(model)
    seen = (ids[0] != parts.placeholder_ids["image"])[None, :] & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    mask = torch.zeros(seen.shape).masked_fill(~(seen | torch.eye(len(seen)).bool()), torch.finfo(torch.float32).min)

    def hide(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask[None, None]}

    hooks = [one.register_forward_pre_hook(hide, with_kwargs=True) for one in parts.layers[layer:]]
    yield
    for hook in hooks:
        hook.remove()


def test_divergences_are_those_of_a_model_whose_later_layers_see_no_picture(vqa, processor, rows):
    samples = calibration_samples(processor, rows, 5)
    found = list(withdrawals(vqa, samples))
    assert [score.layer for score in found] == [2, 1, 0], "the deepest first"
    for score in found:
        kls, same = [], []
        for sample in samples:
            whole = vqa(**sample).logits[0, -1].detach().double().softmax(-1)
            with hidden_from(vqa, score.layer, sample["input_ids"]):
                less = vqa(**sample).logits[0, -1].detach().double().softmax(-1)
            kls.append(sum(float(p) * math.log(float(p) / float(q)) for p, q in zip(whole, less, strict=True) if p > 0))
            same.append(int(whole.argmax()) == int(less.argmax()))
        assert score.kl == pytest.approx(sum(kls) / 5, rel=1e-3, abs=1e-6)
        assert score.agreement == pytest.approx(sum(same) / 5)
        assert min(kls) - 1e-6 <= score.low <= score.kl <= score.high <= max(kls) + 1e-6
    assert found[-1].kl > 0, "the model looks at its pictures"


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "internvl"])
def test_any_family(family):
    model = tiny_model(family)
    samples = [batch([(4, 1, 5)], seed=seed, family=family) for seed in (0, 1)]
    found = list(withdrawals(model, samples, [1, 3]))
    assert [score.layer for score in found] == [3, 1]
    assert all(score.kl > 0 for score in found)
    assert not is_attached(model)


def test_the_choice_is_the_first_layer_that_stays_under():
    assert search_of(3.0, 0.5, 0.004, 0.001).chosen == 2
    assert search_of(3.0, 0.005, 0.5, 0.001).chosen == 3, "a dip is not the end"
    assert search_of(0.001, 0.001).chosen == 0
    assert search_of(1.0, 0.01).chosen is None, "under, not at"
    assert search_of().chosen is None
    stage = search_of(3.0, 0.004).plan().stages[0]
    assert (stage.pruner.name, stage.layer, stage.keep_tokens) == ("vtw", 1, 0)
    for kl, text in ((0.0102, "0.0102"), (0.01000001, "0.01000001"), (0.00999, "0.00999"), (0.01, "0.01")):
        assert shown(kl, 0.01, 2) == text, "the printed number is on its own side of the threshold"
    with pytest.raises(ValueError, match=r"^No layer stays below 0\.01 nats; the last one has 0\.02: [^\n]*$"):
        search_of(1.0, 0.02).plan()


def test_the_interval_is_of_the_mean_over_samples():
    kl = np.random.default_rng(0).exponential(size=400)
    score = LayerScore.of(3, kl, kl < 1)
    half = 1.96 * kl.std() / 20
    assert score.kl == pytest.approx(kl.mean())
    assert [score.low, score.high] == pytest.approx([kl.mean() - half, kl.mean() + half], abs=0.02)
    assert score.agreement == pytest.approx((kl < 1).mean())


def test_samples_are_the_prompts_that_the_collator_writes():
    processor, rows = load_processor("tiny_llava"), load_benchmark("train", 3)
    for number, sample in enumerate(calibration_samples(processor, rows, 3)):
        row = dict(rows[number])
        one = {name: row[name][number : number + 1] for name in ("conversations", "families")}
        wanted = PromptCollator(processor)([row | one])
        assert torch.equal(sample["input_ids"], wanted["input_ids"])
        assert torch.equal(sample["pixel_values"], wanted["pixel_values"])


def test_the_command_on_the_bundled_base(tmp_path):
    search, text = run(out=str(tmp_path / "deep" / "vtw.yaml"), threshold=100.0)
    assert [score.layer for score in search.scores] == [0, 1]
    assert search.chosen == 0
    assert "chosen" in text
    assert "From layer 0 of 2 on" in text
    written = tmp_path / "deep" / "vtw.yaml"
    assert PruningPlan.of(written).to_dict() == search.plan().to_dict()
    assert written.read_text().startswith("# tiny_llava: all vision tokens are withdrawn before layer 0 of 2")
    again, _ = run(out=str(tmp_path / "vtw.json"), threshold=100.0)
    assert again == search, "the same samples, the same figures"
    assert PruningPlan.of(tmp_path / "vtw.json").to_dict() == search.plan().to_dict()
    with pytest.raises(ValueError, match="uses vision tokens in its last layers"):
        run(out=str(tmp_path / "none.yaml"))
    assert not (tmp_path / "none.yaml").exists()


def test_chat_data_with_rows_that_will_not_do(tmp_path):
    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "a.png")
    good = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    text = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
    rows = [
        {"id": "1", "image": "a.png", "conversations": good},
        {"id": "2", "image": "gone.png", "conversations": good},
        {"id": "3", "conversations": text},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    search, _ = run(data=str(tmp_path / "chat.json"), layers=[1])
    assert (search.num_samples, [score.layer for score in search.scores]) == (1, [1])
    (tmp_path / "text.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(ValueError, match="None of the 2 rows has exactly one readable image"):
        run(data=str(tmp_path / "text.json"))


def test_an_interruption_prints_what_is_known_and_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    models, plain = [], find_layer._next_token

    def interrupted(model, sample, say, what):
        models.append(model)
        if what == "without from 0":
            raise KeyboardInterrupt
        return plain(model, sample, say, what)

    monkeypatch.setattr(find_layer, "_next_token", interrupted)
    console = Console(record=True, width=120, file=io.StringIO())
    with pytest.raises(KeyboardInterrupt, match="Interrupted after 1 of 2 layers"):
        run_find_layer("tiny_llava", **(OPTIONS | {"out": str(tmp_path / "vtw.yaml")}), console=console)
    assert "mean KL" in console.export_text()
    assert not is_attached(models[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "plan.png"}, "not the name of a plan file"),
        ({"num_samples": 0}, "above 0, got 0"),
        ({"threshold": 0.0}, "above 0"),
        ({"layers": [1, 7]}, "No stage can act at layer 7"),
        ({"model": "some/model"}, "requires --data for some/model"),
        ({"data": "nothing.json"}, "No file or folder nothing.json"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^[^\n]*{message}[^\n]*$"):
        run(**options)


def test_a_comparison_scores_what_withdraws(tmp_path):
    free = ["uniform", {"pruner": "vtw", "layer": 1, "budgets": [0]}]
    values = {"budgets": [16, 36], "num_images": 4, "training_free": free}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    report = run_comparison(str(tmp_path / "c.yaml"), tmp_path / "out", Console(quiet=True))
    rows = [(row.pruner, row.keep_tokens, row.retained_tokens) for row in report.arm("training_free")]
    assert rows == [("uniform", 16, 16), ("uniform", 36, 36), ("vtw", 0, 0)]
    (row,) = [row for row in report.rows if row.pruner == "vtw"]
    assert (row.layer, row.layer_average, row.uniformity) == (1, 72, None)
    again = run_comparison(str(tmp_path / "c.yaml"), tmp_path / "out", Console(quiet=True))
    assert again.to_json() == report.to_json()


def test_a_model_with_a_plan_is_no_reference(vqa, processor, rows):
    attach(vqa, PruningPlan([Stage("uniform", keep_tokens=4)]))
    with pytest.raises(ValueError, match="carries a plan"):
        next(withdrawals(vqa, calibration_samples(processor, rows, 1)))
    detach(vqa)
