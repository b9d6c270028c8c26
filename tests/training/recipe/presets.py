"""What each preset must say, and how it is read. The stand-in base has 576 vision tokens and 32 layers."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tpcompress.training.diagnostics.estimator_results import mark_of
from tpcompress.training.phases import phases_of
from tpcompress.training.steps import step_budgets
from tpcompress.training.teachers.adapter_off import AdapterOff
from tpcompress.training.teachers.larger_budget import LargerBudget

ROOT = Path(__file__).resolve().parents[3]


FOLDER = ROOT / "recipes/presets"


FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


V, DEPTH, STEPS, GPUS = 576, 32, 5000, 8


LAST = 1 - 1e-9  # the end of the range that a draw is from


EPIC = {"label": (0.5, 0.5, 0.5), "kl": (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class Published:
    """What a preset must say.

    Attributes:
        kept: tokens of the last stage that draws, or of the only one, at progress 0, 1/2 and 1: for the smallest draw
            and the largest; of the phase in which the rest trains, or of the only one.
        layers: of the stages at the end.
        losses: weights at progress 0, 1/2 and 1.
        rates: peak learning rate of each group that trains.
        average: vision tokens in the average layer, rounded.
        batch: samples per optimizer step, and the cards that it takes.
        trains: as the README says it.
        teacher: class of the teacher.
    """

    kept: tuple[tuple[int, int], ...]
    rates: dict[str, float]
    trains: str
    layers: tuple[int, ...] = (0,)
    losses: dict[str, tuple[float, ...]] = field(default_factory=lambda: {"label": (1.0, 1.0, 1.0)})
    average: int = 64
    batch: tuple[int, int] = (64, 1)
    teacher: type | None = None


LORA = {"language_model": 2e-4, "projector": 2e-5}


TAUGHT = {"label": (1.0, 1.0, 1.0), "kl": (0.5, 0.5, 0.5)}


FULL = {"language_model": 2e-5, "projector": 2e-5, "vision_tower": 2e-6}


PUBLISHED = {
    "default": Published(
        ((518, 518), (462, 291), (405, 64)), LORA, "projector, LoRA", losses=TAUGHT, teacher=AdapterOff
    ),
    "learned_two_stage": Published(
        ((576, 576), (64, 64), (64, 64)), LORA | {"pruner": 2e-3}, "pruner; then projector, LoRA", losses=TAUGHT,
        teacher=AdapterOff,
    ),
    # 1 - (0.1 + 0.16 p) and 1 - (0.1 + 0.64 p) of 576
    "epic_tcd": Published(
        ((518, 518), (472, 334), (426, 150)), FULL, "everything", (2,), EPIC, average=96, batch=(256, GPUS),
        teacher=LargerBudget,
    ),
    "epic_lcd": Published(
        ((64, 64),) * 3, FULL, "everything", (2,), EPIC, average=96, batch=(256, GPUS), teacher=LargerBudget
    ),
    "pyramiddrop": Published(
        ((72, 72),) * 3, {"language_model": 2e-5, "projector": 2e-5}, "projector, language model", (8, 16, 24),
        average=270, batch=(128, GPUS),
    ),
    "dynamic_llava": Published(
        ((115, 115),) * 3, {"language_model": 5e-6, "projector": 5e-6, "pruner": 2e-4},
        "projector, language model, pruner", (2,), {"label": (1.0,) * 3, "budget": (100.0,) * 3}, 144, (64, GPUS),
    ),
    "visionselector": Published(
        ((115, 115),) * 3, {"pruner": 5e-5}, "pruner", losses={"label": (1.0,) * 3, "bce": (0.1, 1.05, 2.0)},
        average=115, batch=(512, GPUS),
    ),
    "autoselect_noise": Published(((64, 64),) * 3, {"pruner": 1e-3}, "pruner"),
    "m3_pool": Published(
        ((576, 576),) * 3, FULL | {"vision_tower": 2e-5}, "everything", average=36, batch=(128, GPUS)
    ),
    "visionzip_projector": Published(((64, 64),) * 3, {"projector": 2e-5}, "projector", batch=(128, GPUS)),
    "prumerge_lora": Published(((144, 144),) * 3, LORA, "projector, LoRA", average=144, batch=(160, GPUS)),
    "twig": Published(
        ((41, 41),) * 3, {"pruner": 1e-4}, "pruner", (2, 24), {"twig": (1.0,) * 3}, batch=(128, GPUS)
    ),
    "lightvla": Published(
        ((64, 64),) * 3, LORA | {"pruner": 2e-4}, "projector, LoRA, pruner", batch=(128, GPUS)
    ),
}  # fmt: skip


presets = pytest.mark.parametrize("name", FILES)


def phases(module) -> list:
    """Of a run of 5000 steps."""
    rest = module.lora is not None or bool(module.train_parts - {"pruner"})
    main = (module.full_every, module.schedule, module.losses)
    return phases_of(module.plan, STEPS, module.train_parts, rest, module.pruner_phase, main)


def kept(module, phase, progress: float, draw: float) -> list[list[int]]:
    """Tokens of 576 that each stage retains, in each forward call of a step."""
    return [
        [budget.count(V) for budget in values] for values in step_budgets(module.plan, phase.schedule, progress, draw)
    ]


def gate(module):
    """The learned pruner of a plan, if it has one."""
    return next((stage.pruner for stage in module.plan.stages if stage.pruner.learned), None)


def marks_of(module) -> str:
    """What was found for the estimator of a preset; a dash without one."""
    rule = gate(module)
    if rule is None:
        return "–"
    phase = next(phase for phase in phases(module) if phase.pruner)
    return mark_of(rule.selector.name, rule.applier.name, phase.full_every)


def temperatures(module) -> list[float]:
    """Of the selector, at progress 0, 1/2 and 1."""
    selector, seen = gate(module).selector, []
    for progress in (0.0, 0.5, 1.0):
        selector.set_progress(progress)
        seen.append(selector.temperature)
    return seen


def switches(name: str) -> dict[str, object]:
    """What the last line of a header lets one set."""
    line = FILES[name].read_text().splitlines()[3]
    assert line.startswith("# ")
    return {key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+): ([^`]+)`", line)}


def switched(name: str) -> dict:
    """A recipe with all of them."""
    values = yaml.safe_load(FILES[name].read_text())
    for key, value in switches(name).items():
        places(values["model"], key)[0][0][key] = value
    return values


def places(values, key: str) -> list[tuple[dict, object]]:
    """Where a key stands in a recipe, and its value."""
    if isinstance(values, dict):
        here = [(values, values[key])] if key in values else []
        return here + [place for value in values.values() for place in places(value, key)]
    return [place for value in values for place in places(value, key)] if isinstance(values, list) else []


SWITCHED = [name for name in FILES if switches(name)]
