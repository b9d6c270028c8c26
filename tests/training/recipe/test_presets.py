"""Every preset is what its paper says: budgets, layers, weights and rates, computed from the recipe as it is read.

The stand-in has LLaVA-1.5's shape in little: 576 vision tokens, 32 decoder layers.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml
from support import scramble
from training.helpers import Watch, Workplace, callback, found, save_base, save_chat
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tpcompress.insertion.plan import Budget
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.registry import create_part
from tpcompress.pruners.visionzip import every_nth
from tpcompress.training.diagnostics.estimator_results import DOES_NOT_LEARN, mark_of, training_of
from tpcompress.training.losses.base import at
from tpcompress.training.optim import group_of
from tpcompress.training.phases import phases_of
from tpcompress.training.recipe.run import RecipeCLI, run_recipe
from tpcompress.training.steps import step_budgets
from tpcompress.training.teachers.adapter_off import AdapterOff
from tpcompress.training.teachers.larger_budget import LargerBudget
from tpcompress.training.trainable import TRAINABLE

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


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workplace:
    """A base of LLaVA-1.5's counts, and the photographs."""
    folder = save_base(tmp_path_factory.mktemp("base"))
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    config.text_config.num_hidden_layers = DEPTH
    config.vision_config.patch_size = processor.patch_size = 4
    config.image_seq_length = V
    torch.manual_seed(0)
    scramble(AutoModelForImageTextToText.from_config(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Workplace(folder, save_chat(tmp_path_factory.mktemp("chat")), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def read(work):
    """A preset's trainer, module and data, from its file or from changed values."""
    held: dict[str, RecipeCLI] = {}

    def read(name: str, values: dict | None = None) -> RecipeCLI:
        if values is None and name in held:
            return held[name]
        values_or_file = yaml.safe_load(FILES[name].read_text()) if values is None else values
        path = work.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values_or_file))
        more = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.base", str(work.base)]
        run = RecipeCLI(["--config", str(path), *more], progress=False, run=False)
        if values is None:
            held[name] = run
        return run

    return read


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


# ------------------------------------------------------------------ what all of them say


def test_every_preset_is_held_to_something():
    assert len(FILES) >= 13
    assert set(PUBLISHED) == set(FILES)


@presets
def test_budgets_over_the_run(name, read):
    module = read(name).model
    phase, stage = (
        phases(module)[-1],
        next(i for i, s in reversed(list(enumerate(module.plan.stages))) if s.keep_tokens != 0),
    )
    for progress, expected in zip((0.0, 0.5, 1.0), PUBLISHED[name].kept, strict=True):
        assert tuple(kept(module, phase, progress, draw)[0][stage] for draw in (0.0, LAST)) == expected, progress


@presets
def test_layers_and_positions(name, read):
    module = read(name).model
    phase = phases(module)[-1]
    assert tuple(stage.layer for stage in module.plan.stages) == PUBLISHED[name].layers
    assert (
        tuple(phase.schedule.layer(stage.layer, DEPTH, 1.0) for stage in module.plan.stages) == PUBLISHED[name].layers
    )
    assert round(module.plan.layer_average(V, DEPTH)) == PUBLISHED[name].average
    assert module.plan.positions == "original"


@presets
def test_losses_and_their_weights(name, read):
    losses = phases(read(name).model)[-1].losses
    assert {loss.name: tuple(at(loss.weight, p) for p in (0.0, 0.5, 1.0)) for loss in losses} == PUBLISHED[name].losses


@presets
def test_teachers(name, read):
    teacher = read(name).model.teacher
    assert (None if teacher is None else type(teacher)) is PUBLISHED[name].teacher


@presets
def test_rates_batches_and_warm_up(name, read):
    run, expected = read(name), PUBLISHED[name]
    settings, (batch, cards) = run.model.optimizer_settings, expected.batch
    assert {group: settings.peak(group) for group in expected.rates} == expected.rates
    assert cards * run.datamodule.batch_size * run.trainer.accumulate_grad_batches == batch
    command = FILES[name].read_text().splitlines()[2]
    assert (f"({cards} GPUs" in command) == (cards > 1)
    if cards == 1:
        return
    # LLaVA's: 3 % of one epoch of 665k, or of the part that is trained on, and no floor under the cosine.
    steps = 665_298 * run.trainer.limit_train_batches / batch
    assert settings.warmup == pytest.approx(0.03 * steps, rel=0.05, abs=1) or name == "lightvla"
    assert settings.weight_decay == 0
    assert (settings.betas, settings.final) == ((0.9, 0.999), 0.0) or name == "lightvla"


@presets
def test_a_reproduction_of_what_does_not_learn_says_so(name, read):
    module = read(name).model
    assert module.reproduction == (marks_of(module) == DOES_NOT_LEARN)


def marks_of(module) -> str:
    """What was found for the estimator of a preset; a dash without one."""
    rule = gate(module)
    if rule is None:
        return "–"
    phase = next(phase for phase in phases(module) if phase.pruner)
    return mark_of(rule.selector.name, rule.applier.name, phase.full_every)


# ------------------------------------------------------------------ what some of them say


def test_the_window_of_the_default_reaches_the_plan_and_epics_does_not(read):
    for name, reaches in (("default", True), ("epic_tcd", False)):
        module = read(name).model
        smallest = kept(module, phases(module)[0], 1.0, LAST)[0]
        assert (smallest == module.plan.counts(V)) == reaches


def test_epics_teacher_has_a_tenth_to_three_tenths_more(read):
    for name in ("epic_tcd", "epic_lcd"):
        teacher = read(name).model.teacher
        for step in range(21):
            p = step / 20
            (value,) = teacher.budgets([Budget(keep_ratio=0.5)], p)
            assert value.keep_ratio == pytest.approx(0.5 + min(0.3, 0.1 + 0.5 * p))
        assert teacher.budgets([Budget(keep_ratio=0.9)], 1.0) == [Budget(keep_ratio=1.0)]


def test_epics_distillation_is_at_temperature_two_and_shifted(read):
    for name in ("epic_tcd", "epic_lcd"):
        kl = next(loss for loss in read(name).model.losses if loss.name == "kl")
        assert (kl.temperature, kl.shifted) == (2.0, True)


def test_epics_layer_falls_from_the_last_to_the_second(read):
    module = read("epic_lcd").model
    (phase,) = phases(module)
    assert [phase.schedule.layer(2, DEPTH, p / 4) for p in range(5)] == [31, 24, 17, 10, 2]
    assert phase.schedule.moves
    (phase,) = phases(read("epic_tcd").model)
    assert not phase.schedule.moves, "control"


def test_the_scorer_of_two_stages_meets_every_budget_before_the_rest_meets_one(read):
    module = read("learned_two_stage").model
    first, second = phases(module)
    assert (first.start, first.end, first.full_every, second.full_every) == (0, 1000, 1, 0)
    assert [loss.name for loss in first.losses] == ["label"]
    for progress in (0.0, 1.0):
        assert [kept(module, first, progress, draw) for draw in (0.0, 0.5, LAST)] == [[[32]], [[91]], [[256]]]
    assert kept(module, second, 0.25, 0.0) == [[320]]


def test_the_mix_is_one_step_in_four(read):
    values = yaml.safe_load(FILES["learned_two_stage"].read_text())
    values["model"] |= {"train": ["projector", "pruner"], "full_every": 4}
    first, second = phases(read("learned_two_stage", values).model)
    assert second.pruner
    assert second.rest
    assert [second.full(second.start + step) for step in range(8)] == [True, False, False, False] * 2


def test_the_pyramid(read):
    module = read("pyramiddrop").model
    assert module.plan.counts(V) == [288, 144, 72]
    assert module.plan.layer_average(V, DEPTH) == (8 * 576 + 8 * 288 + 8 * 144 + 8 * 72) / 32


def test_dynamic_llavas_gate(read):
    module = read("dynamic_llava").model
    (phase,) = phases(module)
    assert (phase.pruner, phase.rest, phase.full_every) == (True, True, 1)
    assert temperatures(module) == pytest.approx([1.0, 0.1**0.5, 0.1])
    assert module.plan.layer_average(V, DEPTH) == (2 * 576 + 30 * 115) / 32
    rule, loss = gate(module), module.losses[1]
    assert (rule.scorer.width, loss.below, loss.floor, loss.pooled) == (512, "quadratic", 0.0, False)


def temperatures(module) -> list[float]:
    """Of the selector, at progress 0, 1/2 and 1."""
    selector, seen = gate(module).selector, []
    for progress in (0.0, 0.5, 1.0):
        selector.set_progress(progress)
        seen.append(selector.temperature)
    return seen


def test_vision_selectors_scorer_is_of_the_published_size(read):
    rule = gate(read("visionselector").model)
    scorer = create_part("scorer", rule.scorer.config())
    scorer.build(3584)  # that of Qwen2.5-VL-7B
    assert sum(p.numel() for p in scorer.parameters()) == pytest.approx(12.85e6, rel=1e-3)
    assert temperatures(read("visionselector").model) == pytest.approx([0.5, 0.05**0.5, 0.1])
    (phase,) = phases(read("visionselector").model)
    assert (phase.full_every, phase.rest) == (1, False)


def test_the_noise_gate_learns_alone_at_full_length(read):
    module = read("autoselect_noise").model
    (phase,) = phases(module)
    assert (phase.pruner, phase.rest, phase.full_every, phase.end) == (True, False, 1, STEPS)


def test_matryoshkas_five_counts(read):
    module = read("m3_pool").model
    (phase,) = phases(module)
    for progress in (0.0, 0.5, 1.0):
        assert kept(module, phase, progress, 0.3) == [[576], [144], [36], [9], [1]]


def test_vision_zips_64_are_54_and_10(read):
    module = read("visionzip_projector").model
    rule, (count,) = module.plan.stages[0].pruner, module.plan.counts(V)
    targets = int(count * rule.contextual + 0.5)
    assert (count - targets, targets) == (54, 10)
    rest_BV = torch.arange(V)[None] >= count - targets
    assert every_nth(rest_BV, torch.tensor([targets])).sum() == 10
    assert read("visionzip_projector").trainer.limit_train_batches == 0.1


def test_prumerge_counts_for_itself(read):
    module = read("prumerge_lora").model
    rule = module.plan.stages[0].pruner
    assert (rule.adaptive, rule.plus, rule.neighbours, rule.exact_count) == (True, True, 32, False)
    assert (module.lora["r"], module.lora["lora_alpha"]) == (128, 256)


def test_the_twig_is_as_large_as_three_layers_and_its_budget_an_average(read):
    module = read("twig").model
    (phase,) = phases(module)
    assert (phase.pruner, phase.rest, phase.full_every) == (True, False, 0)
    for tokens, average in ((41, 64), (227, 192)):
        assert round((2 * V + (24 - 2) * tokens) / DEPTH) == average
    with torch.device("meta"):
        scorer = create_part("scorer", gate(module).scorer.config())
        scorer.make(4096)
    llama = 4 * 4096**2 + 3 * 4096 * 11008
    assert sum(p.numel() for p in scorer.parameters()) == pytest.approx(3 * llama, rel=0.1)


def test_light_vlas_noise_dies_out(read):
    module = read("lightvla").model
    rule, (phase,) = gate(module), phases(module)
    assert (phase.full_every, phase.pruner, phase.rest) == (1, True, True)
    assert (rule.selector.noise, rule.selector.cap, rule.scorer.width) == ("uniform", 1.0, None)
    torch.manual_seed(0)
    close = Scores(torch.zeros(1, 12), votes_BVV=0.01 * torch.randn(1, 12, 12))
    clear = replace(close, votes_BVV=2 * torch.eye(12)[None].roll(1, 2))
    valid, count = torch.ones(1, 12, dtype=torch.bool), torch.tensor([12])
    same = {}
    for progress in (0.0, 1.0):
        rule.selector.set_progress(progress)
        for name, scores in (("close", close), ("clear", clear)):
            loud, quiet = (rule.selector(scores, valid, count, explore).keep_BV for explore in (True, False))
            same[name, progress] = torch.equal(loud, quiet)
    # Uniform in [0, 1) moves votes that are less than 1 apart, at first, and none in the end.
    assert same == {("close", 0.0): False, ("clear", 0.0): True, ("close", 1.0): True, ("clear", 1.0): True}


# ------------------------------------------------------------------ switches, and the table


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


@pytest.mark.parametrize("name", SWITCHED)
def test_a_header_names_keys_that_turn_the_fixes_off(name, read):
    """Each stands in the file once, with another value, and the recipe is read with all of them."""
    values = yaml.safe_load(FILES[name].read_text())
    for key, value in switches(name).items():
        ((holder, before),) = places(values["model"], key)
        assert before != value
        assert key in holder
    read(name, switched(name))


def test_switches_reach_what_they_are_about(read):
    """As published, some of the numbers above are others."""
    assert len(SWITCHED) >= 8
    assert read("pyramiddrop", switched("pyramiddrop")).model.plan.positions == "compact"
    assert temperatures(read("visionselector", switched("visionselector")).model) == [1.0, 1.0, 1.0]
    tcd = read("epic_tcd", switched("epic_tcd")).model
    assert (tcd.losses[1].shifted, tcd.teacher.nested) == (False, False)
    assert kept(tcd, phases(tcd)[0], 1.0, LAST) == [[64]]


def table() -> dict[str, list[str]]:
    """The README's rows by preset, without the sign of code."""
    rows = [line.strip("|").split("|") for line in (FOLDER / "README.md").read_text().splitlines() if line[:3] == "| `"]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_the_table_lists_every_preset():
    assert list(table()) == list(FILES)


@presets
def test_the_table_says_what_the_files_say(name, read):
    module = read(name).model
    source, trains, estimator, mark, fixes = table()[name]
    header = FILES[name].read_text().splitlines()
    assert re.findall(r"arXiv ([\d.]+)", source) == re.findall(r"arXiv ([\d.]+)", header[1])
    assert trains == "; then ".join(what_trains(module, phase) for phase in phases(module)) == PUBLISHED[name].trains
    rule = gate(module)
    if rule is None:
        assert estimator == "–"
    else:
        phase = next(phase for phase in phases(module) if phase.pruner)
        assert estimator == f"{rule.selector.name}, {rule.applier.name}, {training_of(phase.full_every)}"
    assert mark == marks_of(module)
    assert {key for key, _ in re.findall(r"`(\w+): ([^`]+)`", fixes)} == set(switches(name))


def what_trains(module, phase) -> str:
    """In words, of a phase."""
    parts = module.train_parts if phase.rest else set()
    words = (
        ["everything"] if parts >= set(TRAINABLE) else [part.replace("_", " ") for part in TRAINABLE if part in parts]
    )
    words += ["LoRA"] * (phase.rest and module.lora is not None) + ["pruner"] * phase.pruner
    return ", ".join(words)


# ------------------------------------------------------------------ two steps

QUICK = ("default", "epic_tcd", "learned_two_stage")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FILES])
def test_two_steps_on_a_tiny_stand_in(name, work, tmp_path):
    run = two_steps(FILES[name], work, tmp_path)
    metrics, watch = run.trainer.callback_metrics, found(run, Watch)
    assert run.trainer.global_step == 2
    assert {key.removeprefix("loss/") for key in metrics if key.startswith("loss/")} - {"total"} == set(
        PUBLISHED[name].losses
    )
    assert torch.isfinite(metrics["loss/total"])
    changed = [{part_of(weight, run.model.parts) for weight in names} for names in watch.changed]
    steps = PUBLISHED[name].trains.split("; then ")
    for step, parts in enumerate(changed):
        words = steps[min(step, len(steps) - 1)].replace("everything", "vision tower, projector, language model")
        assert parts == set(words.split(", ")), step


