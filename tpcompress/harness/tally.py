"""Vision tokens of a run, before and after pruning, by task."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpcompress.harness.answering import Answer, Likelihood


@dataclass
class Tally:
    """Sums over the answers of each task.

    Attributes:
        sums: by task: prompts, prompts with an image or video, their vision tokens, and those retained.
    """

    sums: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)

    def add(self, task: str, answer: Answer | Likelihood) -> None:
        """Count one answer."""
        prompts, seen, before, after = self.sums.get(task, (0, 0, 0, 0))
        has_media = int(answer.vision_tokens > 0)
        self.sums[task] = (
            prompts + 1,
            seen + has_media,
            before + answer.vision_tokens,
            after + answer.retained_tokens,
        )

    def means(self) -> dict[str, float]:
        """Vision and retained tokens per prompt with an image or video, over all tasks and, of several, in each."""
        found: dict[str, float] = {}
        total = [sum(column) for column in zip(*self.sums.values(), strict=True)]
        groups = {"": total, **({f"/{task}": sums for task, sums in self.sums.items()} if len(self.sums) > 1 else {})}
        for name, (_, seen, before, after) in groups.items() if self.sums else ():
            if seen:
                found |= {f"vision_tokens{name}": before / seen, f"retained_tokens{name}": after / seen}
        return found

    def unpruned(self) -> list[str]:
        """Tasks with images or videos of which no token was pruned."""
        return [task for task, (_, _, before, after) in self.sums.items() if before and before == after]

    def lines(self) -> list[str]:
        """One sentence per task."""
        found = []
        for task, (prompts, seen, before, after) in self.sums.items():
            if not seen:
                found.append(f"{task}: {prompts} prompts without images or videos.")
                continue
            found.append(
                f"{task}: {before / seen:.1f} vision tokens per prompt, {after / seen:.1f} retained "
                f"({prompts} prompts, {seen} with images or videos)."
            )
        return found
