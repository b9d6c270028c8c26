"""Two processes train as one does on the batches of both."""

import pytest
import torch
from training.distributed import STRATEGIES, note, on_ranks
from training.killing import fit, in_process

GATE = {"pruner": {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}, "keep_tokens": 16}
LORA = {"lora": {"r": 4}, "train": ["projector"]}
REST = {"train": ["projector", "language_model"]}
CASES = {
    "full": {"model": REST},
    "LoRA, teacher": {"model": LORA | {"teacher": "AdapterOff", "losses": ["Label", "KL"]}},
    "gate": {"model": REST | {"plan": GATE, "scorer": {"steps": 2}}},
    "fastv": {"model": REST | {"plan": {"pruner": "fastv", "layer": 2, "keep_tokens": 16}, "attention": "eager"}},
}
STEPS = 4


@pytest.fixture
def train(work):
    def run(name: str, case: str, strategy: str | None, *args: str, seconds: int = 120, data=None, **trainer):
        folder = work.folder / f"{name}_notes"
        folder.mkdir(exist_ok=True)
        sections = {key: dict(value) for key, value in CASES[case].items()}
        own = {"max_steps": STEPS, "callbacks": [note(folder)]} | trainer
        own |= {"devices": 2, "strategy": STRATEGIES[strategy]} if strategy else {"accumulate_grad_batches": 2}
        if strategy is None:
            own["callbacks"] = [*own["callbacks"], {"class_path": "training.distributed.AsTwo"}]
        sections["trainer"] = own
        recipe = [
            "--config",
            str(work.recipe(name, data={"batch_size": 1} | (data or {}), **sections)),
            "--traceback",
            *args,
        ]
        said = work.folder / f"{name}.txt"
        if strategy is None:
            codes, words = [in_process(fit, recipe, said, seconds=seconds)], said.read_text()
        else:
            codes, words = on_ranks(recipe, said, seconds)
        assert set(codes) == {0}, f"{codes}: {words}"
        return [torch.load(folder / f"rank{n}.pt", weights_only=False) for n in range(len(codes))]

    return run


def assert_close(ours: dict, theirs: dict, tolerance: float = 2e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(train, case: str, strategy: str) -> None:
    """Ranks agree, and equal one process that takes both ranks' batches for a step.

    Each rank's loss is the mean over its own answer tokens, and ranks count alike however many they have: the mean of
    means, as one process has it that accumulates two batches.
    """
    first, second = train("two", case, strategy)
    (alone,) = train("one", case, None)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    both = [step for pair in zip(first["steps"], second["steps"], strict=True) for step in pair]
    assert [step["rows"] for step in both] == [step["rows"] for step in alone["steps"]]
    assert {step["pictures"] for step in both} == {0, 1}
    assert len({step["answers"] for step in both}) > 1
    assert_close(first["weights"], alone["weights"])


@pytest.mark.parametrize("case", [c if c == "gate" else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(train, case, strategy):
    check(train, case, strategy)
