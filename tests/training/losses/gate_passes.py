"""Passes made by hand, for tests of losses: two images of one sample, one of another, and a sample of text alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.families.layout import plain
from tpcompress.insertion.plan import Budget
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.pruners import Selection, TokenView
from tpcompress.training.losses import Loss, list_losses
from tpcompress.training.passes import Pass

R, V, D, B, C, S = 3, 6, 4, 3, 11, 20
OWNER = [0, 0, 1]
TOKENS = [6, 6, 4]
LABELS = torch.full((B, S), -100)
for _b, _columns in enumerate(([12, 13, 17], [9, 10], [4, 5, 6])):
    LABELS[_b, _columns] = torch.arange(len(_columns)) + 3 * _b
NUM_ANSWERS = 8


def answered(seed: int = 0, **more: Any) -> Pass:
    """The answers of a pass over `LABELS`, without stages."""
    g = torch.Generator().manual_seed(seed)
    row_A, column_A = (LABELS[:, 1:] != -100).nonzero().T
    return Pass(
        logits_AC=torch.randn(NUM_ANSWERS, C, generator=g).mul(2).requires_grad_(),
        hidden_AD=torch.randn(NUM_ANSWERS, D, generator=g).requires_grad_(),
        targets_A=LABELS[row_A, column_A + 1],
        sample_A=row_A,
        num_samples=B,
        labels_BS=LABELS,
        own_AC=torch.randn(NUM_ANSWERS, C, generator=g).mul(2).requires_grad_(),
        **more,
    )


def valid_rows(counts: list[int], width: int = V) -> Tensor:
    return torch.arange(width) < torch.tensor(counts)[:, None]


def view_of(counts: list[int], seed: int = 1, dtype: torch.dtype = torch.float32) -> TokenView:
    x_RVD = torch.randn(len(counts), V, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return TokenView.of(x_RVD.requires_grad_(), valid_BV=valid_rows(counts))


def stage_of(
    view: TokenView, selection: Selection, counts: list[int] | None = None, owner: list[int] | None = None,
    number: int = 0, layer: int = 2, kept: list[int] | None = None,
) -> StageTrace:  # fmt: skip
    """A stage at full length: what comes out is what came in, unless `kept` says otherwise."""
    counts, owner = counts or TOKENS, owner or OWNER
    return StageTrace(
        number, layer, counts, counts, kept or counts, S, S, selection.keep_BV, owner, [(plain(2, 3),)] * len(counts),
        view, selection,
    )  # fmt: skip


def everything(dtype: torch.dtype = torch.float32, ratio: float = 0.5) -> tuple[Pass, dict[str, Tensor]]:
    """A pass in which every loss has something to say, and the leaves that a gradient may reach."""
    view = view_of(TOKENS, dtype=dtype)
    g = torch.Generator().manual_seed(2)
    leaves = {
        "scores": torch.randn(R, V, generator=g).to(dtype),
        "log_prob": torch.randn(R, generator=g).to(dtype),
        "text": torch.randn(B, S, D, generator=g).to(dtype),
    }
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    gate = torch.sigmoid(leaves["scores"]).masked_fill(~view.valid_BV, 0.0)
    keep = valid_rows([3, 3, 2])
    selection = Selection(keep, leaves["scores"], gate, log_prob_B=leaves["log_prob"], text_BSD=leaves["text"])
    here = answered(trace=Trace([stage_of(view, selection)]), budgets=[Budget(keep_ratio=ratio)])
    here.logits_AC = here.logits_AC.detach().to(dtype).requires_grad_()
    leaves |= {"logits": here.logits_AC, "hidden": here.hidden_AD, "own": here.own_AC, "vision": view.vision_BVD}
    return here, leaves


class Head(torch.nn.Module):
    """A model of which losses read the output head alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(D, C)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


class parts:
    """What losses read of a decoder of four layers."""

    class text_config:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads = D, 6, 2, 1
        num_hidden_layers, vocab_size = 4, C

        @classmethod
        def get_text_config(cls) -> Any:
            return cls

    model = Head()
    layers = [None] * 4
    final_norm = torch.nn.LayerNorm(D)


def made(cls: type[Loss], **arguments: Any) -> Loss:
    """A loss, prepared without a plan."""
    loss = cls(**arguments)
    loss.prepare(parts.model, parts, None)
    return loss


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every loss by class name, with the arguments that its class gives for tests."""
    return [(name, dict(each)) for name, cls in list_losses().items() for each in cls.test_arguments]


GRADIENT = {
    "label": "logits", "kl": "logits", "jsd": "logits", "hidden": "hidden", "score_function": "log_prob",
    "twig": "text",
}  # fmt: skip
"""Losses on gates train the scores, except these; losses of other files train whichever leaf gets a gradient."""


def moved_leaf(loss: Loss) -> str:
    """The one leaf of `everything` that a loss trains."""
    if "own" in loss.needs:
        return "own"
    if getattr(loss, "through", "") == "values":
        return "vision"
    if loss.name in GRADIENT or "gate" in loss.needs:
        return GRADIENT.get(loss.name, "scores")
    student, leaves = everything()
    term = loss(student, answered(7))
    assert term is not None
    term.backward()
    (moved,) = [name for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.abs().sum() > 0]
    return moved
