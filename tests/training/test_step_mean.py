"""The gradient of an optimizer step is that of one large batch, however its answers are spread over batches."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from tpcompress.training.passes import Pass
from tpcompress.training.step_mean import check_average

ANSWERS = ("a cat", "a woman in a space suit", "a", "a cup of coffee, a man with a camera, a cat")
KL = {"teacher": "FrozenCopy", "losses": ["Label", {"class_path": "KL", "init_args": {"weight": 3.0}}]}
CASES = {
    "label": {},
    "label and KL, per sample": {**KL, "average_over": "samples", "train": ["language_model"]},
    "KL": {**KL, "losses": ["KL"], "lora": {"r": 4, "init_lora_weights": False}, "train": []},
    "hidden, packed": {**KL, "losses": ["Hidden", "JSD"], "train": ["projector", "language_model"]},
    "label, at full length": {
        "plan": {"pruner": {"type": "learned_gate", "applier": "gather_value"}, "keep_tokens": 9},
        "pruner_phase": {"steps": 1},
    },
}


class Gradients(Callback):
    """Keeps the gradients that the first optimizer step has read."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.found: dict[str, torch.Tensor] = {}
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.keep(pl_module))

    def keep(self, module) -> None:
        grads = {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}
        self.found = self.found or {name: grad.clone() for name, grad in grads.items()}


@pytest.fixture
def rows(work):
    """Four records with answers of different lengths."""
    names = ("astronaut", "chelsea", "coffee", "camera")
    turns = [[{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": a}] for a in ANSWERS]
    found = [{"id": n, "image": f"{names[n]}.jpg", "conversations": turn} for n, turn in enumerate(turns)]
    path = work.folder / "rows.json"
    path.write_text(json.dumps(found))
    return str(path)


def first_gradients(work, name: str, rows: str, model, batches: int, **trainer) -> dict[str, torch.Tensor]:
    settings = {"max_steps": 1, "accumulate_grad_batches": batches, "gradient_clip_val": None} | trainer
    settings["callbacks"] = [{"class_path": "training.test_step_mean.Gradients"}]
    run = work.fit(
        name, model=model, data={"train": rows, "batch_size": 4 // batches}, diagnostics={"every": 0}, trainer=settings
    )
    return next(c for c in run.trainer.callbacks if type(c).__name__ == "Gradients").found


@pytest.mark.parametrize(
    ("case", "trainer"),
    [
        ("label", {}),
        pytest.param("label", {"gradient_clip_val": 0.05}, marks=pytest.mark.slow),
        ("label and KL, per sample", {}),
        *(pytest.param(case, {}, marks=pytest.mark.slow) for case in list(CASES)[2:]),
    ],
)
def test_accumulated_batches_have_the_gradient_of_one_large_batch(work, rows, case, trainer):
    whole = first_gradients(work, "whole", rows, CASES[case], 1, **trainer)
    parts = first_gradients(work, "parts", rows, CASES[case], 4, **trainer)
    assert parts.keys() == whole.keys() != set()
    one, other = (torch.cat([x.flatten() for x in grads.values()]) for grads in (whole, parts))
    assert float(torch.cosine_similarity(one, other, dim=0)) > 1 - 1e-5
    assert float(other.norm()) == pytest.approx(float(one.norm()), rel=1e-4)
    if trainer:
        assert float(one.norm()) == pytest.approx(0.05, rel=1e-3)


def test_the_mean_over_samples_averages_each_sample_first():
    value_A, sample_A = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 0, 2])
    here = Pass(torch.zeros(3, 5), None, torch.zeros(3, dtype=torch.long), sample_A, num_samples=4)
    assert float(here.answer_mean(value_A)) == 4.0
    here.per_sample = True
    assert float(here.answer_mean(value_A)) == 5.0
    assert int(here.num_answered()) == 2


def test_another_word_for_the_mean_is_refused():
    with pytest.raises(ValueError, match=r"^average_over is tokens or samples, got 'rows'.$"):
        check_average("rows")
