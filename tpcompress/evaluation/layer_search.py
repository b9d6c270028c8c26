"""Results of `find_layer`: the KL of every candidate layer, the chosen layer, and its plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tpcompress.evaluation.scoring.stats import mean_interval
from tpcompress.files import write_atomic
from tpcompress.insertion.plan import PruningPlan, Stage

THRESHOLD = 0.01
"""Default threshold in nats. The total variation distance is then at most 7 % (Pinsker's inequality)."""


@dataclass(frozen=True)
class LayerScore:
    """Effect of withdrawing all vision tokens before one layer.

    Attributes:
        layer: first layer without vision tokens.
        kl: mean KL(dense || withdrawn) of the next token, in nats.
        low, high: 95 % percentile bootstrap interval of `kl` over samples.
        agreement: fraction of samples with the same most probable next token.
    """

    layer: int
    kl: float
    low: float
    high: float
    agreement: float

    @classmethod
    def of(cls, layer: int, kl_I: np.ndarray, same_I: np.ndarray) -> LayerScore:
        """Summarise the divergence and the agreement of all samples."""
        return cls(layer, float(kl_I.mean()), *mean_interval(kl_I), float(same_I.mean()))


@dataclass(frozen=True)
class LayerSearch:
    """Measurements of all candidate layers.

    Attributes:
        scores: by increasing layer; after an interruption only the last layers, which are measured first.
        num_samples: number of images, each with one question.
        depth: decoder layers of the model.
        threshold: threshold in nats.
    """

    scores: tuple[LayerScore, ...]
    num_samples: int
    depth: int
    threshold: float = THRESHOLD

    @property
    def chosen(self) -> int | None:
        """The first layer from which on every measured mean is below the threshold; None if there is none."""
        found = None
        for score in reversed(self.scores):
            if score.kl >= self.threshold:
                break
            found = score.layer
        return found

    def plan(self) -> PruningPlan:
        """The plan that withdraws all vision tokens before the chosen layer.

        Raises:
            ValueError: no layer is below the threshold.
        """
        if self.chosen is None:
            least = f"; the last one has {shown(self.scores[-1].kl, self.threshold, 2)}" if self.scores else ""
            raise ValueError(
                f"No layer stays below {self.threshold:g} nats{least}: this model uses vision tokens in its last "
                f"layers. Keep some tokens (see tpcompress pruners), or increase the threshold."
            )
        return PruningPlan([Stage("vtw", self.chosen, keep_tokens=0)])

    def print(self, console: Console) -> None:
        """Print a table of the layers, and the choice."""
        table = Table(title=f"All vision tokens withdrawn before a layer ({self.num_samples} samples)")
        for name in ("layer", "mean KL (nats)", "95 % interval", "same next token", ""):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for score in self.scores:
            mark = "chosen" if score.layer == self.chosen else "" if score.kl < self.threshold else "above"
            interval = f"{score.low:.2g} to {score.high:.2g}"
            kl, agreement = shown(score.kl, self.threshold), f"{100 * score.agreement:.0f} %"
            table.add_row(str(score.layer), kl, interval, agreement, mark)
        console.print(table)
        result = f"No layer stays below {self.threshold:g} nats."
        if self.chosen is not None:
            result = f"From layer {self.chosen} of {self.depth} on, the mean KL stays below {self.threshold:g} nats."
        console.print(result, soft_wrap=True, highlight=False)

    def write(self, path: str | Path, model: str) -> None:
        """Write the plan atomically.

        Args:
            path: file that ends in .yaml, .yml or .json; its folder is created.
            model: name of the model, for the comment in the file.

        Raises:
            ValueError: no layer is below the threshold.
        """
        path, plan = Path(path), self.plan()
        (score,) = (score for score in self.scores if score.layer == self.chosen)
        kl = shown(score.kl, self.threshold, 2)
        comment = (
            f"# {model}: all vision tokens are withdrawn before layer {score.layer} of {self.depth}. Mean KL of the "
            f"next token\n# to the dense model: {kl} nats over {self.num_samples} samples "
            f"(threshold {self.threshold:g}).\n"
        )
        write_atomic(path, plan.to_json() if path.suffix == ".json" else comment + plan.to_yaml())


def shown(kl: float, threshold: float, digits: int = 3) -> str:
    """A divergence with so many digits that the printed number is on its own side of the threshold."""
    for number in range(digits, 17):
        text = f"{kl:.{number}g}"
        if (float(text) < threshold) == (kl < threshold) and (float(text) != threshold or kl == threshold):
            return text
    return repr(kl)
