"""The unpruned base as teacher, asked beforehand: no second forward call while training.

A answer tokens, T tokens that the cache keeps of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tpcompress.training.passes import Pass
from tpcompress.training.teachers.base import Teacher, check_answers
from tpcompress.training.teachers.cache import fingerprint, read_index, read_manifest


class Cached(Teacher):
    """Answers that `tpcompress.training.teachers.cache` has written: the most likely tokens of each answer position.

    Serves losses on the distribution of answers (KL, JSD), not on hidden states.

    Args:
        folder: of the cache.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: it was written for another base; at a call, a sequence that it does not hold, or another vocabulary.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.vocabulary = 0
        self.index: dict[str, tuple[str, int, int]] = {}
        self.shards: dict[str, Any] = {}

    def prepare(self, module: Any, base: nn.Module) -> None:
        manifest = read_manifest(Path(self.folder))
        now = fingerprint(base)
        if now is not None and manifest["base"] is not None and now != manifest["base"]:
            raise ValueError(f"The cache {self.folder} was written for another base; write it again for this one.")
        self.vocabulary = manifest["vocabulary"]
        self.index = read_index(Path(self.folder))

    def __call__(self, module: Any, batch: Mapping[str, Any], here: Pass, progress: float) -> Pass:
        names = getattr(batch.get("meta"), "ids", None)
        if not names:
            raise ValueError("A cached teacher finds answers by meta.ids, which this batch lacks; use a ChatCollator.")
        if here.logits_AC.shape[1] != self.vocabulary:
            raise ValueError(
                f"The cache {self.folder} holds a vocabulary of {self.vocabulary}, the model has "
                f"{here.logits_AC.shape[1]}; write it again for this base."
            )
        found = [self._sequence(name) for name in names]
        kept = {field: torch.cat([part[field] for part in found]) for field in ("indices", "log_probs", "tail")}
        check_answers(here, len(kept["tail"]))
        moved = {field: value.to(here.targets_A.device, non_blocking=True) for field, value in kept.items()}
        return _pass(here, moved)

    def _sequence(self, name: str) -> dict[str, Tensor]:
        """What the cache holds of a sequence."""
        if name not in self.index:
            raise ValueError(
                f"The cache {self.folder} of {len(self.index)} sequences lacks {name}; write it with the data, "
                f"processor, max_length and packing of this recipe."
            )
        file, start, count = self.index[name]
        if file not in self.shards:
            self.shards[file] = safe_open(Path(self.folder) / file, "pt").__enter__()
        shard = self.shards[file]
        return {field: shard.get_slice(field)[start : start + count] for field in ("indices", "log_probs", "tail")}


def _pass(here: Pass, kept: dict[str, Tensor]) -> Pass:
    """The cached answers to what the student answers."""
    return Pass(
        logits_AC=kept["log_probs"].float(),
        hidden_AD=None,
        targets_A=here.targets_A,
        sample_A=here.sample_A,
        num_samples=here.num_samples,
        top_indices_AT=kept["indices"].long(),
        tail_A=kept["tail"].float(),
    )
