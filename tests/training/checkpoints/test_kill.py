"""A run that is killed at any moment, or meets a full disk, loses nothing but the steps since its last checkpoint."""

import random
import signal

import pytest
import torch
from training.checkpoints.killing import SAVING, Kill, Room, callback, fit, in_process
from training.checkpoints.test_resume import GATE, LORA, flat
from training.helpers import Workplace

STEPS = 8
RUNS = {
    "full": {},
    "LoRA": {"model": LORA | {"teacher": "AdapterOff", "losses": ["Label", "KL"]}},
    "gate": {"model": {"plan": GATE, "pruner_phase": {"steps": 4}}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    "validated": {"data": {"val_fraction": 0.2}, "checkpoints": {"every": 100}},
}
KILLED = [kind for kind in RUNS if kind != "validated"]  # it saves at its end alone
WHERE = ("start", "backward", "optimizer", "step", "end")


def moments(name: str, count: int) -> list[tuple[int, str]]:
    """Batches and places within them, drawn once and for all for each kind of run; half of them within a save."""
    draw = random.Random(f"kill {name}")
    places = [WHERE, SAVING]
    return [(draw.randrange(1, STEPS - 1), draw.choice(places[i % 2])) for i in range(count)]


def of(name: str, **trainer) -> dict:
    sections = {key: dict(value) for key, value in RUNS[name].items()}
    sections["trainer"] = {"max_steps": STEPS, **sections.get("trainer", {}), **trainer}
    return {"checkpoints": {"every": 1}} | sections


class Runner:
    """Runs of one work place, each in a process of its own."""

    def __init__(self, work: Workplace, wholes: dict[str, dict]) -> None:
        self.work, self.wholes = work, wholes

    def __call__(self, name: str, kind: str, *args: str, breaks=()) -> tuple[int, str]:
        """(exit code, what it said) of a run of a kind, broken by callbacks."""
        recipe = self.work.recipe(name, **of(kind, **({"callbacks": list(breaks)} if breaks else {})))
        said = self.work.folder / f"{name}.txt"
        code = in_process(fit, ["--config", str(recipe), *args], said)
        return code, said.read_text()

    def files(self, name: str) -> list[str]:
        return sorted(path.name for path in self.work.last(name).parent.iterdir())

    def whole(self, kind: str) -> dict:
        """The last checkpoint of a run that nothing happens to."""
        if kind not in self.wholes:
            code, said = self("whole", kind)
            assert code == 0, said
            self.wholes[kind] = self.work.saved("whole")
        return self.wholes[kind]

    def goes_on(self, name: str, kind: str) -> None:
        """The run of this name, gone on with, ends as one that nothing happened to."""
        with pytest.raises(AssertionError):
            assert_equal(self.work.saved(name), self.whole(kind))
        code, said = self(name, kind, "--ckpt_path", "last")
        assert code == 0, said
        assert self.files(name) == ["last.ckpt"]
        assert_equal(self.work.saved(name), self.whole(kind))


@pytest.fixture(scope="module")
def wholes():
    return {}


@pytest.fixture
def run(work, wholes):
    return Runner(work, wholes)


def assert_equal(one: dict, other: dict) -> None:
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "tpcompress"):
        pairs = list(zip(flat(one[part]), flat(other[part]), strict=True))
        pairs = [(a, b) for a, b in pairs if not a[0].startswith("/recipe/")]  # has the folder of the run
        assert pairs
        for (path, a), (_, b) in pairs:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def check_kill(run, kind: str, moment: tuple[int, str]) -> None:
    batch, where = moment
    code, said = run("killed", kind, breaks=[callback(Kill, batch=batch, where=where)])
    assert code == -signal.SIGKILL, said
    assert 0 < run.work.saved("killed")["tpcompress"]["step"] < STEPS
    assert (run.files("killed") == ["last.ckpt"]) == (where not in ("half", "written"))
    run.goes_on("killed", kind)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(run):
    check_kill(run, "gate", (3, "half"))


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        pytest.param(kind, moment, marks=() if (kind, number) == ("full", 1) else pytest.mark.slow)
        for kind in KILLED
        for number, moment in enumerate(moments(kind, 4))
    ],
)
def test_a_run_is_killed_at_any_moment(run, kind, moment):
    check_kill(run, kind, moment)


@pytest.mark.parametrize(
    ("kind", "batch", "where"),
    [("full", 3, "backward"), pytest.param("validated", 3, "validation", marks=pytest.mark.slow)],
)
def test_sigterm_saves_says_how_to_go_on_and_exits_with_143(run, kind, batch, where):
    breaks = [callback(Kill, batch=batch, where=where, number=int(signal.SIGTERM))]
    code, said = run("stopped", kind, breaks=breaks)
    assert code == 143
    (line,) = [line for line in said.splitlines() if "Terminated" in line]
    assert line == f"Terminated; resume with the same command and --ckpt_path {run.work.last('stopped')}."
    assert run.work.saved("stopped")["tpcompress"]["step"] == batch + 1
    run.goes_on("stopped", kind)


def test_sigint_saves_says_how_to_go_on_and_exits_with_130(run):
    breaks = [callback(Kill, batch=3, where="backward", number=int(signal.SIGINT))]
    code, said = run("interrupted", "full", breaks=breaks)
    assert code == 130, said
    (line,) = [line for line in said.splitlines() if "Interrupted" in line]
    assert line == f"error: Interrupted; resume with the same command and --ckpt_path {run.work.last('interrupted')}."
    assert "Traceback" not in said
    run.goes_on("interrupted", "full")


def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(run):
    code, said = run("full", "full", breaks=[callback(Room, batch=3, size=20_000)])
    assert code == 2
    (line,) = [line for line in said.splitlines() if "error" in line]
    last = run.work.last("full")
    assert line.startswith(f"error: The checkpoint {last} could not be saved (File too large). Training stops,")
    assert line.endswith(f"Free disk space, then resume with the same command and --ckpt_path {last}.")
    assert run.files("full") == ["last.ckpt"]
    assert run.work.saved("full")["tpcompress"]["step"] == 3
    run.goes_on("full", "full")
