"""`tpcompress inspect`: what is counted, what is drawn where, and one line for every mistake."""

from __future__ import annotations

import io
import re
import shlex
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from rich.console import Console
from support import scramble
from transformers import AutoModelForImageTextToText, LlamaConfig

import tpcompress as tp
from tpcompress.cli.main import main
from tpcompress.evaluation.figures.fields import fields_of
from tpcompress.evaluation.figures.overlay import Panel, media_panels, panels_figure, stage_panels
from tpcompress.evaluation.inspect import (
    cache_columns,
    inspect_prefill,
    load_subject,
    run_inspection,
)
from tpcompress.evaluation.prompt import Media, chat_inputs
from tpcompress.families import Layout, list_families
from tpcompress.families.layout import Grid
from tpcompress.insertion.trace import StageTrace
from tpcompress.models import load_processor
from tpcompress.training.recipe.export import export_free

ROOT = Path(__file__).resolve().parents[2]
RED = (220, 30, 30)


@cache
def processor_of(family: str) -> Any:
    """The processor of a family's tiny model."""
    return list_families()[family].tiny.processor(config_of(family))


def config_of(family: str) -> Any:
    tiny = list_families()[family].tiny
    return tiny.config(*(tiny.saved or tiny.variants[0]))  # what the processor of the family makes


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return scramble(AutoModelForImageTextToText.from_config(config_of(family)).eval())


