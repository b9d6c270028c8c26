"""Train the bundled base model `tpcompress/assets/tiny_llava` from scratch on one CPU core.

    python scripts/build_tiny_base.py

The language and tower stages are independent: run `--only language` and `--only tower` in parallel, then without
`--only` to finish. An interrupted build resumes from `--work`.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from tiny_base.acceptance import TEST_IMAGES, below_floor, generated_accuracy, measure, write_card
from tiny_base.joint import JointStage
from tiny_base.language import LanguageStage
from tiny_base.loop import Budget, run_stage
from tiny_base.publish import publish
from tiny_base.tower import TowerStage

ASSET = Path(__file__).resolve().parents[1] / "tpcompress" / "assets" / "tiny_llava"
LANGUAGE = Budget(steps=1300, lr=2e-3)
TOWER = Budget(steps=1300, lr=2e-3, flat=0.6, gates=(("digit", 85.0), ("place", 60.0)))
JOINT = Budget(steps=300, lr=5e-4, warmup=30, flat=0.3, extension=150, gates=(("digits", 87.0),), report_every=50)


def main() -> None:
    """Parse arguments and run the stages in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_base"), help="checkpoint directory")
    parser.add_argument("--out", type=Path, default=ASSET, help="output directory of the base model")
    parser.add_argument("--only", choices=("language", "tower"), help="run one stage and stop")
    arguments = parser.parse_args()
    # Denormals would slow down the last steps, where the loss is nearly 0.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    console = Console(width=240)

    if arguments.only != "tower":
        language = run_stage(LanguageStage(), LANGUAGE, arguments.seed, arguments.work, console)
    if arguments.only != "language":
        tower = run_stage(TowerStage(), TOWER, arguments.seed, arguments.work, console)
    if arguments.only:
        return
    joint = run_stage(JointStage(language, tower), JOINT, arguments.seed, arguments.work, console)
    finish(joint.model, arguments.out, arguments.seed, console)


def finish(model: torch.nn.Module, out: Path, seed: int, console: Console) -> None:
    """Evaluate the finished model, publish it and test the published folder."""
    measured = measure(model, TEST_IMAGES, console)
    if missed := below_floor(measured):
        raise SystemExit(f"Not published: {missed} percent on test images is below the floor; try another --seed.")
    publish(model, out)
    write_card(out, measured, TEST_IMAGES, f"python scripts/build_tiny_base.py --seed {seed}", seed)
    console.print(f"published {out.name}; exact match of generate() on 40 images: {generated_accuracy(out):.1f} %")


if __name__ == "__main__":
    main()
