"""`tpcompress inspect`: what is counted, what is drawn where, and one line for every mistake."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from support import scramble
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tpcompress as tp
from tpcompress.cli.main import main
from tpcompress.evaluation.figures.overlay import (
    Panel,
    background_images,
    grids_of,
    kept_grids,
    panels_figure,
    stage_panels,
)
from tpcompress.evaluation.inspect import (
    cache_columns,
    inspect_prefill,
    load_subject,
    run_inspection,
)
from tpcompress.evaluation.prompt import chat_inputs
from tpcompress.families import Layout, list_families
from tpcompress.families.layout import Grid
from tpcompress.families.tiny import IMAGE
from tpcompress.insertion.trace import StageTrace
from tpcompress.models import load_processor
from tpcompress.training.recipe.export import export_free

ROOT = Path(__file__).resolve().parents[2]
RED = (220, 30, 30)
PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% else %} {{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words 0 to 99, and `<image>` where the tiny configs have their placeholder."""
    vocab = {f"w{i}": i for i in range(IMAGE)} | {"<image>": IMAGE}
    made = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w3", pad_token="w0", additional_special_tokens=["<image>"]
    )


class Stub:
    """A processor of a real image processor; those of Qwen and GOT-OCR 2 need packages or words of their own."""

    image_token = "<image>"
    chat_template = PARTS

    def __init__(self, image_processor: Any, count: Any, more: Any) -> None:
        self.image_processor, self.tokenizer, self.count, self.more = image_processor, tokenizer(), count, more

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, chat_template=PARTS, **options)

    def __call__(self, text, images, return_tensors, add_special_tokens):
        pixels = self.image_processor(images, return_tensors=return_tensors)
        text = text[0].replace(self.image_token, " ".join([self.image_token] * self.count(pixels)))
        words = self.tokenizer([text], return_tensors=return_tensors, add_special_tokens=add_special_tokens)
        return {
            "input_ids": words["input_ids"],
            "attention_mask": words["attention_mask"],
            **self.more(words),
            **pixels,
        }


class TextOnly(Stub):
    """A processor that drops the image."""

    def __init__(self) -> None:
        super().__init__(None, None, None)

    def __call__(self, text, images, **options):
        return dict(self.tokenizer([text[0].replace("<image>", "")], **options))


def got_ocr2() -> Stub:
    """Tiles of 16 tokens without a gap."""
    config = list_families()["got_ocr2"].tiny.config().vision_config
    sizes = {"height": config.image_size, "width": config.image_size}
    images = GotOcr2ImageProcessorPil(size=sizes, crop_to_patches=True, min_patches=1, max_patches=4)
    side = config.image_size // config.patch_size // 4
    images.model_input_names = ["pixel_values"]
    return Stub(images, lambda pixels: len(pixels["pixel_values"]) * side**2, lambda words: {})


