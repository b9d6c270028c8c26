"""Runs in the environment of vLLM: one engine answers the requests of a file, with tokens and log-probabilities.

Usage: python vllm_answers.py FOLDER REQUESTS.json ANSWERS.json [--processes]

--processes: engine core and worker in processes of their own, as `vllm serve` has them.

REQUESTS.json: {"engine": arguments of LLM, "tokens": count, "never": ids, "batches": [[REQUEST]]}, where a request has
"prompt", "images" and "video" (files).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if "--processes" not in sys.argv:  # one process starts in a third of the time
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(folder: str, requests_file: str, answers_file: str, *flags: str) -> None:
    import numpy
    from PIL import Image
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(requests_file).read_text())
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "block_size": 32}
    if "--processes" not in flags:
        engine["distributed_executor_backend"] = "uni"
    llm = LLM(folder, **engine | asked["engine"])
    never = {int(token): -1e9 for token in asked["never"]}
    how = SamplingParams(
        temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, logprobs=0, detokenize=False, logit_bias=never
    )

    def media(request: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if request.get("images"):
            found["image"] = [Image.open(path).convert("RGB") for path in request["images"]]
        if request.get("video"):
            frames = numpy.stack([numpy.asarray(Image.open(path).convert("RGB")) for path in request["video"]])
            found["video"] = [(frames, request["metadata"])]
        return found

    answers = []
    for batch in asked["batches"]:
        prompts = [
            {"prompt": each["prompt"]} | ({"multi_modal_data": media(each)} if media(each) else {}) for each in batch
        ]
        outputs = llm.generate(prompts, how, use_tqdm=False)
        answers.append([
            {
                "prompt_tokens": len(output.prompt_token_ids),
                "cached_tokens": output.num_cached_tokens,
                "ids": list(output.outputs[0].token_ids),
                "logprobs": [
                    step[token].logprob
                    for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
                ],
            }
            for output in outputs
        ])  # fmt: skip
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
