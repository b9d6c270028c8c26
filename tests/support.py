"""Helpers of the tests: tiny random models, batches with images, token views, and a reference made without us."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tpcompress.families import list_families
from tpcompress.families.llava import TOWERS
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.pruners import Pruner, Selection, TokenView, create, list_pruners

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dart": [
        {"pivot": "hidden_norm"},
        {"text_pivots": 0},
        {"vision_pivots": 0, "text_pivots": 2},
        {"vision_pivots": 9, "text_pivots": 3},
    ],
    "learned_gate": [{"condition": "question"}, {"reserve": 3}, {"condition": "question", "reserve": 4, "width": 8}],
    "random": [{"seed": 7}, {"resample": True}],
}
"""Arguments worth testing beside the defaults. Every registered pruner is tested with its defaults in any case."""


def pruner_configs() -> list[dict[str, Any]]:
    """Every registered pruner with its defaults, and the variants above."""
    return [{"type": name, **more} for name in list_pruners() for more in [{}, *VARIANTS.get(name, [])]]


def config_id(config: dict[str, Any]) -> str:
    return "-".join([config["type"], *(f"{k}={v}" for k, v in config.items() if k != "type")])


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
    S, H, more = 11, 4, {}

    def draw(*shape: int, offset: int) -> Tensor:
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + offset + 10 * b)) for b in range(B)]
        return torch.stack(rows)

    if pruner.needs & {"text", "keys"}:
        more["text_BSD"] = draw(S, D, offset=0)
        more["text_valid_BS"] = torch.arange(S).expand(B, S) >= 5
    if "keys" in pruner.needs:
        more["keys_BVD"] = draw(V, 8, offset=1)
        more["text_keys_BSD"] = draw(S, 8, offset=2)
    if "attention" in pruner.needs:
        more["attention_BHV"] = draw(H, V, offset=3).softmax(-1)
    return TokenView.of(vision_BVD, grid, soft=soft, **more)


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
        if name in ("vision_BVD", "keys_BVD"):
            fields[name] = torch.cat([value, value.new_full((len(value), padding, value.shape[-1]), 1e3)], 1)
        elif name in ("valid_BV", "row_BV", "col_BV"):
            fields[name] = torch.cat([value, value.new_zeros(len(value), padding)], 1)
        elif name == "attention_BHV":
            fields[name] = torch.cat([value, value.new_full((*value.shape[:2], padding), 1e3)], 2)
    return TokenView(**fields)


# --------------------------------------------------------------------------------------------------------- models

PLACEHOLDER = 100
TOKENS = 64
"""Vision tokens per image of every tiny model."""


def model_cases() -> list[tuple[str, tuple[Any, ...]]]:
    """Every family with its tiny config, and LLaVA with each of its towers."""
    cases: list[tuple[str, tuple[Any, ...]]] = [(name, ()) for name in list_families() if name != "llava"]
    return cases + [("llava", (tower,)) for tower in TOWERS]


def tiny_model(family: str = "llava", *arguments: Any, impl: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random model of a family. Its last logits depend on its images by design, so that no test is vacuous."""
    config = list_families()[family].tiny_config(*arguments)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=impl).eval()
    scramble(model, seed + 1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def batch(samples: Sequence[tuple[int, int, int]], side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Inputs of one call.

    Args:
        samples: per sample, text before the images, number of images (two words after each), text at the end.
        side: where shorter samples are padded.
    """
    g = torch.Generator().manual_seed(seed)
    rows = []
    for before, images, after in samples:
        row = _words(before, g)
        for _ in range(images):
            row += [PLACEHOLDER] * TOKENS + _words(2, g)
        rows.append(row + _words(after, g))
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, where], mask[b, where] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = sum(n for _, n, _ in samples)
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 32, 32, generator=g)
    return inputs


def _words(count: int, g: torch.Generator) -> list[int]:
    return torch.randint(3, 90, (count,), generator=g).tolist()


def one_sample(inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Sample b alone, without padding."""
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
    """Greedy generation that never produces the placeholder, with its logits."""
    options = {"max_new_tokens": new, "do_sample": False, "suppress_tokens": [PLACEHOLDER]} | more
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


# ------------------------------------------------------------------------------------------------------ reference


@dataclass
class Reference:
    """The full-length model in which layers from K on cannot see what was dropped, made from the base alone.

    Attributes:
        dropped_SBL: per stage, bool (B, S): positions that are gone from its layer on.
        layers: first layer of each stage.
        values: per stage, {(sample, position): new value} of merged tokens.
        compact: whether positions are renumbered from the stage on.
    """

    dropped: list[Tensor]
    layers: list[int]
    values: list[dict[tuple[int, int], Tensor]]
    compact: bool = False

    @classmethod
    def of(cls, trace: Trace, inputs: dict[str, Any], compact: bool = False) -> Reference:
        """Read what was retained out of a trace; everything else is worked out here, from the ids."""
        dropped, layers, values = [], [], []
        for stage in trace.stages:
            spots = row_positions(inputs["input_ids"], stage)
            gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            for r, places in enumerate(spots):
                for v, (b, s) in enumerate(places):
                    gone[b, s] = not bool(stage.retained_RV[r, v])
            dropped.append(gone)
            layers.append(stage.layer)
            values.append(merged_values(stage.selection, spots, gone, dropped[-2] if len(dropped) > 1 else None))
        return cls(dropped, layers, values, compact)

    @property
    def kept(self) -> Tensor:
        """bool (B, S): what is left at the end."""
        return ~self.dropped[-1]

    @contextmanager
    def on(self, model: Any, mask: Tensor | None = None) -> Iterator[None]:
        """Put the reference into an unattached model for a block.

        Args:
            model: the base.
            mask: the caller's 2-D mask.
        """
        language_model = model.model.language_model
        hooks = [
            layer.register_forward_pre_hook(self._hook(i, language_model, mask), with_kwargs=True)
            for i, layer in enumerate(language_model.layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, index: int, language_model: Any, mask: Tensor | None) -> Any:
        def pre(layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            at = [n for n, k in enumerate(self.layers) if k <= index]
            if not at:
                return None
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            B, S, _ = hidden.shape
            if self.layers[at[-1]] == index:
                for (b, s), value in self.values[at[-1]].items():
                    hidden[b, s] = value
            alive = ~self.dropped[at[-1]]
            seen = alive if mask is None else alive & mask.bool()
            allowed = torch.ones(S, S, dtype=torch.bool).tril() & seen[:, None, None]
            allowed = allowed | torch.eye(S, dtype=torch.bool)
            kwargs = dict(kwargs)
            if self.compact:
                # Positions lose what was dropped before them.
                positions = kwargs["position_ids"].expand(B, S) - (~alive).cumsum(1)
                kwargs["position_embeddings"] = language_model.rotary_emb(hidden, position_ids=positions)
            low = torch.finfo(hidden.dtype).min
            kwargs["attention_mask"] = torch.zeros(B, 1, S, S).masked_fill(~allowed, low)
            return (hidden, *args[1:]), kwargs | ({} if args else {"hidden_states": hidden})

        return pre


def row_positions(ids: Tensor, stage: StageTrace) -> list[list[tuple[int, int]]]:
    """(sample, position) of every vision token that the projector made, budget row by budget row."""
    places = [(b, s) for b, s in (ids == PLACEHOLDER).nonzero().tolist()]
    rows, first = [], 0
    for owner, total in zip(stage.owner, stage.total, strict=True):
        rows.append(places[first : first + total])
        assert {b for b, _ in rows[-1]} == {owner}
        first += total
    return rows


def merged_values(
    selection: Selection | None, spots: list[list[tuple[int, int]]], gone: Tensor, before: Tensor | None
) -> dict[tuple[int, int], Tensor]:
    """Where the values that a pruner wrote belong."""
    if selection is None or selection.vision_BVD is None:
        return {}
    found = {}
    for r, places in enumerate(spots):
        here = [(b, s) for b, s in places if before is None or not before[b, s]]
        found |= {(b, s): selection.vision_BVD[r, v] for v, (b, s) in enumerate(here) if not gone[b, s]}
    return found


def aligned(full: Tensor, kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What is kept of a full-length tensor (B, S, ...), right-aligned to `width`, and where it is (B, width)."""
    out = full.new_zeros(len(full), width, *full.shape[2:])
    there = torch.zeros(len(full), width, dtype=torch.bool)
    for b in range(len(full)):
        part = full[b][kept[b]]
        out[b, width - len(part) :] = part
        there[b, width - len(part) :] = True
    return out, there


def stir(model: Any) -> Any:
    """Random weights for the learned pruners of a model: fresh ones start as a plain rule that reads no prompt."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.token_pruners.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model
