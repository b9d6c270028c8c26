"""Helpers of the tests: tiny random models, batches with images, token views, and a reference made without us."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tpcompress.families import Parts, list_families, resolve
from tpcompress.families.tiny import IMAGE, VIDEO
from tpcompress.insertion.views.available import why_unavailable
from tpcompress.pruners import Pruner, TokenView, create, list_pruners
from tpcompress.pruners.base import INSTRUCTION, SYSTEM
from tpcompress.pruners.views import VIEWS, fields_of

VARIANTS = {name: list(cls.test_arguments) for name, cls in list_pruners().items() if cls.test_arguments}
"""Arguments worth testing besides the defaults; every registered pruner is tested with its defaults in any case."""

INEXACT = {name: list(cls.inexact_arguments) for name, cls in list_pruners().items() if cls.inexact_arguments}
"""Arguments with which a pruner chooses its own count: adaptive thresholds, and counts of official code."""


def pruner_configs() -> list[dict[str, Any]]:
    """Every registered pruner that retains its budget, with its defaults and the variants above."""
    return [
        {"type": name, **more}
        for name, cls in list_pruners().items()
        for more in [{}, *VARIANTS.get(name, [])]
        if not cls.keeps_none
    ]


def inexact_configs() -> list[dict[str, Any]]:
    """Every pruner that chooses its own count."""
    return [{"type": name, **more} for name, variants in INEXACT.items() for more in variants]


def placed_configs(*layers: int) -> list[tuple[dict[str, Any], int]]:
    """(config, layer) of every pruner that a tiny LLaVA offers its views at one of these layers, and that repeats."""
    return [
        (config, layer)
        for config in pruner_configs()
        for layer in layers
        if not config.get("resample") and why_unavailable(_llava_parts(), create(dict(config)), layer) is None
    ]


def every_placed(*layers: int) -> pytest.MarkDecorator:
    """A test over `placed_configs`, each config at the first of these layers where it can be.

    What a model does with a pruner depends on its views and flags alone: of the pruners that agree in these the first
    runs by default, and all of them where slow tests run. What each pruner chooses is the subject of tests/pruners.
    """
    pairs = sorted(placed_configs(*layers), key=lambda pair: layers.index(pair[1]))
    found, ways, params = set(), set(), []
    for config, layer in pairs:
        name, pruner = config_id(config), create(dict(config))
        if name in found:
            continue
        found.add(name)
        way = (pruner.needs, pruner.merges, pruner.uses_token_sizes, pruner.learned, pruner.gates, pruner.exact_count)
        marks = [pytest.mark.slow] if way in ways else []
        ways.add(way)
        params.append(pytest.param(config, layer, marks=marks, id=f"{name}-layer={layer}"))
    return pytest.mark.parametrize(("config", "layer"), params)


@cache
def _llava_parts() -> Parts:
    return resolve(tiny_model())


def config_id(config: dict[str, Any]) -> str:
    """Readable and unique; a pruner inside another shows in brackets."""
    words = (f"{k}=({config_id(v)})" if isinstance(v, dict) else f"{k}={v}" for k, v in config.items() if k != "type")
    return "-".join([config["type"], *words])


def scramble(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Weights large enough that every part matters."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        fan = p[0].numel() if p.ndim >= 2 else 1
        p.data = torch.randn(p.shape, generator=g) * fan**-0.5 if p.ndim >= 2 else p.data
    return module


def make_pruner(config: dict[str, Any], hidden_size: int = 16) -> Pruner:
    """A pruner with weights, in inference mode."""
    pruner = create(dict(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pruner.build(hidden_size)
    scramble(pruner)
    return pruner.eval()


# ---------------------------------------------------------------------------------------------------- token views


def make_view(
    pruner: Pruner, vision_BVD: Tensor, grid: tuple[int, int] | None = None, soft: bool = False, seed: int = 3
) -> TokenView:
    """A view with everything that the pruner needs; row b gets the same numbers whatever the batch around it."""
    B, V, D = vision_BVD.shape
    S, more = 11, {}
    words = [s for s in range(S) if s not in (3, 4)]
    size = {"L": len(pruner.tower_layers), "H": 4, "Q": len(words), "V": V, "U": V + 3, "S": S, "C": 12}
    roles = [SYSTEM] * 3 + [0] * 2 + [INSTRUCTION] * (S - 5)
    given = {
        "text_role_BS": torch.tensor(roles, dtype=torch.int8).expand(B, S),
        "text_valid_BS": torch.arange(S).expand(B, S) >= 5,
        "prompt_column_BQ": torch.tensor(words).expand(B, -1),
        "prompt_role_BQ": torch.tensor([roles[s] for s in words], dtype=torch.int8).expand(B, -1),
        "input_valid_BU": torch.ones(B, V + 3, dtype=torch.bool),
        "column_BV": torch.arange(V).expand(B, V) % S,
        "project": Widen(D),
        # Of the hidden states, so that a test of odd features reaches pruners that read these instead.
        "normed_BVD": vision_BVD * torch.rsqrt(vision_BVD.square().mean(-1, keepdim=True) + 1e-6),
    }

    def draw(name: str) -> Tensor:
        """Numbers in the shape that the end of a field's name spells; attention sums to one."""
        width = {"D": D if name in hidden else WIDTHS.get(name, 8)}
        shape = [(size | width)[letter] for letter in name.rpartition("_")[2][1:]]
        seeds = [seed + zlib.crc32(name.encode()) % 1000 + 1000 * b for b in range(B)]
        drawn = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return drawn.softmax(-1) if name.endswith("V") else drawn

    hidden = {name for spec in VIEWS.values() if spec.at in ("stage", "input") for name in fields_of(spec.name)}
    needs = pruner.needs | ({"text"} if pruner.needs & {"keys", "values", "normed"} else set())
    for name in (name for need in sorted(needs) for name in fields_of(need)):
        more[name] = given[name] if name in given else draw(name)
    if "normed" in needs:
        more["text_normed_BSD"] = more["text_BSD"]
    return TokenView.of(vision_BVD, grid, soft=soft, **more)


