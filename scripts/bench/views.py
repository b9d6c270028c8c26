"""Random token views in the shapes of a 7B LLaVA, with the fields that a pruner needs.

B samples, V vision tokens, S sequence length, Q text tokens, H heads, L layers of the vision tower, D and C widths.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcompress.pruners import Pruner, TokenView
from tpcompress.pruners.base import INSTRUCTION, SYSTEM
from tpcompress.pruners.views import VIEWS, fields_of

HELD = 2 * 2**30
"""Bytes of tensors that are cached for the next pruner; beyond it, unused tensors are dropped and drawn again."""

FIELDS = {name: fields_of(name) for name in VIEWS if fields_of(name)}
"""The fields of `TokenView` for each entry of `Pruner.needs`, as in insertion; their suffixes are their shapes."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model: LLaVA-1.5 7B with its CLIP ViT-L/14.

    Attributes:
        hidden, heads, mlp: sizes of the language model.
        tower, tower_heads: width and heads of the vision tower.
        pixels: values per patch.
        words: text tokens of the prompt; 35 of 64 precede the vision tokens, as in LLaVA.
    """

    hidden: int = 4096
    heads: int = 32
    mlp: int = 11008
    tower: int = 1024
    tower_heads: int = 16
    pixels: int = 588
    words: int = 64


@dataclass(frozen=True)
class Cell:
    """Number of vision tokens per sample, and number of samples.

    Raises:
        ValueError: no samples, or the tokens cannot be divided into equal squares of 2 x 2 or more.
    """

    tokens: int
    batch: int

    @property
    def keep(self) -> int:
        """The budget: a ninth, 64 of 576 tokens."""
        return max(1, round(self.tokens / 9))

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.tiles:
            raise ValueError(
                f"Cannot use {self.tokens} vision tokens in {self.batch} samples: tokens must divide into equal "
                f"squares; give a multiple of 4, such as 576 or 2880, and at least one sample."
            )

    @property
    def tiles(self) -> tuple[int, int] | None:
        """(count, side) of the fewest equal squares with so many tokens: 5 of 24 x 24 for 2880; None if impossible."""
        for count in range(1, self.tokens // 4 + 1):
            side = math.isqrt(self.tokens // count)
            if count * side * side == self.tokens:
                return count, side
        return None


class Views:
    """Views for one input size; pruners share the tensors.

    A tensor depends on its field and shape alone, so that one dropped for memory is drawn again with the same values.
    """

    def __init__(self, sizes: Sizes, cell: Cell, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.sizes, self.cell, self.device, self.dtype = sizes, cell, device, dtype
        self._held: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._project: nn.Module | None = None

    def make(self, pruner: Pruner) -> TokenView:
        """Make the view of one pruner.

        Raises:
            ValueError: the pruner needs a field that is not available here.
        """
        unknown = sorted(pruner.needs - FIELDS.keys())
        if unknown:
            raise ValueError(
                f"{pruner.name} needs {', '.join(unknown)}, which this benchmark does not provide; it provides "
                f"{', '.join(FIELDS)}."
            )
        names = dict.fromkeys(name for word in sorted(pruner.needs) for name in FIELDS[word])
        layers = len(pruner.tower_layers)
        wanted = {(name, self._shape(name, layers)) for name in ["vision_BVD", *names] if name != "project"}
        fields: dict[str, Any] = {name: self._get(name, shape, wanted) for name, shape in sorted(wanted)}
        if "project" in names:
            fields["project"] = self._projector()
        assert self.cell.tiles is not None
        count, side = self.cell.tiles
        B, V = self.cell.batch, self.cell.tokens
        tile_BV = (torch.arange(V, device=self.device) // side**2).expand(B, V)
        return TokenView.of(grid=(count * side, side), tile_BV=tile_BV, **fields)

    def _shape(self, name: str, layers: int) -> tuple[int, ...]:
        stem, _, letters = name.rpartition("_")
        sizes, tower = self.sizes, stem.startswith("tower")
        width = sizes.tower // sizes.tower_heads if "H" in letters else sizes.tower
        extent = {
            "B": self.cell.batch, "V": self.cell.tokens, "U": self.cell.tokens, "S": self.cell.tokens + sizes.words,
            "Q": sizes.words, "L": layers, "H": sizes.tower_heads if tower else sizes.heads,
            "D": width if tower else sizes.hidden, "C": sizes.pixels if stem == "pixels" else sizes.tower,
        }  # fmt: skip
        return tuple(extent[letter] for letter in letters)

    def _get(self, name: str, shape: tuple[int, ...], wanted: set[tuple[str, tuple[int, ...]]]) -> Tensor:
        tensor = self._held.pop((name, shape), None)
        if tensor is None:
            for key in [key for key in self._held if key not in wanted]:
                if sum(held.nbytes for held in self._held.values()) + 4 * math.prod(shape) <= HELD:
                    break
                del self._held[key]
            tensor = self._draw(name, shape)
        self._held[name, shape] = tensor  # most recently used last
        return tensor

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Draw a field: positions and roles as in a prompt, attention as fp32 rows that sum to 1, others normal."""
        before, V = self.sizes.words * 35 // 64, self.cell.tokens
        column_S = torch.arange(V + self.sizes.words, device=self.device)
        word_Q = torch.cat([column_S[:before], column_S[before + V :]])
        role_S = torch.where(column_S < before, SYSTEM, INSTRUCTION).masked_fill_(
            (column_S >= before) & (column_S < before + V), 0
        )
        special = {
            "text_role_BS": role_S.to(torch.int8), "text_valid_BS": role_S == INSTRUCTION, "prompt_column_BQ": word_Q,
            "column_BV": column_S[before : before + V],
            "prompt_role_BQ": role_S[word_Q].to(torch.int8), "input_valid_BU": column_S[:V] >= 0,
        }  # fmt: skip
        if name in special:
            return special[name].expand(shape).contiguous()
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        if "attention" in name or name in ("tower_cls_BLHV", "tower_received_BLHV"):
            return torch.randn(shape, generator=generator, device=self.device).softmax(-1)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    def _projector(self) -> nn.Module:
        if self._project is None:
            given, hidden = self.sizes.tower, self.sizes.hidden
            module = nn.Sequential(nn.Linear(given, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            self._project = module.to(self.device, self.dtype)
        return self._project
