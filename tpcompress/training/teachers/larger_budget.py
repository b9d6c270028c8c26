"""The training model as its own teacher, with a larger token budget (EPIC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from tpcompress.families import Parts
from tpcompress.inference import inference
from tpcompress.insertion.attach import force_retain, layers, mode
from tpcompress.insertion.nested import check_nestable
from tpcompress.insertion.plan import Budget, PruningPlan
from tpcompress.training.context import StepContext
from tpcompress.training.losses.base import Ramp, at
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.teachers.base import Teacher, check_answers


class LargerBudget(Teacher):
    """The same weights with larger budgets: ratio -> ratio * factor + gap, at most all tokens.

    Source: EPIC (arXiv 2510.00515), whose code uses factor 1 and a gap from 0.1 to 0.3 over the first 0.4 of the run,
    in training mode and with an unrelated selection. Here the teacher is in eval mode, and its selection contains the
    student's.

    Args:
        factor: multiple of the student's budget, at least 1; a number, or a ramp over the phase.
        gap: share of all vision tokens that is added to the budget; for plans with keep_ratio only.
        nested: the teacher retains every token that the student retained. Has no effect in steps in which the student
            is gated at full length.

    Raises:
        ValueError: a budget that is not larger than the student's; no plan; a gap with keep_tokens; a pruner whose
            selection cannot contain another one.
    """

    test_arguments = ({}, {"factor": 1.5, "nested": False})

    def __init__(self, factor: float | Ramp = 2.0, gap: float | Ramp = 0.0, nested: bool = True) -> None:
        ends = [(x.start, x.end) if isinstance(x, Ramp) else (x, x) for x in (factor, gap)]
        if min(ends[0]) < 1 or min(ends[1]) < 0 or (max(ends[0]) == 1 and max(ends[1]) == 0):
            raise ValueError(
                f"Teacher LargerBudget needs factor >= 1 and gap >= 0, one of them larger, got {factor} and {gap}."
            )
        self.factor, self.gap, self.nested = factor, gap, nested
        self.has_gap = max(ends[1]) > 0

    def prepare(self, base: nn.Module, parts: Parts, plan: PruningPlan | None, lora: Mapping[str, Any] | None) -> None:
        if plan is None:
            raise ValueError("Teacher LargerBudget needs a plan with budgets to enlarge; set model.plan.")
        if self.has_gap and any(stage.keep_tokens for stage in plan.stages):
            raise ValueError("Teacher LargerBudget has a gap, a share of all tokens, but the plan counts; use factor.")
        if self.nested:
            try:
                check_nestable(plan)
            except ValueError as error:
                reason = str(error).partition(";")[0]
                raise ValueError(f"{reason}; set nested: false for teacher LargerBudget.") from error

    def budgets(self, student: Sequence[Budget], progress: float) -> list[Budget]:
        """The teacher's budgets for those of the student."""
        factor, gap = at(self.factor, progress), at(self.gap, progress)
        return [_enlarged(budget, factor, gap) for budget in student]

    def __call__(self, ctx: StepContext, batch: Mapping[str, Any], student: Pass, progress: float) -> Pass:
        model, stages = ctx.model, student.trace.stages if student.trace is not None else []
        with ExitStack() as stack:
            stack.enter_context(inference(model))
            stack.enter_context(mode(model, "drop"))
            if stages:
                stack.enter_context(layers(model, [stage.layer for stage in stages]))
                if self.nested and not _is_gated(student):
                    assert student.trace is not None
                    stack.enter_context(force_retain(model, student.trace))
            values = self.budgets(student.budgets, progress)
            teacher = run_pass(model, batch, values, own=student.own_AC is not None)
        check_answers(student, len(teacher.targets_A))
        return teacher


def _enlarged(budget: Budget, factor: float, gap: float) -> Budget:
    if budget.keep_tokens is not None:  # 0 tokens, which the last stage of a plan may keep, remain 0
        return Budget(keep_tokens=round(budget.keep_tokens * factor))
    assert budget.keep_ratio is not None
    return Budget(keep_ratio=min(1.0, budget.keep_ratio * factor + gap))


def _is_gated(student: Pass) -> bool:
    """Whether some stage gated its tokens and dropped none."""
    assert student.trace is not None
    return any(
        stage.selection is not None and stage.selection.gate_BV is not None and stage.vision_out == stage.vision_in
        for stage in student.trace.stages
    )
