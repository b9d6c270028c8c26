"""Settings of the runs of the tests of the training module."""

import torch
from training.helpers import Watch, callback, weights

from tpcompress.models import load_base

GATE = {"pruner": {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}, "keep_tokens": 16}


WATCH = {"callbacks": [callback(Watch)]}


LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


TAUGHT = {"teacher": "AdapterOff", "losses": ["Label", "KL"]}


PARTS = {
    "vision_tower": "vision_tower", "projector": "multi_modal_projector", "pruner": "token_pruners",
    "language_model": ("language_model", "lm_head"),
}  # fmt: skip


def of(part: str, names) -> set[str]:
    words = PARTS[part] if isinstance(PARTS[part], tuple) else (PARTS[part],)
    return {name for name in names if any(word in name for word in words)}


def changed(run) -> set[str]:
    """Weights of a finished run that are not the base's, bit for bit."""
    base = dict(load_base(run.model.base).named_parameters())
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in weights(run).items()}
    return {n for n, p in plain.items() if n.replace("original_module.", "") not in base or
            not torch.equal(p, base[n.replace("original_module.", "")])}  # fmt: skip


def batch_of(run) -> dict:
    batch = next(iter(run.datamodule.train_dataloader()))
    return {k: v for k, v in batch.items() if k != "meta"}
