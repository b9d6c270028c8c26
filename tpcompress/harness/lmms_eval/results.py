"""Answers and counts in the types of lmms-eval."""

from __future__ import annotations

from functools import cache
from typing import Any

from tpcompress.harness.answering import Answer
from tpcompress.harness.tally import Tally


def generation_result(answer: Answer) -> Any:
    """The answer as a `GenerationResult`, whose token counts also hold the vision tokens before and after pruning."""
    from lmms_eval.api.instance import GenerationResult

    counts = _counts_class()(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
    counts.vision_tokens, counts.retained_tokens = answer.vision_tokens, answer.retained_tokens
    return GenerationResult(text=answer.text, token_counts=counts)


@cache
def _counts_class() -> type:
    """Token counts that also write vision tokens into the samples file."""
    from lmms_eval.api.instance import TokenCounts

    class VisionTokenCounts(TokenCounts):  # type: ignore[misc]
        vision_tokens = 0
        retained_tokens = 0

        def to_dict(self) -> dict[str, Any]:
            """Plain values for the samples file."""
            vision = {"vision_tokens": self.vision_tokens, "retained_tokens": self.retained_tokens}
            return {**super().to_dict(), **vision}

    return VisionTokenCounts


def log_means(tally: Tally, tokens: int, seconds: float) -> None:
    """Record mean vision and retained tokens in the results (`throughput`), beside the speed of generation."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics=tally.means(),
    )
