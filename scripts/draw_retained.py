"""Draw the image of the README: retained tokens of three pruners on held-out images of the built-in benchmark.

    python scripts/draw_retained.py --out scripts/docs_site/images/retained.png

The learned gate is trained first (two minutes on two cores), unless `--ckpt` names a finished run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import tpcompress as tp
from tpcompress.data.benchmark import draw_benchmark
from tpcompress.evaluation.figures.retained import Retained, retained_figure, retained_masks
from tpcompress.models import load_base, load_processor
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.recipe.run import run_recipe

RECIPE = "recipes/tiny_llava/gate_question.yaml"
FAMILIES = ("ocr", "attr", "needle")
"""One image for each, asked a question of this family."""
BUDGET = 16
COLOURS = 256
"""Palette of the PNG, which is committed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="scripts/docs_site/images/retained.png", help="the PNG to write")
    parser.add_argument("--ckpt", default="", help="finished run of the learned gate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out images")
    given = parser.parse_args()
    folder = given.ckpt or train("runs/docs/gate_question")
    processor, rows = load_processor("tiny_llava"), asked(given.seed)
    columns: dict[str, list[Retained]] = {}
    for label, stage in (
        ("divprune", tp.Stage("divprune", keep_tokens=BUDGET)),
        ("fastv, layer 1", tp.Stage("fastv", 1, keep_tokens=BUDGET)),
    ):
        model = load_base("tiny_llava").eval()
        tp.attach(model, tp.PruningPlan([stage]))
        columns[label] = retained_masks(model, processor, rows)
    columns["learned gate"] = retained_masks(load_trained(folder).model.eval(), processor, rows)
    retained_figure(columns, given.out)
    Image.open(given.out).convert("RGB").quantize(
        COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    ).save(given.out, optimize=True)
    print(f"Wrote {given.out}: {Path(given.out).stat().st_size / 1024:.0f} KB.")


def train(folder: str) -> str:
    """Train the learned gate with its recipe.

    Returns:
        The folder of the run.
    """
    run_recipe(["fit", "--config", RECIPE, "--trainer.default_root_dir", folder])
    return folder


def asked(seed: int) -> list[dict]:
    """Held-out rows, one per family, with the question of that family first."""
    rows: list[dict] = []
    for family in FAMILIES:
        for row in draw_benchmark("test", 200, seed):
            if family not in row["families"] or any(row["images"] == other["images"] for other in rows):
                continue
            place = row["families"].index(family)
            rows.append(row | {"conversations": [row["conversations"][place]], "families": [family]})
            break
    return rows


if __name__ == "__main__":
    main()
