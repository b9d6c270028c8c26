"""The quickstart: compare on the bundled base, export the best trained pruner, verify it, and ask it a question."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tpcompress.data.collate import PromptCollator
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.compare.run import ComparisonRun
from tpcompress.export import load, load_processor, verify_in_fresh_process
from tpcompress.training.recipe.export import export_run

CONFIG = "recipes/tiny_llava/quickstart.yaml"


def run_quickstart(folder: Path, console: Console, config: str = CONFIG) -> int:
    """Run all steps; what an earlier attempt finished in the same folder is kept.

    Args:
        folder: output directory.
        console: console for progress and table.
        config: the comparison.

    Returns:
        0, or 1 if the export did not verify.
    """
    begun = time.perf_counter()
    run = ComparisonRun.open(config, folder, console)
    run.work()
    best = max(run.report.arm("training_aware"), key=lambda row: row.score or 0.0)
    out, verified = export_best(run, best)
    run.report.export = {"dir": str(out), "verified": verified}
    run.finish()
    console.print(f"exported {best.pruner} @ {best.keep_tokens} to {out}: verified {verified}", highlight=False)
    ask_export(out, run)
    console.print(f"done in {time.perf_counter() - begun:.0f} s", highlight=False)
    return 0 if verified else 1


def export_best(run: ComparisonRun, best: Row) -> tuple[Path, bool]:
    """Export the training run of a row and verify the export in a fresh process."""
    console, folder = run.bench.console, run.bench.folder
    with console.status(f"exporting {best.pruner} and verifying it in a fresh process"):
        out = export_run(run.run_folder(best), folder / "export", overwrite=True)
        report = verify_in_fresh_process(out)
    if not report.ok:
        console.print(f"[red]{escape(str(report))}[/red]")
    return out, report.ok


def ask_export(out: Path, run: ComparisonRun) -> None:
    """Print the exported model's answer to one held-out question, through its own processor."""
    console, model, processor = run.bench.console, load(out).eval(), load_processor(out)
    row = run.bench.task.rows[0]
    question = {**row, "conversations": row["conversations"][1:2], "families": row["families"][1:2]}
    collator = PromptCollator(processor)
    batch = collator([question])
    meta = batch.pop("meta")
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=collator.pad_id)
    answer = processor.tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    image = run.bench.folder / "question.png"
    row["images"][0].save(image)
    console.print(f"question about {image}: {escape(question['conversations'][0][0]['content'])}", highlight=False)
    console.print(f"answered: [bold]{escape(answer)}[/bold] (truth: {escape(meta.answers[0][0])})", highlight=False)
