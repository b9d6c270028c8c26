"""What the providers of views read: the stage at hand, its vision tokens, and the text tokens of the prompt.

B samples, N columns, R budget rows, V vision tokens, H query heads, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tpcompress.families import Parts
from tpcompress.insertion.call import Call
from tpcompress.insertion.layer_probe import LayerProbe
from tpcompress.insertion.shorten.columns import get_tokens
from tpcompress.insertion.shorten.sequence import BudgetRows, Frame
from tpcompress.pruners import Pruner
from tpcompress.pruners.views import BETWEEN, INSTRUCTION, SYSTEM


@dataclass
class StageContext:
    """A stage under way. What several views share is computed once.

    Attributes:
        parts: of the model.
        pruner: of the stage.
        call: the prefill under way.
        hidden_BND: hidden states at the stage.
        padding_BN: True on real columns; None if all are real.
        last_prompt_B: column of the last prompt token of each sample; nothing after it is ever shown.
    """

    parts: Parts
    pruner: Pruner
    call: Call
    hidden_BND: Tensor
    padding_BN: Tensor | None
    last_prompt_B: Tensor

    @property
    def rows(self) -> BudgetRows:
        """The vision tokens at hand."""
        assert self.call.rows is not None
        return self.call.rows

    @property
    def frame(self) -> Frame:
        """The sequence at hand."""
        assert self.call.frame is not None
        return self.call.frame

    @cached_property
    def cell_RV(self) -> Tensor:
        """Flat index of each vision token into the B * N columns."""
        return self.frame.cells(self.rows)

    @cached_property
    def column_RV(self) -> Tensor:
        """Column of each vision token in its sample."""
        return self.cell_RV - self.rows.owner_R[:, None] * self.frame.width

    @cached_property
    def last_column_R(self) -> Tensor:
        """Column of each row's last vision token."""
        return self.column_RV.masked_fill(~self.rows.valid_RV, -1).amax(1)

    @cached_property
    def text_BN(self) -> Tensor:
        """bool: text tokens of the prompt, without padding, vision tokens, separators and answers."""
        place_BS = torch.stack(list(self.call.places.values())).any(0)
        text_BN = ~place_BS.gather(1, self.frame.index_BN)
        text_BN &= torch.arange(self.frame.width, device=text_BN.device) <= self.last_prompt_B[:, None]
        return text_BN if self.padding_BN is None else text_BN & self.padding_BN

    @cached_property
    def role_RN(self) -> Tensor:
        """int8: role of each text token of the prompt relative to the row's vision tokens; 0 on everything else."""
        N = self.frame.width
        column_N = torch.arange(N, device=self.text_BN.device)
        first_R1 = self.column_RV.masked_fill(~self.rows.valid_RV, N).amin(1, keepdim=True)
        role_RN = torch.where(column_N < first_R1, SYSTEM, BETWEEN)
        role_RN = torch.where(column_N > self.last_column_R[:, None], INSTRUCTION, role_RN)
        return role_RN.masked_fill(~self.text_BN[self.rows.owner_R], 0).to(torch.int8)

    @cached_property
    def prompt_column_BQ(self) -> Tensor:
        """Columns of the text tokens of the prompt in order, followed by others where a sample has fewer.

        Q is the length of the longest sample without its placeholders, which the host knows; it includes answers.
        """
        rows = self.rows
        words = {owner: self.frame.lengths[owner] for owner in rows.owner}
        for owner, count, layouts in zip(rows.owner, rows.count, rows.layouts, strict=True):
            words[owner] -= count + sum(layout.placeholders - layout.count for layout in layouts)
        return (~self.text_BN).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, *words.values())]

    def prompt_fields(self) -> dict[str, Tensor]:
        """The fields that list the text tokens of the prompt."""
        column_RQ = self.prompt_column_BQ[self.rows.owner_R]
        return {"prompt_column_BQ": column_RQ, "prompt_role_BQ": self.role_RN.gather(1, column_RQ)}

    def tokens(self, x_BND: Tensor) -> Tensor:
        """Values of the vision tokens (R, V, D)."""
        return get_tokens(x_BND, self.cell_RV)

    def sequence(self, x_BNx: Tensor) -> Tensor:
        """Values of the whole sequence that each row belongs to (R, N, ...)."""
        return x_BNx[self.rows.owner_R]

    def to_tokens(self, weight_RHQN: Tensor) -> Tensor:
        """The columns of each row's vision tokens, (R, H, Q, V)."""
        R, H, Q, _ = weight_RHQN.shape
        return weight_RHQN.gather(3, self.column_RV[:, None, None].expand(R, H, Q, -1))

    @property
    def before(self) -> LayerProbe:
        """The layer before the stage."""
        assert self.call.before is not None
        return self.call.before

    @property
    def ahead(self) -> LayerProbe:
        """The layer after the stage, with the input that it would get without the cut."""
        assert self.call.ahead is not None
        return self.call.ahead

    def attention(self, probe: LayerProbe, query_BQ: Tensor) -> Tensor:
        """Attention of chosen columns in a layer, fp32 (B, H, Q, N)."""
        held = 0 if self.call.prefix is None else self.call.prefix.held(probe.index)
        return probe.attention(query_BQ, held)
