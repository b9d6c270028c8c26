"""Exported folders in vLLM's CPU build answer as they do in transformers. Run by scripts/test_vllm."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving.served import export, of_transformers, of_vllm, pictures, request, run_vllm

import tpcompress as tp

pytestmark = pytest.mark.vllm

GATE = {"pruner": {"type": "learned_gate"}, "keep_tokens": 16}


@dataclass(frozen=True)
class Case:
    """One export: family, plan, positions, sizes of images, frames of a video, several images in a request, tokens of a
    step, so that prefill is cut within an image, scope of the budget, and size of a weight file."""

    family: str
    plan: Any
    positions: str
    sizes: tuple[tuple[int, int], ...] = ((48, 48),) * 4
    frames: int = 0
    several: bool = True
    chunk: int | None = None
    scope: str = "image"
    shard: str = "5GB"

    def __str__(self) -> str:
        plan = self.plan if isinstance(self.plan, str) else self.plan["pruner"]["type"]
        return f"{self.family}-{plan}-{self.positions}" + (
            f"-chunks of {self.chunk}" if self.chunk else "-tiles" if self.scope == "tile" else ""
        )


TILES = ((24, 24), (48, 24), (72, 24), (24, 48))
MIXED = ((64, 64), (96, 40), (40, 80), (64, 48))

VIDEO_DIFFERS = ("qwen2_5_vl",)
"""Families whose videos vLLM 0.32 answers otherwise than transformers without pruning, too: counts are compared."""

CASES = [
    Case("llava", "divprune:16@0", "original"),
    Case("qwen2_5_vl", "divprune:0.5@0", "original", MIXED, frames=4),
    Case("qwen3_vl", "divprune:0.5@0", "original", MIXED),
    Case("internvl", "divprune:0.25@0", "original", TILES),
    Case("llava_onevision", "divprune:0.25@0", "original", MIXED, frames=4, several=False),
    Case("llava", "divprune:16@0", "original", chunk=40),
    Case("llava", "pool:16@0", "compact"),
    Case("llava", GATE, "original"),
    Case("internvl", "divprune:3@0", "original", TILES, scope="tile", shard="60KB"),
    Case("internvl", "merged:0.25@0", "compact", TILES),
]  # fmt: skip


def test_an_answer_may_reach_positions_past_the_last(tmp_path: Path) -> None:
    folder = export("llava", "divprune:16@0", tmp_path / "export", "original", max_positions=160)
    processor = tp.load_processor(folder)
    words = "look at the whole image and say what it is"
    batches = [[request(processor, words, pictures(tmp_path, ((48, 48),)))]]
    ((our,),) = of_transformers(folder, batches, 80)
    ((their,),) = of_vllm(folder, batches, tmp_path, tokens=80, max_model_len=160)
    assert our["unpruned_tokens"] + 80 > 160 + 8
    assert their["ids"] == our["ids"]
    assert their["logprobs"] == pytest.approx(our["logprobs"], abs=2e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_answers(case: Case, tmp_path: Path) -> None:
    folder = export(case.family, case.plan, tmp_path / "export", case.positions, case.scope, max_shard_size=case.shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (case.shard != "5GB")
    processor, images = tp.load_processor(folder), pictures(tmp_path, case.sizes)
    first, second, third, fourth = images
    several = [third, second] if case.several else [third]
    batches = [
        [request(processor, "look at the whole image and say what it is", [first])],
        [request(processor, "look at the whole image and say how many there are", [first])],
        [
            request(processor, "which one is red", several),
            request(processor, "no image here at all"),
            request(processor, "is it red", [fourth]),
            request(processor, "what", [second]),
        ],
    ]
    if case.frames:
        frames = pictures(tmp_path, ((48, 48),) * case.frames, seed=1)
        batches.append([request(processor, "what moves", video=frames), request(processor, "where", [second])])
    expected = of_transformers(folder, batches)
    engine = {"max_num_batched_tokens": case.chunk, "max_num_seqs": 4} if case.chunk else {}
    found = of_vllm(folder, batches, tmp_path, processes=case == CASES[0], **engine)
    for batch, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            where = f"batch {batch}, request {number}: {our} against {their}"
            print(where)
            assert their["prompt_tokens"] == our["prompt_tokens"], where
            if case.family in VIDEO_DIFFERS and batches[batch][number]["video"]:
                continue
            assert their["ids"] == our["ids"], where
            assert their["logprobs"] == pytest.approx(our["logprobs"], abs=2e-3), where
    # The second request shares the image and the words after it with the first.
    assert found[1][0]["cached_tokens"] >= 32
    assert expected[0][0]["prompt_tokens"] < expected[0][0]["unpruned_tokens"]


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("llava", "divprune:0.5@0,divprune:8@2", {}, "stage 1 acts at layer 2, inside the language model"),
    ("llava", "cdpruner:16@0", {}, "'cdpruner' reads the prompt"),
    ("llava", "tome:16@0", {}, "'tome' returns sizes or positions"),
    ("llava", "fastervlm:16@0", {}, "'fastervlm' reads tower_cls"),
    ("gemma3", "divprune:16@0", {}, "which vLLM's CPU backend ignores"),
    ("llava", "divprune:16@0", {"speculative_config": NGRAM}, "Speculative decoding (ngram) is not supported"),
    ("llava", "divprune:16@0", {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
    ("llava", "divprune:16@0", {"video_pruning_rate": 0.5}, "leave --video-pruning-rate out"),
    ("llava", "divprune:16@0", {"enable_mm_embeds": True}, "leave --enable-mm-embeds out"),
    ("llava", "divprune:16@0", {}, "loaded"),
]


def test_refusals_at_load(tmp_path: Path) -> None:
    asked = [
        {"model": str(export(family, plan, tmp_path / str(i), "original")), "max_model_len": 512, **arguments}
        for i, (family, plan, arguments, _) in enumerate(REFUSED)
    ]
    code = (
        "import json, sys\nfrom vllm.engine.arg_utils import EngineArgs\n"
        "for asked in json.loads(sys.argv[1]):\n"
        "    try:\n        EngineArgs(**asked).create_engine_config(); print('ANSWER loaded')\n"
        "    except ValueError as error:\n        print('ANSWER', str(error).replace(chr(10), ' '))\n"
    )
    run = run_vllm(["-c", code, json.dumps(asked)])
    lines = [line for line in run.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(lines) == len(REFUSED), run.stdout + run.stderr[-3000:]
    for line, (*_, reason) in zip(lines, REFUSED, strict=True):
        assert reason in line
