"""Exported folders in vLLM's CPU build answer as they do in transformers. Run by scripts/test_vllm."""

from __future__ import annotations

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
    """One export: family, plan, positions, sizes of images, frames of a video, several images in a request, and
    tokens of a step, so that prefill is cut within an image."""

    family: str
    plan: Any
    positions: str
    sizes: tuple[tuple[int, int], ...] = ((48, 48),) * 4
    frames: int = 0
    several: bool = True
    chunk: int | None = None

    def __str__(self) -> str:
        plan = self.plan if isinstance(self.plan, str) else self.plan["pruner"]["type"]
        return f"{self.family}-{plan}-{self.positions}" + (f"-chunks of {self.chunk}" if self.chunk else "")


MIXED = ((64, 64), (96, 40), (40, 80), (64, 48))

VIDEO_DIFFERS = ("qwen2_5_vl",)
"""Families whose videos vLLM 0.32 answers otherwise than transformers without pruning, too: counts are compared."""

CASES = [
    Case("llava", "divprune:16@0", "original"),
    Case("qwen2_5_vl", "divprune:0.5@0", "original", MIXED, frames=4),
    Case("qwen3_vl", "divprune:0.5@0", "original", MIXED),
    Case("internvl", "divprune:0.25@0", "original", ((24, 24), (48, 24), (72, 24), (24, 48))),
    Case("llava_onevision", "divprune:0.25@0", "original", MIXED, frames=4, several=False),
    Case("llava", "divprune:16@0", "original", chunk=40),
    Case("llava", "pool:16@0", "compact"),
    Case("llava", GATE, "original"),
    Case("internvl", "merged:0.25@0", "compact", ((24, 24), (48, 24), (72, 24), (24, 48))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_answers(case: Case, tmp_path: Path) -> None:
    folder = export(case.family, case.plan, tmp_path / "export", case.positions)
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


REFUSED = [
    ("llava", "divprune:0.5@0,divprune:8@2", "stage 1 acts at layer 2, inside the language model"),
    ("llava", "cdpruner:16@0", "'cdpruner' reads the prompt"),
    ("llava", "tome:16@0", "'tome' returns sizes or positions"),
    ("llava", "fastervlm:16@0", "'fastervlm' reads tower_cls"),
    ("gemma3", "divprune:16@0", "which vLLM's CPU backend ignores"),
]


def test_refusals_at_load(tmp_path: Path) -> None:
    folders = [export(family, plan, tmp_path / str(i), "original") for i, (family, plan, _) in enumerate(REFUSED)]
    code = (
        "import sys\nfrom vllm.engine.arg_utils import EngineArgs\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n        EngineArgs(model=folder).create_model_config(); print('ANSWER loaded')\n"
        "    except ValueError as error:\n        print('ANSWER', str(error).replace(chr(10), ' '))\n"
    )
    run = run_vllm(["-c", code, *map(str, folders)])
    lines = [line for line in run.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(lines) == len(REFUSED), run.stdout + run.stderr[-3000:]
    for line, (_, _, reason) in zip(lines, REFUSED, strict=True):
        assert reason in line
