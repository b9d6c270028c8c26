"""What a teacher is: somebody whose answers to the same batch are worth imitating."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tpcompress.training.passes import Pass


class Teacher:
    """Answers the batch that the student has answered. It runs after the student and leaves the model as found."""

    def prepare(self, module: Any, base: nn.Module) -> None:
        """Called once, when the base is loaded and frozen, before LoRA and the plan are on it.

        Args:
            module: the LightningModule; its `model` does not stand yet.
            base: the model as it was loaded.

        Raises:
            ValueError: the teacher cannot work with this recipe.
        """

    def __call__(self, module: Any, batch: Mapping[str, Any], here: Pass, progress: float) -> Pass:
        """The teacher's pass: without a gradient, in eval mode, over the same answer tokens as the student's.

        Args:
            module: the LightningModule.
            batch: as the collator made it, `meta` included.
            here: the student's pass. The teacher keeps `own_AC` if the student did.
            progress: share of the phase that is done.

        Raises:
            ValueError: the two do not predict the same number of answer tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(module, batch, here, progress) -> Pass.")


def check_answers(here: Pass, num_taught: int) -> None:
    """See that teacher and student predict equally many answer tokens.

    Raises:
        ValueError: they do not.
    """
    if len(here.targets_A) != num_taught:
        raise ValueError(
            f"Teacher and student predict {num_taught} and {len(here.targets_A)} answer tokens; a label right after "
            f"an image cannot be distilled, its predecessor may be dropped. Label assistant turns only."
        )
