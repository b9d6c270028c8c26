"""The unpruned base as teacher, from answers on disk: no second forward call during training.

A answer tokens, T tokens stored per answer token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.context import StepContext
from tpcompress.training.passes import Pass
from tpcompress.training.teachers.base import Teacher, check_answers
from tpcompress.training.teachers.cache import fingerprint, read_index, read_manifest


class Cached(Teacher):
    """Answers written by `tpcompress cache-teacher`: the most likely tokens of each answer position.

    For losses on the distribution over answer tokens (KL, JSD), not on hidden states.

    Args:
        folder: folder of the cache.

    Raises:
        FileNotFoundError: no cache in the folder.
        ValueError: a cache of another base; at a call, a sequence that is not cached, or another vocabulary.
    """

    test_arguments = ({"folder": "answers"},)

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.vocabulary = 0
        self.index: dict[str, tuple[str, int, int]] = {}
        self.shards: dict[str, Any] = {}

    def prepare(self, base: nn.Module, parts: Parts, plan: PruningPlan | None, lora: Mapping[str, Any] | None) -> None:
        manifest = read_manifest(Path(self.folder))
        now = fingerprint(base)
        if now is not None and manifest["base"] is not None and now != manifest["base"]:
            raise ValueError(f"The cache {self.folder} was written for another base; write it again for this one.")
        self.vocabulary = manifest["vocabulary"]
        self.index = read_index(Path(self.folder))

    def __call__(self, ctx: StepContext, batch: Mapping[str, Any], student: Pass, progress: float) -> Pass:
        names = getattr(batch.get("meta"), "ids", None)
        if not names:
            raise ValueError("Teacher Cached finds answers by meta.ids, which this batch lacks; use a ChatCollator.")
        if student.logits_AC.shape[1] != self.vocabulary:
            raise ValueError(
                f"The cache {self.folder} has a vocabulary of {self.vocabulary}, the model has "
                f"{student.logits_AC.shape[1]}; write it again for this base."
            )
        found = [self._sequence(name) for name in names]
        kept = {field: torch.cat([part[field] for part in found]) for field in ("indices", "log_probs", "tail")}
        check_answers(student, len(kept["tail"]))
        moved = {field: value.to(student.targets_A.device, non_blocking=True) for field, value in kept.items()}
        return _pass(student, moved)

    def _sequence(self, name: str) -> dict[str, Tensor]:
        """Cached tensors of a sequence."""
        if name not in self.index:
            raise ValueError(
                f"The cache {self.folder} has no sequence {name} among its {len(self.index)}; write it with the data, "
                f"processor, max_length and packing of this recipe."
            )
        file, start, count = self.index[name]
        if file not in self.shards:
            self.shards[file] = safe_open(Path(self.folder) / file, "pt").__enter__()
        shard = self.shards[file]
        return {field: shard.get_slice(field)[start : start + count] for field in ("indices", "log_probs", "tail")}


def _pass(student: Pass, kept: dict[str, Tensor]) -> Pass:
    """The cached answers as a pass over the answer tokens of the student."""
    return Pass(
        logits_AC=kept["log_probs"].float(),
        hidden_AD=None,
        targets_A=student.targets_A,
        sample_A=student.sample_A,
        num_samples=student.num_samples,
        top_indices_AT=kept["indices"].long(),
        tail_A=kept["tail"].float(),
    )
