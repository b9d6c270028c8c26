"""Exports of tiny models that vLLM's CPU kernels can run, requests to them, and the answers of transformers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from support import scramble
from transformers import AutoModelForImageTextToText

import tpcompress as tp
from tpcompress.families import list_families

ROOT = Path(__file__).parents[2]
ANSWERS = Path(__file__).with_name("vllm_answers.py")
TOKENS = 8

Request = dict[str, Any]


def vllm_python() -> Path:
    """Python of the environment that scripts/test_vllm makes; skips the test without it."""
    found = Path(os.environ.get("TPCOMPRESS_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not found.is_file():
        pytest.skip(f"no vLLM at {found}; run scripts/test_vllm")
    return found


def export(
    family: str,
    plan: str | Mapping[str, Any],
    out: Path,
    positions: str,
    scope: str = "image",
    max_positions: int | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """A tiny random model of a family with attention heads of 32 dimensions, exported with a plan."""
    tiny = list_families()[family].tiny
    config = tiny.config(*tiny.variants[0])
    if family == "llava_onevision":
        config.vision_aspect_ratio = "anyres_max_9"
    text = config.get_text_config()
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    text.max_position_embeddings = max_positions or text.max_position_embeddings
    if family == "gemma3":
        text.query_pre_attn_scalar, text.vocab_size = 32, 160
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters["mrope_section"] = [2 * width for width in text.rope_parameters["mrope_section"]]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    scramble(model, 1)
    chosen = tp.PruningPlan.of(plan)
    tp.attach(model, tp.PruningPlan(chosen.stages, positions=positions, scope=scope))
    processor = tiny.processor(config)
    if family == "gemma3":  # vLLM looks these up
        processor.tokenizer.add_tokens(["\n" * count for count in range(1, 5)])
    return tp.export(model, processor, out, max_shard_size=max_shard_size)


def pictures(out: Path, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[str]:
    """Image files of random blocks, so that tokens of one image differ."""
    random, found = numpy.random.default_rng(seed), []
    for number, (width, height) in enumerate(sizes):
        blocks = random.integers(0, 255, (max(2, height // 4), max(2, width // 4), 3), dtype=numpy.uint8)
        path = out / f"{seed}_{number}.png"
        Image.fromarray(blocks).resize((width, height)).save(path)
        found.append(str(path))
    return found


def request(processor: Any, words: str, images: Sequence[str] = (), video: Sequence[str] = ()) -> Request:
    """One user turn as the chat template writes it."""
    media = [{"type": "image"}] * len(images) + [{"type": "video"}] * bool(video)
    turn = [{"role": "user", "content": [*media, {"type": "text", "text": words}]}]
    prompt = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    count = len(video)
    metadata = {
        "fps": 2.0, "total_num_frames": count, "frames_indices": list(range(count)), "duration": count / 2,
        "video_backend": "opencv", "do_sample_frames": False,
    }  # fmt: skip
    return {"prompt": prompt, "images": list(images), "video": list(video), "metadata": metadata}


def never(config: Any) -> list[int]:
    """Placeholder ids, which no answer may hold."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})


def of_transformers(
    folder: Path, batches: Sequence[Sequence[Request]], tokens: int = TOKENS
) -> list[list[dict[str, Any]]]:
    """Greedy answers of the export in transformers, one request at a time."""
    model, processor = tp.load(folder), tp.load_processor(folder)
    model.generation_config.eos_token_id = None
    return [[_answer(model, processor, each, tokens) for each in batch] for batch in batches]


def _answer(model: Any, processor: Any, asked: Request, tokens: int) -> dict[str, Any]:
    images, frames = ([Image.open(path).convert("RGB") for path in asked[kind]] for kind in ("images", "video"))
    media: dict[str, Any] = {"images": images} if images else {}
    if frames:
        media["videos"] = [numpy.stack([numpy.asarray(frame) for frame in frames])]
        media["video_metadata"] = [{k: v for k, v in asked["metadata"].items() if k != "do_sample_frames"}]
        media["do_sample_frames"] = False
    inputs = processor(text=asked["prompt"], return_tensors="pt", **media)
    with tp.record(model) as trace:
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True,
            suppress_tokens=never(model.config),
        )  # fmt: skip
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    chosen = zip(output.logits, ids, strict=True)
    stages = trace.stages
    return {
        "prompt_tokens": stages[0].sequence_out if stages else inputs["input_ids"].shape[1],
        "unpruned_tokens": inputs["input_ids"].shape[1],
        "ids": ids,
        "logprobs": [float(logits[0].float().log_softmax(-1)[token]) for logits, token in chosen],
    }


def of_vllm(
    folder: Path,
    batches: Sequence[Sequence[Request]],
    out: Path,
    processes: bool = False,
    tokens: int = TOKENS,
    **engine: Any,
) -> list[list[dict[str, Any]]]:
    """Greedy answers of the export in vLLM, a batch at a time, from one engine in a process of its own."""
    config = json.loads((folder / "config.json").read_text())
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    asked = {"engine": engine, "tokens": tokens, "never": [config[n] for n in names if n in config], "batches": batches}
    (out / "requests.json").write_text(json.dumps(asked))
    run = run_vllm(
        [str(ANSWERS), str(folder), str(out / "requests.json"), str(out / "answers.json"), *["--processes"] * processes]
    )
    if run.returncode:  # shown at once under -s
        print(run.stdout[-6000:] + run.stderr[-6000:])
    assert run.returncode == 0
    found: list[list[dict[str, Any]]] = json.loads((out / "answers.json").read_text())
    return found


def vllm_environment() -> dict[str, str]:
    """Variables of a process of vLLM."""
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def run_vllm(arguments: Sequence[str], command: str = "python") -> subprocess.CompletedProcess[str]:
    """Run a command of the vLLM environment to its end."""
    line = [str(vllm_python().with_name(command)), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=vllm_environment(), timeout=900)
