"""Every preset is what its paper says: budgets, layers, weights and rates, computed from the recipe as it is read."""

import re

import pytest
import yaml
from training.recipe.presets import (
    DEPTH,
    FILES,
    FOLDER,
    LAST,
    PUBLISHED,
    SWITCHED,
    V,
    gate,
    kept,
    marks_of,
    phases,
    places,
    presets,
    switched,
    switches,
    temperatures,
)

from tpcompress.training.diagnostics.estimator_results import DOES_NOT_LEARN, training_of
from tpcompress.training.losses.base import at
from tpcompress.training.trainable import TRAINABLE

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


# ------------------------------------------------------------------ switches, and the table


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
