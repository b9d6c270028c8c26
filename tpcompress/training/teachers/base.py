"""The base class of teachers: models whose answers to the same batch distillation losses imitate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.context import StepContext
from tpcompress.training.passes import Pass


class Teacher:
    """Runs on the batch after the student and leaves the model as it was.

    Subclasses override `prepare` where they need it, and define `__call__`.
    """

    test_arguments: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Arguments with which the contract tests build the teacher."""

    is_the_model_without_adapters: ClassVar[bool] = False
    """The teacher disables the adapters of the model that trains, so the weights below them must stay the base's."""

    def prepare(self, base: nn.Module, parts: Parts, plan: PruningPlan | None, lora: Mapping[str, Any] | None) -> None:
        """Called once, after the base is loaded and frozen, and before LoRA and the plan are attached.

        Args:
            base: the model as it was loaded.
            parts: its decoder layers and text config among them.
            plan: the pruning plan; None for a dense run.
            lora: fields of the PEFT config; None without adapters.

        Raises:
            ValueError: the teacher does not work with this recipe.
        """

    def __call__(self, ctx: StepContext, batch: Mapping[str, Any], student: Pass, progress: float) -> Pass:
        """The teacher's pass, without gradient and in eval mode, over the answer tokens of the student.

        Args:
            ctx: the run at this step.
            batch: output of the collator, with `meta`.
            student: the student's pass. The teacher's pass has `own_AC` if the student's has it.
            progress: share of the phase that is done.

        Raises:
            ValueError: student and teacher predict different numbers of answer tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(ctx, batch, student, progress) -> Pass.")


def check_answers(student: Pass, num_answers: int) -> None:
    """Check that teacher and student predict equally many answer tokens.

    Args:
        student: the student's pass.
        num_answers: number of answer tokens that the teacher predicts.

    Raises:
        ValueError: the numbers differ.
    """
    if len(student.targets_A) != num_answers:
        raise ValueError(
            f"Teacher and student predict {num_answers} and {len(student.targets_A)} answer tokens; a label right "
            f"after an image cannot be distilled, because its predecessor may be dropped. Label assistant turns only."
        )
