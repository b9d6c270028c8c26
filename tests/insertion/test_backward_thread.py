"""Checkpointed layers are recomputed in another thread on CUDA, where the caller's context variables are not set."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support import answer_labels, batch, gradients, tiny_model
from torch import Tensor

import tpcompress as tp

PLANS = ("divprune:16@2", "divprune:32@0,fastv:16@2", "merged:16@2")


def _gradients(model: Any, inputs: dict[str, Any], in_thread: bool) -> dict[str, Tensor]:
    loss = model(**inputs, labels=answer_labels(inputs), use_cache=False).loss
    if in_thread:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    return gradients(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_backward_in_another_thread(family: str, reentrant: bool) -> None:
    inputs = batch([(5, 1, 7), (3, 2, 8)], family=family)
    for plan in PLANS:
        model: Any = tp.attach(tiny_model(family), plan).train()
        plain = _gradients(model, inputs, in_thread=False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        recomputed = _gradients(model, inputs, in_thread=True)
        assert recomputed.keys() == plain.keys(), plan
        assert all(torch.allclose(recomputed[name], plain[name], atol=1e-6) for name in plain), plan
