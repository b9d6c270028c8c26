#!/usr/bin/env python
"""Requests per second of vLLM's CPU build, dense against pruned, at several concurrencies.

Usage: .venv/bin/python scripts/bench_serving.py [--plan divprune:64@0] [--new-tokens 16] ...

A LLaVA of random weights is made whose language model dominates: 576 vision tokens per image, a small tower. The dense
arm is the stock folder in vLLM's own class, the pruned arm the export in the plug-in's. Every request has a new image,
prefix and processor caches are off, answers have a fixed length. One engine runs at a time, in the environment of
scripts/test_vllm (or TPCOMPRESS_VLLM_PYTHON); the arms alternate, and each cell is the best of its rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAYS = 1.05
"""Speed-up below which pruning is reported not to pay."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", default="divprune:64@0")
    parser.add_argument("--positions", default="original", choices=("original", "compact"))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="per concurrency")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)  # folder and settings, in the process of an engine
    return parser.parse_args()


def make_folders(out: Path, args: argparse.Namespace) -> dict[str, Path]:
    """The stock folder and the export of one random model."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    import tpcompress as tp
    from tpcompress.families import list_families, llava
    from tpcompress.families.tiny import IMAGE, tiny_vision

    text = {
        "model_type": "llama", "vocab_size": 1024, "hidden_size": args.hidden, "num_hidden_layers": args.layers,
        "intermediate_size": args.hidden * 11 // 4, "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 64, "max_position_embeddings": 4096,
    }  # fmt: skip
    tower = tiny_vision(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, image_size=336, patch_size=14
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE, image_seq_length=576)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    processor = list_families()[llava.LLAVA.name].tiny.processor(config)
    model.save_pretrained(out / "dense")
    processor.save_pretrained(out / "dense")
    plan = tp.PruningPlan.of(args.plan)
    tp.attach(model, tp.PruningPlan(plan.stages, positions=args.positions))
    return {"dense": out / "dense", "pruned": tp.export(model, processor, out / "pruned")}


async def measure(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Requests per second at each concurrency; runs in the environment of vLLM."""
    import numpy
    from PIL import Image
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    most = max(settings["concurrency"])
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=folder, dtype=settings["dtype"], max_model_len=1024, max_num_seqs=most, max_num_batched_tokens=4096,
            enable_prefix_caching=False, mm_processor_cache_gb=0, enforce_eager=True,
            load_format="auto" if Path(folder, "manifest.json").is_file() else "dummy",
        )
    )  # fmt: skip
    how = SamplingParams(temperature=0.0, max_tokens=settings["new_tokens"], ignore_eos=True, detokenize=False)
    random = numpy.random.default_rng(0)
    tokens = []

    async def ask(number: int, gate: asyncio.Semaphore) -> None:
        picture = Image.fromarray(random.integers(0, 255, (336, 336, 3), dtype=numpy.uint8))
        prompt = {"prompt": "<image>\nwhat is in this picture ?", "multi_modal_data": {"image": picture}}
        async with gate:
            async for output in engine.generate(prompt, how, f"{time.monotonic_ns()}-{number}"):
                last = output
        tokens.append(len(last.prompt_token_ids))

    rates = {}
    for concurrency in settings["concurrency"]:
        await asyncio.gather(*(ask(i, asyncio.Semaphore(2)) for i in range(2)))  # warm up
        gate, start = asyncio.Semaphore(concurrency), time.perf_counter()
        await asyncio.gather(*(ask(i, gate) for i in range(settings["requests"])))
        rates[str(concurrency)] = settings["requests"] / (time.perf_counter() - start)
    engine.shutdown()
    return {"prompt_tokens": max(tokens), "rates": rates}


def run_engine(python: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One arm, in a process of its own."""
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    command = [python, __file__, "--engine", str(folder), json.dumps(settings)]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not lines:
        sys.exit(f"vLLM failed on {folder}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main() -> None:
    args = arguments()
    settings = {key: getattr(args, key) for key in ("concurrency", "requests", "new_tokens", "dtype")}
    if args.engine:
        folder, given = args.engine
        print("RESULT", json.dumps(asyncio.run(measure(folder, json.loads(given)))), flush=True)
        return
    python = os.environ.get("TPCOMPRESS_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    if not Path(python).is_file():
        sys.exit(f"No vLLM at {python}; run scripts/test_vllm, which makes its environment.")
    best: dict[str, dict[str, float]] = {"dense": {}, "pruned": {}}
    length = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = make_folders(Path(folder), args)
        for _ in range(args.rounds):
            for arm, path in folders.items():
                found = run_engine(python, path, settings)
                length[arm] = found["prompt_tokens"]
                for at, rate in found["rates"].items():
                    best[arm][at] = max(rate, best[arm].get(at, 0.0))
    print(
        f"{args.plan}, positions {args.positions}; prompt {length['dense']} -> {length['pruned']} tokens, "
        f"{args.new_tokens} new tokens; hidden {args.hidden}, {args.layers} layers, {args.dtype}; "
        f"{args.requests} requests per cell, best of {args.rounds}; load average {os.getloadavg()[0]:.1f}\n"
    )
    print("| concurrency | dense, requests/s | pruned, requests/s | ratio | pays |\n|---|---|---|---|---|")
    for at in map(str, args.concurrency):
        ratio = best["pruned"][at] / best["dense"][at]
        print(
            f"| {at} | {best['dense'][at]:.2f} | {best['pruned'][at]:.2f} | {ratio:.2f} | "
            f"{'yes' if ratio >= PAYS else 'no'} |"
        )


if __name__ == "__main__":
    main()
