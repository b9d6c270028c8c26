"""The builder of the photo benchmark on stand-ins: nothing is downloaded; and its base in a comparison."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from photo_standins import background, cutout, tiny_tower, write_standins
from photos import sources
from photos.batches import GROUPS, LABELS, answer_logits, label_matrix, pack_questions
from photos.card import measure, write_card
from photos.features import extract, load_features
from photos.joint import JointStage, exact_match
from photos.model import VOCABULARY, Reader
from photos.patches import PatchStage, Scenes
from photos.publish import assemble, load_reader, publish, reader_weights, save_reader
from photos.qt_resources import resource_files
from photos.tower import features_of
from PIL import Image
from rich.console import Console
from tiny_base.loop import Budget, run_stage

from tpcompress.data.photos.builder import scene_of
from tpcompress.data.photos.store import load_photographs
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.evaluation.compare.oracle import oracle_plan
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.evaluation.compare.write import report_markdown
from tpcompress.evaluation.engine.plans import FreePruner
from tpcompress.evaluation.tasks import create_task
from tpcompress.evaluation.tasks.photos_features import remembered
from tpcompress.insertion.attach import attach, detach
from tpcompress.insertion.plan import Budget as Keep
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.models import load_base, load_processor

QUIET = Console(quiet=True)
IMAGES, KEPT = 3, 28


# ------------------------------------------------------------------ sources


def resource(files: dict[str, bytes], compress: str = "") -> bytes:
    """A compiled Qt resource of one folder, format version 1."""
    names, data, entries = b"", b"", []
    at: dict[str, int] = {}
    for name in ("images", *files):
        at[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    entries.append(struct.pack(">IHII", 0, 2, 1, 1))
    entries.append(struct.pack(">IHII", at["images"], 2, len(files), 2))
    for name, content in files.items():
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if name == compress else content
        entries.append(struct.pack(">IHHHI", at[name], int(name == compress), 0, 0, len(data)))
        data += struct.pack(">I", len(stored)) + stored
    tree = 20 + len(data) + len(names)
    return struct.pack(">4sIIII", b"qres", 1, tree, 20, 20 + len(data)) + data + names + b"".join(entries)


def test_resources_of_qt_are_read(tmp_path: Path) -> None:
    files = {"a.webp": b"one", "b.webp": b"two" * 50}
    path = tmp_path / "test.rcc"
    path.write_bytes(resource(files, compress="b.webp"))
    assert dict(resource_files(path)) == {f"/images/{name}": content for name, content in files.items()}
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="no compiled Qt resource"):
        dict(resource_files(path))


def picture(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def test_photographs_are_taken_out_of_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "OBJECTS", {"bird": ("animals: crow", "animals: duck")})
    monkeypatch.setattr(sources, "PLACES", {"sea": ("game/images: one", "game/images: two")})
    stamps = tmp_path / "packages" / sources.STAMPS / "usr/share/tuxpaint/stamps/animals"
    resources = tmp_path / "packages" / sources.BACKGROUNDS / "usr/share/gcompris-qt/rcc"
    for folder in (stamps, resources):
        folder.mkdir(parents=True)
    for number, name in enumerate(("crow", "duck")):
        cutout(number).save(stamps / f"{name}.png")
    files = {f"{name}.webp": picture(background(i), "WEBP") for i, name in enumerate(("one", "two"))}
    (resources / "game.rcc").write_bytes(resource(files))
    assert sources.write_photographs(tmp_path, tmp_path / "out") == {"objects": 2, "places": 2}
    written = Image.open(tmp_path / "out/photographs/objects/bird/test-duck.webp")
    assert (written.mode, written.size) == ("RGBA", (52, 40))  # cropped to what is visible
    assert (tmp_path / "out/photographs/places/sea/train-one.webp").is_file()
    (stamps / "duck.png").unlink()
    with pytest.raises(ValueError, match=r"no animals/duck\.png"):
        sources.write_photographs(tmp_path, tmp_path / "out")


def test_a_client_that_fails_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not installed; do this"):
        sources._run(["no-such-client"], tmp_path, "do this")
    with pytest.raises(ValueError, match=r"false .* failed: no message; do this"):
        sources._run(["false", "now"], tmp_path, "do this")


# ------------------------------------------------------------------ base


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, features and a base after two steps of each stage."""
    out = write_standins(tmp_path_factory.mktemp("built"))
    for split in ("train", "validation", "test"):
        extract(tiny_tower(), load_photographs(split, out), split, 0, IMAGES, out, QUIET)
    scenes = Scenes(*load_features(out, "train", 0, IMAGES))
    others = Scenes(*load_features(out, "validation", 0, IMAGES), like=scenes)
    budget = Budget(steps=2, lr=1e-3, extensions=0, attempts=1, gate=0.0, report_every=10, exam=IMAGES)
    patches = run_stage(PatchStage(scenes, others), budget, 0, out, QUIET)
    joint = run_stage(JointStage(scenes, others, patches, batch=2), budget, 0, out, QUIET)
    save_reader(reader_weights(joint.reader, scenes.mean, scenes.std), out / "asset")
    write_card(out / "asset", measure(joint.reader, others, others, QUIET), IMAGES, 2, 0)
    publish(assemble(tiny_tower(), load_reader(out / "asset")), out / "photo_llava")
    torch.save(joint.reader.state_dict(), out / "reader.pt")
    return out


