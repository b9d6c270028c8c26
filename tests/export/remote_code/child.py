"""Loads exported folders with transformers alone: run as a script, tpcompress cannot be imported.

    python child.py JOBS.json

JOBS.json is a list of {folder, way, inputs, answers, again}: the outputs for the tensors in `inputs` go to `answers`,
and the model is saved to `again`. What a folder raised is printed as JSON, by folder.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

MARKS = [100, 101, 102, 103, 104]
"""Placeholders and separators of the tiny models, which generation must not produce."""


def answers(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Logits of one call, retained tokens of each stage, and five greedy tokens."""
    import torch

    attachment = model._tpcompress.attachment
    module = type(attachment).__module__
    trace = importlib.import_module(module.removesuffix("attachment") + "trace").Trace()
    pad = model.generation_config.pad_token_id
    with torch.no_grad():
        with attachment.using(traces=(trace,)):
            logits = model(**inputs).logits
        tokens = model.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, suppress_tokens=MARKS,
            pad_token_id=0 if pad is None else pad,
        )  # fmt: skip
    retained = {f"retained.{n}": stage.retained_RV.to(torch.uint8) for n, stage in enumerate(trace.stages)}
    return {"logits": logits.float().contiguous(), "tokens": tokens.contiguous(), **retained}


def load(folder: str, way: str) -> Any:
    """Load a model with transformers alone, by the Auto class, by a pipeline, or in bfloat16."""
    import torch
    from transformers import AutoModelForImageTextToText, pipeline

    if way == "pipeline":
        return pipeline("image-text-to-text", model=folder, trust_remote_code=True, device="cpu").model.eval()
    more = {"dtype": torch.bfloat16, "device_map": "cpu"} if way == "bfloat16" else {}
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **more).eval()


class NoPackage:
    """Finder that refuses to import tpcompress."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "tpcompress":
            raise ImportError(f"{name} is not installed here")


def main(jobs: list[dict[str, Any]]) -> dict[str, str]:
    """Run the jobs; returns errors by folder."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    errors = {}
    for job in jobs:
        folder = job["folder"]
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            assert type(config).__module__.startswith("transformers_modules."), type(config)
            model = load(folder, job["way"])
            assert type(model).__module__ == type(config).__module__
            save_file(answers(model, load_file(job["inputs"])), job["answers"])
            if job.get("again"):
                model.save_pretrained(job["again"])
                AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(job["again"])
        except Exception as error:  # reported by the test, one line per folder
            errors[folder] = f"{type(error).__name__}: {error}"
    return errors


if __name__ == "__main__":
    sys.meta_path.insert(0, NoPackage())
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    assert not any(name.partition(".")[0] == "tpcompress" for name in sys.modules)
    sys.stdout.write("\n" + json.dumps(found) + "\n")