def red(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def coloured(picture: np.ndarray) -> np.ndarray:
    """bool (height, width): pixels that have a colour, which dropped tokens have lost."""
    return np.ptp(picture[..., :3].astype(int), axis=-1) > 60


def photo(width: int, height: int) -> Image.Image:
    """Each quarter another colour, all of them saturated."""
    image = red(width, height)
    image.paste((20, 20, 220), (width // 2, 0, width, height // 2))
    image.paste((20, 220, 20), (0, height // 2, width // 2, height))
    return image


def looked_at(family: str, media: Media, plan: str, tmp_path: Path) -> tuple[Any, list[Any]]:
    """The record of a prefill and its fields; the figure is drawn, too."""
    model, processor = tp.attach(model_of(family), tp.PruningPlan.of(plan)), processor_of(family)
    found = inspect_prefill(model, processor, media, "w5 w6")
    fields = fields_of(found.stages[0], found.inputs, media, processor.image_processor)
    found.draw(processor.image_processor, tmp_path / "drawn.png")
    for stage in found.stages:
        assert sum(each.kept(stage).sum() for each in fields) == sum(stage.vision_out)
    assert sorted(np.concatenate([each.index.ravel() for each in fields]).tolist()) == everything(found.stages[0])
    return found, fields


def everything(stage: StageTrace) -> list[int]:
    """Number of every vision token in the flattened record."""
    V = stage.retained_RV.shape[1]
    return [row * V + place for row, total in enumerate(stage.total) for place in range(total)]


def like(field: Any, image: Image.Image) -> bool:
    """Whether the picture under a field looks like an image, or like the image padded to a square by the processor."""
    side, grey = max(image.size), tuple(int(value) for value in np.asarray(field.image.convert("RGB"))[0, 0])
    drawn, *given = (
        np.asarray(x.convert("RGB").resize((16, 16))).astype(float)
        for x in (field.image, image, ImageOps.pad(image, (side, side), color=grey))
    )
    return min(np.abs(drawn - each).mean() for each in given) < 30


# ------------------------------------------------------------------------------------------------------- families


def test_qwen_draws_each_grid_over_its_own_image(tmp_path: Path) -> None:
    media = Media([photo(160, 64), red(64, 96)])
    found, fields = looked_at("qwen2_5_vl", media, "uniform:3@0,random:2@3", tmp_path)
    assert [field.image for field in fields] == media.images
    assert [field.title for field in fields] == ["image 1", "image 2"]
    for field, grid in zip(fields, found.inputs["image_grid_thw"].tolist(), strict=True):
        assert field.index.shape == (grid[1] // 2, grid[2] // 2)
    panels = stage_panels(found.stages, ["s", "t"], fields)
    assert [panel.title for panel in panels[1]] == [
        f"t\nimage {n + 1}\n2 of {field.index.size} tokens" for n, field in enumerate(fields)
    ]
    for panel in panels[0]:
        cell = panel.pixels.shape[0] // panel.keep.shape[0]
        assert coloured(panel.drawn()).sum() == 3 * cell**2
    kept = [sum(stage.vision_out) for stage in found.stages]
    words = found.stages[0].sequence_in - sum(found.stages[0].total)
    depth = len(found.cache)
    assert found.groups == [(0, 2, kept[0] + words), (3, depth - 1, kept[1] + words)]
    assert found.cache_line.startswith(f"layers 0-2: {kept[0] + words} columns, layers 3-")


@pytest.mark.parametrize("family", ["smolvlm", "internvl"])
def test_tiles_are_put_together_again(family: str, tmp_path: Path) -> None:
    media = Media([photo(128, 64), photo(64, 128)])
    _, fields = looked_at(family, media, "random:3@0", tmp_path)
    for number, image in enumerate(media.images):
        mine = [field for field in fields if field.source == number]
        assert [field.title.split(" · ")[1] for field in mine][0] == "overview"
        assert mine[1].title.endswith(" tiles")
        assert all(like(field, image) for field in mine)
        rows, cols = mine[1].index.shape
        assert (cols > rows) == (image.width > image.height)


def test_gemma_draws_every_image_as_the_tower_gets_it(tmp_path: Path) -> None:
    media = Media([photo(90, 60), red(30, 60)])
    _, fields = looked_at("gemma3", media, "divprune:3@0", tmp_path)
    assert [like(field, image) for field, image in zip(fields, media.images, strict=True)] == [True, True]


def test_llava_next_draws_overview_and_tiles_over_the_whole_image(tmp_path: Path) -> None:
    media = Media([photo(100, 50)])
    _, fields = looked_at("llava_next", media, "uniform:9@2", tmp_path)
    assert [field.title for field in fields] == ["overview", "tiles"]
    assert [field.image for field in fields] == [*media.images] * 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_frames_lie_under_the_tokens_of_a_video(family: str, tmp_path: Path) -> None:
    colours = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)]
    media = Media(videos=[[Image.new("RGB", (64, 64), colour) for colour in colours]])
    found, fields = looked_at(family, media, "random:3@0", tmp_path)
    assert all(field.title.startswith("frame ") for field in fields)
    assert [field.image for field in fields] == [media.videos[0][n * 4 // len(fields)] for n in range(len(fields))]
    assert len(fields) in (2, 4)
    assert media_panels(media) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(list_families()))
def test_every_family_is_drawn(family: str, tmp_path: Path) -> None:
    _, fields = looked_at(family, Media([photo(120, 70)]), "random:0.25@0", tmp_path)
    placed = [field for field in fields if field.image is not None]
    assert all(like(field, photo(120, 70)) for field in placed if field.index.shape[0] > 1 and len(fields) == 1)


def test_the_bundled_model_sees_the_middle_of_a_wide_picture(tmp_path):
    image = red(200, 100)
    image.paste((0, 255, 0), (0, 0, 40, 100))  # cropped away
    path = tmp_path / "wide.png"
    image.save(path)
    printed = io.StringIO()
    found = run_inspection(
        "tiny_llava", str(path), "what ?", "divprune:36", str(tmp_path / "new" / "out.png"), "float32", "cpu",
        Console(file=printed, width=120),
    )  # fmt: skip
    assert found.cache == [found.stages[0].sequence_out] * 2
    assert found.stages[0].sequence_in - found.stages[0].sequence_out == 144 - 36
    assert "144 -> 36" in printed.getvalue()
    assert f"layers 0-1: {found.cache[0]} columns" in printed.getvalue()
    image_processor = load_processor("tiny_llava").image_processor
    (field,) = fields_of(found.stages[0], found.inputs, found.media, image_processor)
    picture = field.image
    assert picture.size == (96, 96)
    assert (np.asarray(picture)[..., 1] > 200).sum() == 0
    with Image.open(tmp_path / "new" / "out.png") as file:
        drawn = np.asarray(file.convert("RGB"))
    panel = drawn[:, drawn.shape[1] // 2 :]
    painted = coloured(panel)
    pale = (panel < 240).all(-1) & (panel > 150).all(-1)
    assert painted.sum() / (painted | pale).sum() == pytest.approx(36 / 144, abs=0.02)


# -------------------------------------------------------------------------------------------------------- drawing


def trace(layouts: list[tuple[Layout, ...]], retained: torch.Tensor) -> StageTrace:
    total = [sum(layout.count for layout in row) for row in layouts]
    return StageTrace(0, 2, total, total, retained.sum(1).tolist(), 9, 5, retained, [0] * len(total), layouts)


def test_tokens_of_several_rows_are_counted_through() -> None:
    layouts = [(Layout((Grid(2, 3), Grid(1, 2))),), (Layout((Grid(2, 2),)),)]
    retained = torch.zeros(2, 8, dtype=torch.bool)
    retained[0, [1, 5, 7]] = True
    retained[1, [2]] = True
    stage = trace(layouts, retained)
    fields = fields_of(stage, {}, Media([red(8, 8), red(8, 8)]), None)
    assert [field.kept(stage).tolist() for field in fields] == [
        [[False, True, False], [False, False, True]], [[False, True]], [[False, False], [True, False]]
    ]  # fmt: skip


def test_a_panel_stretches_the_picture_to_whole_pixels_for_each_token():
    keep = np.zeros((3, 7), bool)
    keep[2, 6] = True
    panel = Panel.of(red(50, 50), keep)
    tall, wide = panel.pixels.shape[0] // 3, panel.pixels.shape[1] // 7
    assert panel.pixels.shape == (3 * tall, 7 * wide, 3)
    assert tall == wide
    painted = coloured(panel.drawn())
    assert painted[2 * tall :, 6 * wide :].all()
    assert painted.sum() == tall * wide


@pytest.mark.parametrize(
    ("grids", "pixels", "placed"),
    [
        ([Grid(1, 64)], torch.zeros(1, 3, 8, 8), False),  # a resampler
        ([Grid(2, 2)] * 3, torch.zeros(3, 30, 48), False),  # tiles of any size
        ([Grid(2, 2)] * 3, torch.zeros(1, 3, 3, 8, 8), True),
        ([Grid(4, 6)], torch.zeros(96, 3, 4, 4), True),  # a list of patches
        ([Grid(2, 2), Grid(2, 2, newline=True)], torch.zeros(1, 2, 3, 8, 8), True),
        ([Grid(4, 6)], None, True),
    ],
)
def test_what_has_no_place_in_the_picture_lies_over_an_empty_field(grids, pixels, placed):
    layout = (Layout(tuple(grids)),)
    stage = trace([layout], torch.ones(1, layout[0].count, dtype=torch.bool))
    fields = fields_of(stage, {"pixel_values": pixels}, Media([red(8, 8)]), SimpleNamespace(do_normalize=False))
    assert [field.image is not None for field in fields] == [placed] * len(grids)
    (panels,) = stage_panels([stage], ["s"], fields)
    assert ["no position" in panel.title for panel in panels] == [not placed] * len(grids)


def test_titles_fit_their_panels(tmp_path):
    long = "stage 0 · layer 12 · learned_gate of a long name\nimage 2 · 3 x 4 tiles\n64 of 768 tokens"
    panels = [[Panel.of(red(8, 8), np.ones((2, 2), bool), long)] * 3]
    panels_figure(media_panels(Media([red(8, 8)] * 2)), panels, tmp_path / "long.png")
    with Image.open(tmp_path / "long.png") as file:
        drawn = np.asarray(file.convert("L"))
    assert (drawn[:, :4] == 255).all()
    assert (drawn[:, -4:] == 255).all(), "no title runs over the edge"
    assert (drawn[:4] == 255).all()


def test_many_panels_stand_on_several_rows(tmp_path):
    panels = [[Panel.of(red(8, 8), np.ones((2, 2), bool), "t") for _ in range(6)]] * 2
    panels_figure(media_panels(Media([red(8, 8)])), panels, tmp_path / "many.png")
    panels_figure(media_panels(Media([red(8, 8)])), [row[:1] for row in panels], tmp_path / "few.png")
    with Image.open(tmp_path / "many.png") as many, Image.open(tmp_path / "few.png") as few:
        assert many.height / many.width > 1.5 * few.height / few.width


# ----------------------------------------------------------------------------------------------------- plan, prompt


def test_short_plans():
    plan = tp.PruningPlan.of("divprune:0.5,dart:64@8")
    assert [(s.pruner.name, s.layer, s.keep_ratio, s.keep_tokens) for s in plan.stages] == [
        ("divprune", 0, 0.5, None), ("dart", 8, None, 64)
    ]  # fmt: skip


def test_the_prompt_says_where_the_images_belong():
    processor, image = processor_of("qwen2_5_vl"), red(30, 30)
    marker = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    first, marked = (chat_inputs(processor, Media([image] * 2), text)["input_ids"][0].tolist()
                     for text in ("hello you", "<image> one two three four five <image> you"))  # fmt: skip
    assert first.count(marker) == marked.count(marker) > 2
    gaps = [[ids[n + 1] - ids[n] for n in range(len(ids) - 1)] for ids in
            ([n for n, token in enumerate(ids) if token == marker] for ids in (first, marked))]  # fmt: skip
    assert max(gaps[1]) > max(gaps[0])


def test_a_sliding_layer_says_what_it_holds_and_a_recurrent_one_that_it_has_none():
    class Held:
        keys = torch.zeros(1, 2, 9, 4)

    parts = SimpleNamespace(layers=[0, 1, 2], model=SimpleNamespace(config=None))
    parts.family = SimpleNamespace(keys_of=lambda config, layer: min(layer, 1))
    assert cache_columns(parts, SimpleNamespace(layers=[SimpleNamespace(), Held()])) == [None, 9, 9]


# --------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def image(tmp_path) -> str:
    red(20, 20).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_an_exported_folder_brings_its_plan(tmp_path, image):
    (tmp_path / "plan.yaml").write_text("{pruner: uniform, keep_tokens: 16}")
    export_free("tiny_llava", tmp_path / "plan.yaml", tmp_path / "export")
    for given, kept in ((None, 16), ("random:9", 9)):
        model, processor = load_subject(str(tmp_path / "export"), given and tp.PruningPlan.of(given), "float32", "cpu")
        found = inspect_prefill(model, processor, Image.open(image), "what ?")
        assert found.stages[0].vision_out == [kept]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "gone.png"}, "No image file gone.png; give an image"),
        ({"image": __file__}, "is not a readable image; give an intact file"),
        ({"model": "/gone"}, "No folder /gone; give a folder, a hub id"),
        ({"prompt": " "}, "is empty; give a question"),
        ({"prompt": "<image> or <image>"}, "The prompt has 2 <image> for 1 image; give none, or one for each."),
        ({"image": None}, "There is no image and no video; give --image, --video or both."),
        ({"video": "gone.mp4"}, "No video gone.mp4; give a file such as an MP4."),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"plan": None}, "tiny_llava has no plan of its own; give --plan"),
        ({"plan": "gone.yaml"}, "No plan at gone.yaml; give a pruner with a budget"),
        (
            {"plan": "divprune"},
            "Pruner 'divprune' needs a budget; give keep_tokens or",
        ),
        ({"plan": "divprun:9"}, "Did you mean divprune?"),
        ({"plan": "uniform:9@2"}, "Stage 0 acts at layer 2, but the model has 2"),
        ({"plan": "learned_gate:9"}, "Pruner 'learned_gate' has weights to train; inspect an exported folder"),
        ({"out": "picture"}, "--out picture is not the name of a PNG file; give one such as inspect.png."),
        ({"dtype": "int8"}, "dtype must be one of float32"),
    ],
)
def test_mistakes_are_one_line(change, message, image, tmp_path):
    given = {
        "model": "tiny_llava", "image": image, "prompt": "what ?", "plan": "uniform:9", "out": str(tmp_path / "o.png"),
        "dtype": "float32", "device": "cpu", "console": Console(file=io.StringIO()),
    }  # fmt: skip
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run_inspection(**(given | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_hold_no_model_of_ours(tmp_path):
    plan = tp.PruningPlan.of("uniform:9")
    LlamaConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="'llama' is not a known family"):
        load_subject(str(tmp_path / "text"), plan, "float32", "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="^No model at "):
        load_subject(str(tmp_path / "empty"), plan, "float32", "cpu")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    with pytest.raises(ValueError, match="^No model at .* Give a complete model folder.$"):
        load_subject(str(tmp_path / "broken"), plan, "float32", "cpu")


def test_a_prompt_without_images_is_noticed():
    model = tp.attach(model_of("llava"), tp.PruningPlan.of("uniform:3"))
    with pytest.raises(ValueError, match="No vision token reached the language model"):
        inspect_prefill(model, processor_of("llava"), Media(), "w5")


def test_the_command_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    (command,) = re.findall(
        r"^tpcompress (inspect .*)$", (ROOT / "scripts/docs_site/guides/prune.md").read_text(), re.M
    )
    words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    red(120, 90).save(words[words.index("--image") + 1])
    assert main(words) == 0
    assert "144 -> 36" in capsys.readouterr().out
    assert (tmp_path / "inspect.png").stat().st_size > 1000
