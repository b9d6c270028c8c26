"""The whole way: split the data, rank the rules, train plan and control, export, verify and compare.

    run_compress(CompressSettings("Qwen/Qwen2.5-VL-7B-Instruct", "rows.json", "1/9"), Path("out"), console)

Each step leaves a file in the folder and is skipped where that file exists, so that a repeated command continues. The
rule is chosen on rows that neither training nor the table uses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from tpcompress.compress.recipe import RunChoices, family_of_base, make_recipe
from tpcompress.compress.settings import CompressSettings, forget_settings, keep_settings
from tpcompress.compress.split import Split, split_data
from tpcompress.compress.summary import next_commands, sentence, serving_sentence
from tpcompress.data.encode import ChatEncoder
from tpcompress.evaluation.compare.run import ComparisonRun
from tpcompress.evaluation.compare.table import layout
from tpcompress.evaluation.scoring.metrics import find_metric
from tpcompress.evaluation.tables import rich_table
from tpcompress.export import verify_in_fresh_process
from tpcompress.export.runtimes import not_servable, served_by
from tpcompress.files import write_atomic
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.plan_source import read_keep
from tpcompress.models import load_config, load_processor
from tpcompress.pruners import create, pruner_class
from tpcompress.pruners.catalogue import unserved
from tpcompress.training.recipe.export import export_run

RECIPE, CONTROL, COMPARE, CHOICE = "recipe.yaml", "control.yaml", "compare.yaml", "choice.json"
STEPS = ("split", "rank", "train", "export", "compare")
REFERENCES = ("random", "uniform", "pool", "merged")
"""Rules in the table beside the chosen one, where they run on the model."""


@dataclass(frozen=True)
class Outcome:
    """Result of a compression.

    Attributes:
        folder: folder of all files.
        export: exported checkpoint.
        verified: the export, loaded again, behaves as the trained model.
        score, dense, control: scores on the rows of the table: trained in the loop, base, dense with the same steps.
    """

    folder: Path
    export: Path
    verified: bool
    score: float | None
    dense: float | None
    control: float | None


def run_compress(settings: CompressSettings, folder: Path, console: Console) -> Outcome:
    """Run every step that the folder lacks, and print table, sentence and next commands.

    Args:
        settings: what to compress, and how.
        folder: output folder.
        console: console for progress and table.

    Raises:
        FileNotFoundError, ValueError: an argument is invalid, or the folder was made with other arguments.
        KeyboardInterrupt: interrupted; the same command continues.
    """
    family = family_of_base(settings.model)
    for rule in settings.rules:
        pruner_class(rule, allow_outside=False)
    if settings.servable and settings.rules:
        _check_rules(settings)
    if settings.metric is not None:
        find_metric(settings.metric)
    keep_settings(settings, folder)

    def step(name: str, text: str) -> None:
        place = f"{STEPS.index(name) + 1}/{len(STEPS)}"
        console.print(f"[bold]{place} {name}[/bold]: {escape(text)}", highlight=False, soft_wrap=True)

    step("split", f"{settings.data} ({family})")
    try:
        refused = ChatEncoder(load_processor(settings.model)).layout.refused
        split = split_data(
            settings.data, folder / "data", settings.image_folder, settings.split, settings.seed, refused.get("video")
        )
        console.print(f"  {split}", highlight=False, soft_wrap=True)
        step("rank", f"untrained rules at {settings.keep} on {split.rows['choose']} rows")
        choice = _choose(settings, folder, split, console)
    except (ValueError, FileNotFoundError):
        if not (folder / CHOICE).is_file():  # nothing to continue, so a corrected command may use the folder
            forget_settings(folder)
        raise
    console.print(f"  chosen: {choice['rule']} at layer {choice['layer']}", highlight=False)
    write_files(settings, folder, split, choice)
    step("train", f"{choice['rule']} in the loop, and the dense control; test all on {split.rows['table']} rows")
    run = ComparisonRun.open(str(folder / COMPARE), folder / "compare", console)
    run.work()
    step("export", f"{folder / 'export'}, verified in a fresh process")
    (trained,) = run.report.arm("training_aware")
    export, verified, problem = _export(run, folder)
    run.report.export = {"dir": str(export), "verified": verified}
    console.print(f"  {problem or 'verified: the loaded export behaves as the trained model'}", highlight=False)
    step("compare", f"{folder / 'compare'}")
    run.bench.console = Console(quiet=True)  # the whole report is in the folder; one table is printed below
    report = run.finish()
    # Scores average the families in which the image matters; where there is none, the families themselves are shown.
    console.print(rich_table(layout(report, families=trained.score is None)))
    console.print(sentence(report, choice, settings.keep, verified), highlight=False, soft_wrap=True)
    for line in next_commands(folder, export):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    dense, control = (next(iter(report.arm(arm)), None) for arm in ("dense", "dense_ft"))
    scores = (row.score if row else None for row in (trained, dense, control))
    return Outcome(folder, export, verified, *scores)


def write_files(settings: CompressSettings, folder: Path, split: Split, choice: dict[str, Any]) -> None:
    """Write the recipes of plan and control and the comparison, which `fit` and `compare` take; keep existing ones."""
    plan = PruningPlan.from_dict(choice["plan"])
    command = f"tpcompress fit --config {folder}"
    for name, own in ((RECIPE, plan), (CONTROL, None)):
        choices = RunChoices(
            settings.model, split.file("train"), own, str(folder / Path(name).stem), settings.lora, settings.steps,
            None, settings.batch_size, servable=settings.servable,
        )  # fmt: skip
        values = {"seed_everything": settings.seed, **make_recipe(choices, split.rows["train"])}
        served = "" if own is None else f"\n# {serving_sentence(choice)}"
        _write(folder / name, values, f"{command}/{name}{served}")
    task: dict[str, Any] = {"type": "chat", "data": split.file("table")}
    free = [{"pruner": choice["pruner"], "layer": choice["layer"], "label": choice["rule"]}]
    free += [{"pruner": name, "layer": layer} for name, layer in choice["references"]]
    comparison = {
        "base": settings.model, "out": str(folder / "compare"), "task": task, "metric": settings.metric,
        "batch_size": 8, "budgets": [settings.budget], "training_free": free, "control": str(folder / CONTROL),
        "training_aware": [{"recipe": str(folder / RECIPE), "seeds": [settings.seed]}],
    }  # fmt: skip
    comparison = {key: value for key, value in comparison.items() if value is not None}
    _write(folder / COMPARE, comparison, f"tpcompress compare --config {folder}/{COMPARE}")


def _check_rules(settings: CompressSettings) -> None:
    """Refuse rules of a servable run that no engine takes, before hours of ranking.

    Raises:
        ValueError: one of them.
    """
    for rule in settings.rules:
        reason = unserved(create(rule, allow_outside=False))
        if reason is None:
            plan = PruningPlan.of({"stages": [{"pruner": rule, "layer": 0, **read_keep(settings.keep)}]})
            reason = not_servable(plan, load_config(settings.model))
        if reason is not None:
            raise ValueError(f"--servable with --rules {rule}: {reason}; leave out one of them.")


def _choose(settings: CompressSettings, folder: Path, split: Split, console: Console) -> dict[str, Any]:
    """The best rule on the rows to choose on, as plain values."""
    path = folder / CHOICE
    if not path.is_file():
        from tpcompress.evaluation.rank import run_rank

        task = {"type": "chat", "data": split.file("choose")}
        more: dict[str, Any] = {"rules": settings.rules or None, "metric": settings.metric, "batch_size": 8}
        more["servable"] = settings.servable
        ranking = run_rank(settings.model, task, settings.keep, folder / "rank", console, **more)
        best = ranking.best(settings.keep, served=settings.servable)
        stage = best.plan.stages[0]
        others = [(row.rule, row.layer) for row in ranking.at(settings.keep)]
        others = [(rule, layer) for rule, layer in others if rule in REFERENCES and rule != best.rule]
        choice = {
            "rule": best.rule, "layer": best.layer, "pruner": stage.pruner.config(), "plan": best.plan.to_dict(),
            "score": best.score, "ranked": len(ranking.at(settings.keep)), "references": others,
            "engines": served_by(best.plan, load_config(settings.model)),
            "not_servable": not_servable(best.plan, load_config(settings.model)),
        }  # fmt: skip
        write_atomic(path, json.dumps(choice, indent=1, allow_nan=False))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _export(run: ComparisonRun, folder: Path) -> tuple[Path, bool, str]:
    """Export the trained run and verify it in a fresh process, once."""
    out, record = folder / "export", folder / "verified.json"
    if not record.is_file():
        (trained,) = run.report.arm("training_aware")
        export_run(run.run_folder(trained), out, overwrite=True)
        report = verify_in_fresh_process(out)
        write_atomic(record, json.dumps({"ok": report.ok, "report": str(report)}, indent=1))
    known = json.loads(record.read_text())
    return out, known["ok"], "" if known["ok"] else known["report"]


def _write(path: Path, values: dict[str, Any], command: str) -> None:
    if not path.is_file():
        write_atomic(path, f"# {command}\n{yaml.safe_dump(values, sort_keys=False)}")
