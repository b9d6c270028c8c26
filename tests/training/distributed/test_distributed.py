"""Two processes train as one does on the batches of both."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from training.checkpoints.killing import fit, in_process
from training.distributed.ranks import STRATEGIES, note, on_ranks

from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.checkpoints.read import read_checkpoint
from tpcompress.training.distributed.fsdp2 import FSDP2
from tpcompress.training.recipe.run import RecipeCLI

OVERLAYS = Path(__file__).parents[3] / "recipes/gpus"

GATE = {"pruner": {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}, "keep_tokens": 16}
LORA = {"lora": {"r": 4}, "train": ["projector"]}
REST = {"train": ["projector", "language_model"]}
RANDOM = {"class_path": "RandomBudget", "init_args": {"low": 0.5, "high": 3.0}}
CASES = {
    "full": {"model": REST},
    "LoRA, teacher": {"model": LORA | {"teacher": "AdapterOff", "losses": ["Label", "KL"]}},
    "gate": {"model": REST | {"plan": GATE, "pruner_phase": {"steps": 2}}},
    "random budgets": {"model": REST | {"plan": {"pruner": "divprune", "keep_tokens": 16}, "schedule": RANDOM}},
    "fastv": {"model": REST | {"plan": {"pruner": "fastv", "layer": 2, "keep_tokens": 16}, "attention": "eager"}},
}
DEFAULT = []  # half a minute each; DDP has one with the recipes
STEPS = 4
SECONDS = 180
STOP = {"class_path": "training.distributed.ranks.StopOne", "init_args": {"step": 1, "rank": 1}}


@pytest.fixture
def train(work):
    def run(name: str, case: str, strategy: str | None, *args: str, codes=(0, 0), more=(), **trainer):
        folder = work.folder / f"{name}_notes"
        folder.mkdir(exist_ok=True)
        sections = {key: dict(value) for key, value in CASES[case].items()}
        batches = trainer.pop("accumulate_grad_batches", 1)
        own = {"max_steps": STEPS, "callbacks": [note(folder), *more]} | trainer
        place = {"devices": 2, "strategy": STRATEGIES[strategy]} if strategy else {}
        own |= place | {"accumulate_grad_batches": batches if strategy else 2 * batches}
        if strategy is None:
            own["callbacks"] = [*own["callbacks"], {"class_path": "training.distributed.ranks.AsTwo"}]
        sections["trainer"] = own
        recipe = [
            "--config",
            str(work.recipe(name, data={"batch_size": 1}, **sections)),
            "--traceback",
            *args,
        ]
        said = work.folder / f"{name}.txt"
        if strategy is None:
            ended, words = [in_process(fit, recipe, said)], said.read_text()
        else:
            ended, words = on_ranks(recipe, said, SECONDS)
        assert ended == list(codes)[: len(ended)], f"{ended}: {words}"
        if any(codes):
            return None
        return [torch.load(folder / f"rank{n}.pt", weights_only=False) for n in range(len(ended))]

    return run


def assert_close(ours: dict, theirs: dict, tolerance: float = 2e-4) -> None:
    """Equal up to rounding; Adam makes a step of its full size of a gradient that is nothing but rounding.

    So two elements in a thousand may differ by more, as long as the tensors differ by a thousandth of their norm.
    """
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        off = ~torch.isclose(value, theirs[name], rtol=tolerance, atol=tolerance)
        gap = (value - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)
        assert off.float().mean() <= 0.002, f"{name}: {int(off.sum())} of {off.numel()} elements differ"
        assert not off.any() or gap <= 1e-3, f"{name}: differs by {gap:.2g} of its norm"


def check(train, case: str, strategy: str) -> None:
    """Ranks agree, call the same modules, and equal one process that takes both ranks' batches for a step.

    The loss of a step is a mean over the answer tokens of both ranks, as one process has it that accumulates two
    batches, which tests/training/test_step_mean.py compares with one large batch.
    """
    first, second = train("two", case, strategy)
    (alone,) = train("one", case, None)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    both = [step for pair in zip(first["steps"], second["steps"], strict=True) for step in pair]
    assert [step["rows"] for step in both] == [step["rows"] for step in alone["steps"]]
    assert {step["pictures"] for step in both} == {0, 1}
    assert len({step["answers"] for step in both}) > 1
    calls = [[step["calls"] for step in steps["steps"]] for steps in (first, second)]
    assert (calls[0] == calls[1]) == (strategy != "ddp")  # elsewhere the tower runs on all ranks or on none
    # DeepSpeed's Adam counts the steps of a phase in which a weight does not train, so it corrects its averages less.
    apart = strategy.startswith("zero") and case == "gate"
    # Scores are standardised, so their scale and offset have a gradient of rounding errors, which Adam makes large.
    free = ("start.weight", "score.bias")
    same = [name for name in alone["weights"] if "token_pruners" in name and not name.endswith(free)]
    shared = same if apart else list(alone["weights"])
    assert shared
    assert_close(*({name: run["weights"][name] for name in shared} for run in (first, alone)))


@pytest.mark.parametrize(
    ("strategy", "case"),
    [pytest.param(s, c, marks=() if (s, c) in DEFAULT else pytest.mark.slow) for s in STRATEGIES for c in CASES],
)
def test_two_processes_equal_one(train, strategy, case):
    check(train, case, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 4.0])  # some steps are clipped
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_that_accumulate_equal_one_process_that_accumulates_as_much(train, strategy, clip):
    """Two batches on each of two ranks, or four batches: the same mean over answer tokens, before clipping."""
    how = {"accumulate_grad_batches": 2, "max_steps": 2, "gradient_clip_val": clip}
    first, _ = train("two", "full", strategy, **how)
    (alone,) = train("one", "full", None, **how)
    assert len({step["answers"] for step in alone["steps"]}) > 1
    assert_close(first["weights"], alone["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "LoRA, teacher", "gate"])
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_a_run_on_cut_weights_goes_on_and_is_exported(train, work, strategy, case):
    """It goes on in the next phase, and its checkpoint becomes a model."""
    whole, _ = train("whole", case, strategy)
    train("part", case, strategy, codes=[143, 0], more=[STOP])
    assert [path.name for path in work.last("part").parent.iterdir()] == ["last.ckpt"]
    assert work.last("part").is_dir() == (strategy != "fsdp2")
    assert read_checkpoint(work.folder / "part")["tpcompress"]["step"] == 2
    again, _ = train("part", case, strategy, "--ckpt_path", str(work.last("part")))
    assert_close(again["weights"], whole["weights"], 1e-6)
    trained = load_trained(work.folder / "part")
    assert_close({n: p.detach() for n, p in trained.model.named_parameters()}, whole["weights"], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("fsdp2", "ddp"), ("ddp", "fsdp2")])
def test_a_checkpoint_is_the_same_under_every_strategy(train, work, before, after):
    whole, _ = train("whole", "gate", before)
    train("part", "gate", before, codes=[143, 0], more=[STOP])
    again, _ = train("part", "gate", after, "--ckpt_path", str(work.last("part")))
    assert_close(again["weights"], whole["weights"])


@pytest.mark.slow
def test_one_rank_told_to_stop_stops_both(train, work):
    """Wherever it stands. Both are saved at the same step, and go on as if nothing had happened."""
    whole, _ = train("whole", "full", "ddp")
    train("stopped", "full", "ddp", codes=[143, 0], more=[STOP])
    assert work.saved("stopped")["tpcompress"]["step"] == 2
    again, _ = train("stopped", "full", "ddp", "--ckpt_path", str(work.last("stopped")))
    assert all(torch.equal(value, whole["weights"][name]) for name, value in again["weights"].items())


@pytest.mark.parametrize(
    ("overlay", "kind"), [("fsdp2", FSDP2), ("zero2", DeepSpeedStrategy), ("zero3", DeepSpeedStrategy)]
)
def test_overlays_are_read_behind_a_recipe(work, overlay, kind):
    args = ["--config", str(work.recipe()), "--config", str(OVERLAYS / f"{overlay}.yaml"), "--trainer.devices", "2"]
    strategy = RecipeCLI(args, progress=False, run=False).trainer.strategy
    assert type(strategy) is kind
    if overlay != "fsdp2":
        assert strategy.config["zero_optimization"]["stage"] == int(overlay[-1])
