"""The image side of an export as one module with fixed counts: pixels -> retained features and their indices.

It runs the parts that the attached model runs: its encoder, the views of its tower, its pruner. What the host computes
from sizes (layouts, rows, counts) is computed once, outside of the graph.

T placeholders of one image, K of them retained (separators included), D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcompress.export.runtimes.base import outside_encoder
from tpcompress.insertion.attach import attachment_of
from tpcompress.insertion.call import Call
from tpcompress.insertion.encode import lay_out
from tpcompress.insertion.encoded import Encoded
from tpcompress.insertion.shorten.columns import put_tokens
from tpcompress.insertion.shorten.locate import locate
from tpcompress.insertion.shorten.sequence import BudgetRows, Frame
from tpcompress.insertion.views.build import build_view
from tpcompress.insertion.views.stage_context import StageContext


@dataclass(frozen=True)
class Sizes:
    """What is fixed in a graph.

    Attributes:
        inputs: names of the encoder's inputs that are fixed, with their values.
        placeholders: T, tokens and separators of the image.
        total: vision tokens of each budget row.
        counts: retained ones of each.
    """

    inputs: dict[str, Tensor]
    placeholders: int
    total: list[int]
    counts: list[int]

    @property
    def retained(self) -> int:
        """K."""
        return self.placeholders - sum(self.total) + sum(self.counts)


class ImageGraph(nn.Module):
    """Vision tower, projector and pruner of an attached model, for images of one size.

    Args:
        model: with a plan of one stage before the language model.
        inputs: what the processor makes of one image: `pixel_values` and what else the encoder takes.

    Raises:
        ValueError: the plan or the family cannot be such a graph, with the reason.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.attachment = attachment_of(model)
        self.parts = self.attachment.parts
        self.model = self.parts.model
        reason = why_no_graph(model)
        if reason is not None:
            raise ValueError(f"No ONNX graph: {reason}.")
        fixed = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with torch.no_grad():
            features = self._encode(inputs["pixel_values"], fixed)[0]
        layouts = lay_out(self.parts, "image", dict(inputs), features)
        length = sum(layout.placeholders for layout in layouts)
        plan, family = self.attachment.plan, self.parts.family
        self.places = {"image": torch.ones(1, length, dtype=torch.bool)}
        tokens = torch.full((1, length), self.parts.placeholder_ids["image"])
        self.rows: BudgetRows = locate(
            self.places, {"image": layouts}, plan.scope, family.tiles, family.splits_tiles, tokens
        )
        self.layouts = layouts
        self.frame = Frame.full(1, length, torch.device("cpu"))
        budget = plan.stages[0].budget
        counts = [min(budget.count(t), c) for t, c in zip(self.rows.total, self.rows.count, strict=True)]
        self.sizes = Sizes(fixed, length, list(self.rows.total), counts)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Retained features (K, D), and their indices (K,) among the T placeholders of the image, in order."""
        features, seen = self._encode(pixel_values, self.sizes.inputs)
        rows, parts = self.rows, self.parts
        hidden_1TD = torch.cat([x.reshape(-1, x.shape[-1]) for x in features])[None]
        named = {"pixel_values": pixel_values, **self.sizes.inputs}
        sizes = [layout.placeholders for layout in self.layouts]
        encoded = Encoded(self.layouts, self.attachment.tower.values(seen, "image", named, sizes))
        call = Call(
            self.attachment.settings, places=self.places, encoded={"image": encoded}, rows=rows, frame=self.frame
        )
        last_B = torch.tensor([self.sizes.placeholders - 1])
        pruner: Any = self.attachment.pruners[0]
        if self.sizes.counts == rows.count:
            return hidden_1TD[0], torch.arange(self.sizes.placeholders)
        stage = StageContext(parts, pruner, call, hidden_1TD, None, last_B)
        selection = pruner(build_view(stage, soft=False), torch.tensor(self.sizes.counts))
        if selection.vision_BVD is not None:
            hidden_1TD = put_tokens(hidden_1TD, stage.cell_RV, rows.valid_RV, selection.vision_BVD, rows.ragged)
        dropped_RV = ~selection.keep_BV & rows.valid_RV
        dropped_T = torch.zeros(self.sizes.placeholders + 1, dtype=torch.long)
        cells = rows.index_RV.masked_fill(~rows.valid_RV, self.sizes.placeholders).flatten()
        dropped_T = dropped_T.scatter(0, cells, dropped_RV.long().flatten())[:-1]
        index_K = torch.sort(dropped_T, stable=True).indices[: self.sizes.retained]
        return hidden_1TD[0][index_K], index_K

    def _encode(self, pixel_values: Tensor, fixed: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """Features of the encoder, and what the hooks of its tower saw."""
        core: Any = self.parts.core
        # Sizes as plain numbers: of a tensor, the exporter does not know the values.
        plain = {name: value.tolist() if name == "image_sizes" else value for name, value in fixed.items()}
        with self.attachment.tower.watching(True) as seen:
            output = type(core).get_image_features(core, pixel_values=pixel_values, **plain)
        return output.pooler_output, seen


def why_no_graph(model: Any) -> str | None:
    """Reason why the image side of an attached model is no graph with fixed counts; None if nothing speaks against."""
    attachment = attachment_of(model)
    plan, parts = attachment.plan, attachment.parts
    reason = outside_encoder(plan)
    if reason is not None:
        return reason
    if hasattr(parts.language_model, "_deepstack_process"):
        return f"the encoder of {parts.family.name} also feeds inner layers of the language model (DeepStack)"
    return None