def qwen() -> Stub:
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=96 * 96)
    types = lambda words: {"mm_token_type_ids": (words["input_ids"] == IMAGE).long()}  # noqa: E731
    return Stub(images, lambda pixels: int(pixels["image_grid_thw"].prod()) // 4, types)


def llava_next() -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    return LlavaNextProcessor(
        images, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=PARTS,
    )  # fmt: skip


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return scramble(AutoModelForImageTextToText.from_config(list_families()[family].tiny.config()).eval())


def red(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def coloured(picture: np.ndarray) -> np.ndarray:
    """bool (height, width): pixels that have a colour, which dropped tokens have lost."""
    return np.ptp(picture[..., :3].astype(int), axis=-1) > 60


def looked_at(family: str, processor: Any, image: Image.Image, plan: str):
    model = tp.attach(model_of(family), tp.PruningPlan.of(plan))
    found = inspect_prefill(model, processor, image, "w5 w6")
    pictures = background_images(found.image, found.inputs, grids_of(found.stages[0]), processor.image_processor)
    return found, pictures, stage_panels(found.stages, ["s"] * len(found.stages), pictures)


# ------------------------------------------------------------------------------------------------------- families


def test_qwen_draws_the_grid_over_the_whole_picture():
    found, pictures, panels = looked_at("qwen2_5_vl", qwen(), red(160, 64), "uniform:30@0,random:7@3")
    (grid,) = grids_of(found.stages[0])
    _, rows, cols = found.inputs["image_grid_thw"][0].tolist()
    assert (grid.rows, grid.cols) == (rows // 2, cols // 2)
    assert grid.cols > grid.rows
    assert pictures == [found.image]
    for (panel,), kept in zip(panels, (30, 7), strict=True):
        cell = panel.pixels.shape[0] // grid.rows
        assert coloured(panel.drawn()).sum() == kept * cell**2
        assert panel.title == f"s\n{kept} of {grid.rows * grid.cols} tokens"
    whole, words = grid.rows * grid.cols, found.stages[0].sequence_in - grid.rows * grid.cols
    assert found.groups == [(0, 2, 30 + words), (3, 5, 7 + words)]
    assert found.cache_line == f"layers 0-2: {30 + words} columns, layers 3-5: {7 + words} columns"
    assert [(s.vision_in, s.vision_out) for s in found.stages] == [([whole], [30]), ([30], [7])]


def test_llava_next_draws_overview_and_tiles_over_the_whole_picture():
    found, pictures, panels = looked_at("llava_next", llava_next(), red(100, 50), "uniform:20@2")
    overview, tiles = grids_of(found.stages[0])
    assert (overview.rows, overview.cols, tiles.newline) == (4, 4, True)
    assert pictures == [found.image] * 2
    assert [panel.keep.shape for panel in panels[0]] == [(4, 4), (tiles.rows, tiles.cols)]
    kept = [coloured(p.drawn()).sum() / (p.pixels.shape[0] // p.keep.shape[0]) ** 2 for p in panels[0]]
    assert sum(kept) == 20
    assert kept == [p.keep.sum() for p in panels[0]]
    assert [p.title.split("\n")[0] for p in panels[0]] == ["s · part 1", "s · part 2"]


def test_every_tile_has_its_own_panel():
    image = red(48, 24)
    image.paste((20, 20, 220), (24, 0, 48, 24))
    found, pictures, panels = looked_at("got_ocr2", got_ocr2(), image, "random:5@0")
    assert len(found.inputs["pixel_values"]) == len(pictures) == len(panels[0]) == 3  # two tiles and the whole
    assert np.asarray(pictures[0])[8, 8].tolist() == pytest.approx(RED, abs=2)
    assert np.asarray(pictures[1])[8, 8].tolist() == pytest.approx((20, 20, 220), abs=2)
    assert sum(panel.keep.sum() for panel in panels[0]) == sum(found.stages[0].vision_out)


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
    (picture,) = background_images(
        found.image, found.inputs, grids_of(found.stages[0]), load_processor("tiny_llava").image_processor
    )
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


def test_grids_of_several_rows_are_cut_out_in_order():
    layouts = [(Layout((Grid(2, 3), Grid(1, 2))),), (Layout((Grid(2, 2),)),)]
    retained = torch.zeros(2, 8, dtype=torch.bool)
    retained[0, [1, 5, 7]] = True
    retained[1, [2]] = True
    kept = kept_grids(trace(layouts, retained))
    assert [k.tolist() for k in kept] == [
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
    under = background_images(red(8, 8), {"pixel_values": pixels}, grids, SimpleNamespace(do_normalize=False))
    assert [picture is not None for picture in under] == [placed] * len(grids)
    layout = (Layout(tuple(grids)),)
    stage = trace([layout], torch.ones(1, layout[0].count, dtype=torch.bool))
    (panels,) = stage_panels([stage], ["s"], under)
    assert ["no position" in panel.title for panel in panels] == [not placed] * len(grids)


def test_many_panels_stand_on_several_rows(tmp_path):
    panels = [[Panel.of(red(8, 8), np.ones((2, 2), bool), "t") for _ in range(6)]] * 2
    panels_figure(red(8, 8), panels, tmp_path / "many.png")
    panels_figure(red(8, 8), [row[:1] for row in panels], tmp_path / "few.png")
    with Image.open(tmp_path / "many.png") as many, Image.open(tmp_path / "few.png") as few:
        assert many.height / many.width > 1.5 * few.height / few.width


# ----------------------------------------------------------------------------------------------------- plan, prompt


def test_short_plans():
    plan = tp.PruningPlan.of("divprune:0.5,dart:64@8")
    assert [(s.pruner.name, s.layer, s.keep_ratio, s.keep_tokens) for s in plan.stages] == [
        ("divprune", 0, 0.5, None), ("dart", 8, None, 64)
    ]  # fmt: skip


def test_the_prompt_says_where_the_image_belongs():
    processor = llava_next()
    first, marked = (chat_inputs(processor, red(30, 30), text)["input_ids"][0] for text in ("w5 w6", "w5 <image> w6"))
    assert first[-2:].tolist() == [5, 6]
    assert (marked[0], marked[-1]) == (5, 6)
    assert (first == IMAGE).sum() == (marked == IMAGE).sum() > 16


def test_a_template_of_strings_gets_a_string():
    processor = llava_next()
    processor.chat_template = "{% for m in messages %}{{ m['content'].strip() }}{% endfor %}"
    ids = chat_inputs(processor, red(30, 30), "w5 w6")["input_ids"][0]
    assert ids[-2:].tolist() == [5, 6]
    assert (ids == IMAGE).sum() > 16


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
        ({"prompt": "<image> or <image>"}, "The prompt has 2 <image> for one image; give at most one."),
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


def test_templates_that_cannot_write_an_image():
    processor = llava_next()
    processor.chat_template = "{{ messages[0]['content'].nothing.at_all }}"
    with pytest.raises(ValueError, match="The chat template of LlavaNextProcessor does not render an image and a text"):
        chat_inputs(processor, red(8, 8), "w5")
    processor.chat_template = None
    with pytest.raises(ValueError, match="LlavaNextProcessor has no chat template"):
        chat_inputs(processor, red(8, 8), "w5")


def test_a_processor_of_another_model_is_noticed():
    model = tp.attach(model_of("qwen2_5_vl"), tp.PruningPlan.of("uniform:9"))
    with pytest.raises(ValueError, match="No vision token reached the language model"):
        inspect_prefill(model, TextOnly(), red(8, 8), "w5")


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