WIDTHS = {"tower_features_BLVD": 12}
"""Widths of drawn fields where they are not 8."""


class Widen:
    """A projector of a plain view: any features to width D, with a bend, so that its place in a sum matters."""

    def __init__(self, D: int) -> None:
        self.D = D

    def __call__(self, x: Tensor) -> Tensor:
        weight = torch.randn(x.shape[-1], self.D, generator=torch.Generator().manual_seed(18)).to(x.dtype)
        return torch.tanh(x @ weight)


def view_rows(view: TokenView, index: slice | list[int] | Tensor) -> TokenView:
    """Some rows of a view."""
    fields = {k: v[index] if isinstance(v, Tensor) else v for k, v in vars(view).items()}
    return TokenView(**fields)


def pad_view(view: TokenView, padding: int, canvas: tuple[int, int]) -> TokenView:
    """The same view in a batch whose longest row has `padding` tokens more; the padding is loud garbage."""
    fields = dict(vars(view)) | {"canvas": canvas}
    for name, value in fields.items():
        if value is None:
            continue
        if name.endswith(("VD", "VC")):
            shape = (*value.shape[:-2], padding, value.shape[-1])
            fields[name] = torch.cat([value, value.new_full(shape, 1e3)], -2)
        elif name in ("valid_BV", "row_BV", "col_BV", "tile_BV", "image_BV", "column_BV"):
            fields[name] = torch.cat([value, value.new_zeros(len(value), padding)], 1)
        elif name.endswith("V") and isinstance(value, Tensor):
            fields[name] = torch.cat([value, value.new_full((*value.shape[:-1], padding), 1e3)], -1)
    return TokenView(**fields)


# --------------------------------------------------------------------------------------------------------- models

PLACEHOLDER, VIDEO_PLACEHOLDER = IMAGE, VIDEO
TOKENS = 64
"""Vision tokens per image of a tiny LLaVA."""

Sample = tuple[int, int | Sequence[str], int]
"""Words before the images, images (a number of images, or their kinds), words at the end."""

Case = tuple[str, tuple[Any, ...]]


def model_cases() -> list[Case]:
    """Every family with each variant of its tiny config."""
    return [(name, variant) for name, family in list_families().items() for variant in family.tiny.variants]


def case_id(case: Case) -> str:
    return "-".join([case[0], *map(str, case[1])])


