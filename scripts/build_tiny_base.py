"""Build the bundled base ``tpcompress/assets/tiny_llava`` from nothing, on one CPU core.

    python scripts/build_tiny_base.py

The language and the tower stage do not need each other; run ``--only language`` and ``--only tower`` side by side, then
without ``--only`` to finish.  Interrupted builds continue from ``--work``.
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
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_base"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=ASSET, help="folder of the finished base")
    parser.add_argument("--only", choices=("language", "tower"), help="run one stage and stop")
    arguments = parser.parse_args()
    # One core is shared with nothing else; denormals would slow the last, nearly perfect steps down.
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
    """Measure the finished model, publish it and try the published folder."""
    measured = measure(model, TEST_IMAGES, console)
    if missed := below_floor(measured):
        raise SystemExit(f"Not published: {missed} percent on test images is under the floor; try another --seed.")
    publish(model, out)
    write_card(out, measured, TEST_IMAGES, f"python scripts/build_tiny_base.py --seed {seed}", seed)
    console.print(f"published {out.name}; generate() answers {generated_accuracy(out):.1f} % of 40 images' questions")


if __name__ == "__main__":
    main()
