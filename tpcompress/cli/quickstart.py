"""The main job on the bundled base: compare, export the best trained pruner, verify it, let it answer a question."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tpcompress.data.collate import PromptCollator
from tpcompress.evaluation.compare.config import Comparison, run_arms, start
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.compare.run import Run
from tpcompress.export import load, load_processor, verify_in_fresh_process
from tpcompress.training.recipe.export import export_run

CONFIG = "recipes/tiny_llava/quickstart.yaml"


def run_quickstart(folder: Path, console: Console, config: str = CONFIG) -> int:
    """Run it all; what an earlier attempt finished in the same folder is kept.

    Args:
        folder: of all results.
        console: where progress and table go.
        config: the comparison.

    Returns:
        0, or 1 if the export did not verify.
    """
    begun = time.perf_counter()
    comparison = Comparison.from_file(config)
    run = start(comparison, folder, console)
    run_arms(comparison, run)
    best = max(run.report.arm("training_aware"), key=lambda row: row.score or 0.0)
    out, verified = export_best(run, best)
    run.report.export = {"dir": str(out), "verified": verified}
    run.finish()
    console.print(f"exported {best.pruner} @ {best.keep_tokens} to {out}: verified {verified}", highlight=False)
    answer_one(out, run)
    console.print(f"done in {time.perf_counter() - begun:.0f} s", highlight=False)
    return 0 if verified else 1


def export_best(run: Run, best: Row) -> tuple[Path, bool]:
    """Export the run behind a row and verify it in a fresh process."""
    source = run.run_folder(best.pruner, best.layer, best.keep_tokens, best.seed)
    with run.console.status(f"exporting {best.pruner} and verifying it in a fresh process"):
        out = export_run(source, run.folder / "export", overwrite=True)
        report = verify_in_fresh_process(out)
    if not report.ok:
        run.console.print(f"[red]{escape(str(report))}[/red]")
    return out, report.ok


def answer_one(out: Path, run: Run) -> None:
    """Ask the exported model one question of the held-out data, through its own processor, and print its answer."""
    model, processor = load(out).eval(), load_processor(out)
    row = run.data[0]
    question = {**row, "conversations": row["conversations"][1:2], "families": row["families"][1:2]}
    collator = PromptCollator(processor)
    batch = collator([question])
    meta = batch.pop("meta")
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=collator.pad_id)
    answer = processor.tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    picture = run.folder / "question.png"
    row["images"][0].save(picture)
    run.console.print(f"asked of {picture}: {escape(question['conversations'][0][0]['content'])}", highlight=False)
    run.console.print(f"answered: [bold]{escape(answer)}[/bold] (truth: {escape(meta.answers[0][0])})", highlight=False)
