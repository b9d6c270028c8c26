"""Smaller images: exact grids, the encoder's own interpolation, nothing left behind, and the comparison's arm."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from PIL import Image
from rich.console import Console
from support import family_folder, tiny_model
from transformers import CLIPImageProcessorPil

from tpcompress import PruningPlan, Stage, attach, detach, record
from tpcompress.data import ChatCollator, PromptCollator
from tpcompress.evaluation.compare.accuracy_figure import accuracy_figure
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.evaluation.compare.findings import findings
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.evaluation.compare.write import report_markdown
from tpcompress.evaluation.downsample import CannotDownsample, downsampled, smaller_grid
from tpcompress.evaluation.engine.counts import mean_vision_tokens
from tpcompress.evaluation.scoring.evaluate import evaluate, prepare
from tpcompress.evaluation.scoring.generate import evaluate_by_generation
from tpcompress.families import resolve
from tpcompress.insertion.encode import layouts_of
from tpcompress.models import load_base, load_processor


@pytest.mark.parametrize(
    ("grid", "keep", "expected"),
    [
        ((12, 12), 16, (4, 4)), ((12, 12), 36, (6, 6)), ((12, 12), 1, (1, 1)), ((12, 12), 2, (1, 1)),
        ((12, 12), 18, (4, 4)), ((12, 12), 20, (5, 4)), ((12, 12), 144, (12, 12)), ((12, 12), 900, (12, 12)),
        ((24, 24), 64, (8, 8)), ((24, 24), 128, (11, 11)), ((24, 24), 192, (16, 12)), ((8, 16), 32, (4, 8)),
        ((2, 16), 1, (1, 1)),
    ],
)  # fmt: skip
def test_grids_are_exact_where_the_shape_allows_it_else_the_next_smaller(grid, keep, expected):
    assert smaller_grid(*grid, keep) == expected


@pytest.mark.parametrize("keep", [1, 4, 12, 25, 64])
def test_batches_have_as_many_placeholders_as_the_encoder_makes(vqa, processor, rows, keep):
    with downsampled(vqa, processor, keep) as smaller:
        batch = ChatCollator(smaller.processor, pack=True)(list(rows.select(range(3))))
        (layout, *_) = layouts_of(resolve(vqa), batch)["image"]
        assert (layout.grids[0].rows, layout.grids[0].cols) == smaller.grid
        assert mean_vision_tokens(vqa, [batch]) == layout.count == smaller.grid[0] * smaller.grid[1] <= keep
        batch.pop("meta")
        assert torch.isfinite(vqa(**batch).logits).all()


def test_the_tower_interpolates_by_itself(vqa, processor, rows):
    """The features are those of the tower asked directly, on the image resized without us."""
    plain = PromptCollator(processor)([dict(rows[0])])["pixel_values"][:1]
    small = torch.nn.functional.interpolate(plain, (16, 24), mode="bilinear", antialias=True, align_corners=False)
    wanted = vqa.model.get_image_features(small, interpolate_pos_encoding=True, return_dict=True).pooler_output[0]
    with downsampled(vqa, processor, 24) as smaller:
        assert smaller.grid == (6, 4)
    with downsampled(vqa, processor, 24) as smaller:
        pixels = PromptCollator(smaller.processor)([dict(rows[0])])["pixel_values"][:1]
        assert tuple(pixels.shape) == (1, 3, 24, 16)
        got = vqa.model.get_image_features(small, return_dict=True).pooler_output[0]
    torch.testing.assert_close(got, wanted, atol=0, rtol=0)


def test_afterwards_model_and_processor_are_as_before(vqa, processor, rows):
    before = evaluate(vqa, processor, rows)
    with pytest.raises(KeyError, match="inside"), downsampled(vqa, processor, 16):
        raise KeyError("inside")
    assert not resolve(vqa).vision_tower._forward_pre_hooks
    assert (evaluate(vqa, processor, rows).value_IF == before.value_IF).all()
    shown = repr(processor)
    with downsampled(vqa, processor, 16) as smaller:
        assert "LlavaProcessor" in repr(smaller.processor)
    assert repr(processor) == shown
    with downsampled(vqa, processor, 64) as smaller:  # the whole grid is the model as it is
        assert evaluate(vqa, smaller.processor, rows).overall("log_likelihood") == before.overall("log_likelihood")


def test_scores_and_generation_agree(vqa, processor, rows):
    with downsampled(vqa, processor, 16) as smaller:
        scored = evaluate(vqa, smaller.processor, rows)
        generated = evaluate_by_generation(vqa, smaller.processor, rows)
    assert (scored.value_IF == generated.value_IF).all()


def test_a_plan_prunes_what_a_smaller_picture_has(vqa, processor, rows):
    attach(vqa, PruningPlan([Stage("divprune", keep_tokens=5)]))
    with downsampled(vqa, processor, 16) as smaller:
        batch = ChatCollator(smaller.processor, pack=True)(list(rows.select(range(2))))
        batch.pop("meta")
        with record(vqa) as trace:
            vqa(**batch)
    assert (trace.stages[0].vision_in, trace.stages[0].vision_out) == ([16, 16], [5, 5])
    detach(vqa)


def test_a_tower_without_a_class_token():
    model = tiny_model("llava", "siglip_vision_model")
    token, pictures = resolve(model).placeholder_ids["image"], CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )  # fmt: skip

    class Processor(SimpleNamespace):
        image_token = "<image>"

        def __call__(self, text, images, return_tensors):
            made = dict(self.image_processor(images=images, return_tensors=return_tensors))
            count = made["pixel_values"].shape[-1] * made["pixel_values"].shape[-2] // 16
            return made | {"input_ids": torch.full((1, count), token)}

    with downsampled(model, Processor(image_processor=pictures), 20) as smaller:
        made = smaller.processor(text=["<image>"], images=[Image.new("RGB", (50, 40))], return_tensors="pt")
        assert smaller.grid == (5, 4)
        assert model(**made).logits.shape[1] == 20


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("keep", [4, 10])
def test_processors_that_choose_a_size_get_a_lower_limit(name, keep):
    model = tiny_model(name)
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2VL", "qwen3_vl": "Qwen2VL"}[name]
    settings = getattr(transformers, f"{kind}ImageProcessorPil")(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 8192}
    )
    token = resolve(model).placeholder_ids["image"]

    class Processor(SimpleNamespace):
        image_token = "<image>"

        def __call__(self, text, images, return_tensors):
            made = dict(self.image_processor(images=images, return_tensors=return_tensors))
            count = int(made["image_grid_thw"].prod() // self.image_processor.merge_size**2)
            return made | {"input_ids": torch.full((1, count), token)}

    processor = Processor(image_processor=settings)
    picture = Image.new("RGB", (90, 60))
    with downsampled(model, processor, keep) as smaller:
        assert smaller.grid is None
        made = smaller.processor(text=["<image>"], images=[picture], return_tensors="pt")
        (layout,) = layouts_of(resolve(model), made)["image"]
        assert keep / 2 <= layout.count <= keep
        assert mean_vision_tokens(model, [made]) == layout.count
    assert settings.size["longest_edge"] == 8192


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("internvl", marks=pytest.mark.slow)])
def test_processors_that_split_images_split_them_less(name):
    folder = family_folder(name)
    model, processor = load_base(str(folder)).eval(), load_processor(str(folder))
    parts = resolve(model)
    token, counts = parts.placeholder_ids["image"], {}
    for edge in (1, 2, 4, 8):
        text, image = [processor.image_token], Image.new("RGB", (64 * edge, 64))
        counts[edge] = int((processor(text=text, images=[image], return_tensors="pt")["input_ids"] == token).sum())
    fewest, most = min(counts.values()), max(counts.values())
    for keep in (most, most // 2):
        with downsampled(model, processor, keep) as smaller:
            made = smaller.processor(text=text, images=[image], return_tensors="pt")
            assert int((made["input_ids"] == token).sum()) <= keep
    with pytest.raises(CannotDownsample, match=r"one tile is \d+ tokens"):
        downsampled(model, processor, 1).__enter__()
    assert fewest < most


def test_what_cannot_be_made_smaller_is_one_line(vqa, processor, monkeypatch):
    with pytest.raises(ValueError, match=r"^keep_tokens must be a whole number of at least 1, got 0\.$"):
        downsampled(vqa, processor, 0).__enter__()
    fixed = type(processor).replace_image_token
    monkeypatch.setattr(type(processor), "replace_image_token", lambda self, *a, **k: "<image>" * 64)
    with pytest.raises(ValueError, match="^[^\n]*llava cannot be downsampled[^\n]*64 placeholders[^\n]*$"):
        downsampled(vqa, processor, 16).__enter__()
    assert not resolve(vqa).vision_tower._forward_pre_hooks
    monkeypatch.setattr(type(processor), "replace_image_token", fixed)
    tiles = SimpleNamespace(image_processor=lambda images, return_tensors: {"pixel_values": torch.zeros(1, 5, 3, 8, 8)})
    with pytest.raises(ValueError, match="splits images into tiles"):
        downsampled(vqa, tiles, 16).__enter__()
    with pytest.raises(ValueError, match="^[^\n]*cannot be downsampled[^\n]*$"):
        downsampled(tiny_model("got_ocr2"), tiles, 16).__enter__()


def test_the_arm_has_its_own_rows_and_is_resumed(tmp_path, monkeypatch):
    values = {"budgets": [16, 0.14], "num_images": 6, "downsample": True, "training_free": ["uniform"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    config, out = str(tmp_path / "c.yaml"), tmp_path / "out"
    report = run_comparison(config, out, Console(quiet=True))
    rows = {row.keep_tokens: row for row in report.arm("downsample")}
    assert {keep: row.retained_tokens for keep, row in rows.items()} == {16: 16, 0.14: 20}
    assert rows[0.14].note.startswith("20 tokens, 5 x 4")
    assert all(row.pruner is None and row.num_images == 6 for row in rows.values())
    assert "| smaller image | 0.14 / 20 / 20 |" in report_markdown(report)
    assert any(sentence.startswith("Smaller images of 16 tokens score") for sentence in findings(report))
    monkeypatch.setattr("tpcompress.evaluation.compare.cells.downsampled", lambda *a: pytest.fail("scored again"))
    before = json.loads((out / "report.json").read_text())
    run_comparison(config, out, Console(quiet=True))
    assert json.loads((out / "report.json").read_text()) == before
    direct = prepare_and_score(16, 6)
    assert rows[16].families == pytest.approx(direct.families)


def prepare_and_score(keep: int, num_images: int):
    from tpcompress.data.benchmark import load_benchmark

    model, processor = load_base("tiny_llava").eval(), load_processor("tiny_llava")
    with downsampled(model, processor, keep) as smaller:
        data = prepare(smaller.processor, load_benchmark("test", num_images, 0))
        return evaluate(model, smaller.processor, data)


def test_it_is_off_unless_asked_for():
    assert not Comparison().downsample
    report = Report([Row("dense", score=0.9, learnt=["a"], families={"a": 0.9})])
    assert not any("Smaller" in sentence for sentence in findings(report))


@pytest.mark.parametrize("budgets", [[16], [16, 36]])
def test_the_figure_draws_the_arm(budgets, tmp_path):
    rows = [Row("dense", retained_tokens=144, score=0.9)]
    for keep in budgets:
        rows.append(Row("downsample", None, keep, 144, keep, score=0.2, ci95=0.02))
        rows.append(Row("training_free", "pool", keep, 144, keep, score=0.6, ci95=0.02))
    accuracy_figure(Report(rows), tmp_path / "with.png")
    accuracy_figure(Report([row for row in rows if row.arm != "downsample"]), tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