def tiny_model(family: str = "llava", *arguments: Any, impl: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random model of a family. Its last logits depend on its images by design, so that no test is vacuous."""
    config = list_families()[family].tiny.config(*arguments)
    torch.manual_seed(seed)
    try:
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=impl).eval()
    except ValueError:  # Gemma 2 caps its logits, which only eager attention can
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    scramble(model, seed + 1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


MAIN_FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "llava_onevision", "gemma3")
"""Families that most people train; where a test of all families is long, the others are slow tests."""


def main_families_first() -> list[Any]:
    """Test parameters: the names of all families, the others marked slow."""
    others = [name for name in list_families() if name not in MAIN_FAMILIES]
    return [*MAIN_FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@cache
def family_folder(family: str, seed: int = 0) -> Path:
    """Folder with a tiny random model of a family and its processor, as models lie on the hub; made once a session.

    Copy it to change it.
    """
    tiny = list_families()[family].tiny
    folder = Path(tempfile.mkdtemp(prefix=f"tiny_{family}_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    arguments = tiny.variants[0] if tiny.saved is None else tiny.saved
    model = tiny_model(family, *arguments, seed=seed)
    processor = tiny.processor(model.config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def batch(
    samples: Sequence[Sample], side: str = "left", seed: int = 0, family: str = "llava", config: Any = None
) -> dict[str, Any]:
    """Inputs of one call.

    Args:
        samples: what each sample holds; two words follow each image.
        side: where shorter samples are padded.
        seed: of words and pixels.
        family: whose inputs.
        config: of the model; the family's first tiny config without it.
    """
    tiny = list_families()[family].tiny
    config = config or tiny.config(*tiny.variants[0])
    g = torch.Generator().manual_seed(seed)
    pictures = [["image"] * kinds if isinstance(kinds, int) else list(kinds) for _, kinds, _ in samples]
    rows = []
    for (before, _, after), kinds in zip(samples, pictures, strict=True):
        row = _words(before, g)
        for kind in kinds:
            row += tiny.ids(config, kind) + _words(2, g)
        rows.append(row + _words(after, g))
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, where], mask[b, where] = torch.tensor(row), 1
    pixels = tiny.pixels(config, pictures, g)
    return {"input_ids": ids, "attention_mask": mask} | tiny.arguments(config, ids) | pixels


def _words(count: int, g: torch.Generator) -> list[int]:
    return torch.randint(3, 90, (count,), generator=g).tolist()


def is_placeholder(ids: Tensor) -> Tensor:
    """bool: where the ids of a tiny model stand for vision tokens or their separators."""
    return (ids == PLACEHOLDER) | (ids == VIDEO_PLACEHOLDER)


def alone(
    inputs: dict[str, Any], samples: Sequence[Sample], b: int, family: str = "llava", config: Any = None
) -> dict[str, Any]:
    """Sample b of a `batch` as a batch of its own: same words and pixels, no padding."""
    tiny = list_families()[family].tiny
    config = config or tiny.config(*tiny.variants[0])
    real = inputs["attention_mask"][b].bool()
    single = {k: inputs[k][b][real][None] for k in ("input_ids", "attention_mask")}
    single |= tiny.arguments(config, single["input_ids"])
    g = torch.Generator().manual_seed(0)
    pictures = [["image"] * kinds if isinstance(kinds, int) else list(kinds) for _, kinds, _ in samples]
    shapes = [tiny.pixels(config, [kinds], g) for kinds in pictures]
    for name, own in shapes[b].items():
        # What the samples before it bring comes first; what other samples made wider is cropped.
        first = sum(len(other.get(name, ())) for other in shapes[:b])
        if len(inputs[name]) == len(samples) and len(own) == 1:  # one entry per sample, images or not
            first = b
        single[name] = inputs[name][first : first + len(own)][tuple(slice(0, n) for n in own.shape)]
    return single


def one_sample(inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Sample b of a tiny LLaVA's batch alone, without padding."""
    real = inputs["attention_mask"][b].bool()
    alone = {k: inputs[k][b][real][None] for k in ("input_ids", "attention_mask")}
    images = (inputs["input_ids"] == PLACEHOLDER).sum(1) // TOKENS
    if images[b]:
        first = int(images[:b].sum())
        alone["pixel_values"] = inputs["pixel_values"][first : first + int(images[b])]
    return alone


def answer_labels(inputs: dict[str, Tensor], words: int = 4) -> Tensor:
    """Labels on the last real words of each sample."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    place = mask.flip(1).cumsum(1).flip(1)
    return ids.masked_fill(~((place <= words) & mask.bool()), -100)


def generate(model: Any, inputs: dict[str, Any], new: int = 5, **more: Any) -> Any:
    """Greedy generation that never produces a placeholder or a mark around images, with its logits."""
    options = {"max_new_tokens": new, "do_sample": False, "suppress_tokens": list(range(PLACEHOLDER, 112))} | more
    with torch.no_grad():
        return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def logit_gap(a: Any, b: Any) -> float:
    """Largest difference of the logits of two generations."""
    return max((x - y).abs().max().item() for x, y in zip(a.logits, b.logits, strict=True))


def new_tokens(output: Any, new: int = 5) -> Tensor:
    return output.sequences[:, -new:]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; afterwards there are none."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def stir(model: Any) -> Any:
    """Random weights for the learned pruners of a model: fresh ones start as a plain rule that reads no prompt."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.token_pruners.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model