@pytest.fixture
def photo_base(built: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TPCOMPRESS_PHOTOS", str(built))
    return "photo_llava"


def test_extraction_goes_on_where_it_stopped(built: Path) -> None:
    folder = built / "features" / "train-0"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    extract(tiny_tower(), load_photographs("train", built), "train", 0, IMAGES, built, QUIET)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(FileNotFoundError, match="run the build again"):
        load_features(built, "train", 0, 300)


def test_a_family_below_its_gate_stops_the_build(built: Path, tmp_path: Path) -> None:
    scenes = Scenes(*load_features(built, "train", 0, IMAGES))
    budget = Budget(steps=1, lr=1e-3, extensions=0, attempts=1, gate=100.0, exam=IMAGES)
    with pytest.raises(RuntimeError, match="missed its gate"):
        run_stage(PatchStage(scenes, scenes), budget, 0, tmp_path, QUIET)


def test_labels_name_what_patches_show(built: Path) -> None:
    _, layout, _ = scene_of(load_photographs("train", built), "train", 0, 0)
    matrix = label_matrix(layout).bool()
    assert (matrix[:, LABELS.index("top-left") : LABELS.index("top-left") + len(GROUPS["cell"])].sum(1) == 1).all()
    for item in layout.items:
        assert matrix[list(item.patches), LABELS.index(item.name)].all()
        if item.dot is not None:
            assert matrix[list(item.dot.patches), LABELS.index(item.dot.colour)].all()
    free = matrix[:, LABELS.index(layout.place)]
    assert not (free & matrix[:, : len(GROUPS["class"])].any(1)).any()


def test_the_base_sees_what_it_was_trained_on(built: Path, photo_base: str) -> None:
    """Pixels through tower and projector give the logits of cached features through the trained parts."""
    model, processor = load_base(photo_base), load_processor(photo_base)
    pixels, layout, questions = scene_of(load_photographs("test", built), "test", 0, 0)
    question = questions[1]
    inputs = processor(images=Image.fromarray(pixels), text=f"<image><bos> {question.text}", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 256
    reader = Reader(0)
    reader.load_state_dict(torch.load(built / "reader.pt", weights_only=True))
    train = Scenes(*load_features(built, "train", 0, IMAGES))
    test = Scenes(features_of(tiny_tower(), [pixels]), [layout], like=train)
    with torch.no_grad():
        ours = answer_logits(reader.eval(), reader.projector(test.standard([0])), pack_questions([[question]]))
        theirs = model(**inputs).logits[:, 256:]
    assert torch.allclose(ours[:, : theirs.shape[1]], theirs, atol=0.05)  # fp16 on the way
    assert len(VOCABULARY) == theirs.shape[-1]


def test_blind_answers_do_not_depend_on_the_scene(built: Path) -> None:
    reader = Reader(0)
    train = Scenes(*load_features(built, "train", 0, IMAGES))
    other = Scenes(torch.randn_like(train.features.float()).half(), train.layouts, like=train)
    scores = [exact_match(reader, scenes, "train", IMAGES, blind=True) for scenes in (train, other)]
    assert scores[0] == scores[1]


def test_the_card_has_every_family(built: Path) -> None:
    card = (built / "asset" / "README.md").read_text()
    assert "| colour* |" in card
    assert "**mean**" in card
    assert (built / "asset" / "reader.safetensors").stat().st_size < 5e6


# ------------------------------------------------------------------ task


def test_the_oracle_keeps_the_evidence(photo_base: str) -> None:
    task = create_task({"type": "photos", "num_images": 2})
    model, processor = load_base(photo_base), load_processor(photo_base)
    kept: list[torch.Tensor] = []
    attach(model, oracle_plan(task, Keep(keep_tokens=KEPT)))
    try:
        prepared = task.prepare(processor, pack=False)
        task.score(model, processor, prepared, watch=lambda trace, _: kept.extend(trace.stages[0].retained_RV))
    finally:
        detach(model)
    evidence = [places for asked in task.evidence() for places in asked]
    assert len(kept) == len(evidence)
    for retained, places in zip(kept, evidence, strict=True):
        assert int(retained.sum()) == KEPT
        assert set(retained.nonzero()[:, 0].tolist()) >= set(places[:KEPT])


def test_the_tower_sees_each_picture_once(photo_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base(photo_base).eval()
    tower, seen = model.model.vision_tower, []
    plain = type(tower).forward
    monkeypatch.setattr(type(tower), "forward", lambda self, x, **kw: (seen.append(len(x)), plain(self, x, **kw))[1])
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = [torch.stack(list(model.model.get_image_features(x).pooler_output)) for x in (pixels, pixels[1:])]
        del seen[:]
        with remembered(model):
            for x, features in zip((pixels, pixels[1:]), expected, strict=True):
                assert torch.equal(torch.stack(list(model.model.get_image_features(x).pooler_output)), features)
        assert seen == [2]
        with remembered(attached(model, "fastervlm")):  # it reads the tower's layers
            model.model.get_image_features(pixels)
        detach(model)
        assert seen[1:] == [2]
    assert "forward" not in vars(tower)


def attached(model: Any, pruner: str) -> Any:
    attach(model, PruningPlan([Stage(pruner, keep_tokens=KEPT)]))
    return model


def test_a_comparison_has_oracle_and_blind_rows(photo_base: str, tmp_path: Path) -> None:
    task = {"type": "photos", "num_images": 2}
    comparison = Comparison(base=photo_base, task=task, budgets=(KEPT,), training_free=(FreePruner("uniform"),))
    report = run_comparison(comparison, tmp_path, QUIET)
    rows = {(row.arm, row.pruner): row for row in report.rows}
    assert set(rows) == {("dense", None), ("training_free", "uniform"), ("oracle", None)}
    assert rows["oracle", None].retained_tokens == KEPT
    assert "blind" in report.meta
    text = report_markdown(report)
    assert "oracle: the tokens that each question rests on" in text
    assert "in exist, cell, small, it knows the answer" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "at least 1"),
        ({"split": "dev"}, "train, validation, test"),
        ({"dot": [1, 2]}, "range of pixels"),
        ({"small": 30}, "range of pixels"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        create_task({"type": "photos", **arguments})


def test_its_arguments_survive_a_file(photo_base: str) -> None:
    task = create_task({"type": "photos", "num_images": 2, "dot": [20, 24]})
    assert create_task(task.config()).sizes == task.sizes
    assert task.sizes.dot == (20, 24)