def part_of(name: str, parts) -> str:
    """The word of the README for what a weight belongs to."""
    return "LoRA" if "lora_" in name else group_of(name, parts).replace("_", " ")


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHED)
def test_two_steps_as_published(name, work, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(switched(name)))
    run = two_steps(path, work, tmp_path / "run")
    assert run.trainer.global_step == 2
    assert torch.isfinite(run.trainer.callback_metrics["loss/total"])


def two_steps(path: Path, work: Workplace, folder: Path) -> RecipeCLI:
    """Two steps of a recipe, in single precision; of two phases, one each."""
    args = ["--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--trainer.limit_train_batches", "1.0"]
    args += ["--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    args += ["--trainer.precision", "32-true", "--model.dtype", "float32", "--trainer.accumulate_grad_batches", "1"]
    args += ["--trainer.limit_val_batches", "0"]
    args += ["--model.base", str(work.base), "--model.optimizer.warmup", "1", "--diagnostics.every", "0"]
    args += ["--data.init_args.train", str(work.chat / "chat.json"), "--data.init_args.num_workers", "0"]
    args += ["--data.init_args.image_folder", str(work.chat / "images"), "--data.init_args.batch_size", "2"]
    args += ["--model.pruner_phase.steps", "1"] if "steps: 1000" in path.read_text() else []
    args += ["--trainer.callbacks+", yaml.safe_dump(callback(Watch), default_flow_style=True)]
    return run_recipe(["fit", "--config", str(path), *args], progress=False)
