"""Sums of all metrics over the questions of each image, by family, from logits and the labels that pruning left.

B sequences, S tokens, N tokens left after pruning, C vocabulary, T answer tokens of a batch, Q its questions,
I images, F question families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torchmetrics
from torch import Tensor

from tpcompress.data.collate import BatchMeta
from tpcompress.evaluation.scoring.metrics import Answers, find_metric, list_metrics
from tpcompress.evaluation.scoring.scores import Scores


class AnswerSums(torchmetrics.Metric):
    """Values and weights of every metric by image and family. The states add up across ranks.

    Args:
        families: question families of the data set.
        num_images: rows of the data set.
        metric: metric that the scores are of.

    Raises:
        ValueError: unknown metric.
    """

    full_state_update = False

    def __init__(self, families: Sequence[str], num_images: int, metric: str) -> None:
        super().__init__()
        self.names, self.metric = tuple(families), find_metric(metric).name
        self.metrics = {name: find_metric(name) for name in list_metrics()}
        self.seen: set[str] = set()
        for state in ("count_IF", *(f"{name}_{what}_IF" for name in self.metrics for what in ("value", "weight"))):
            self.add_state(state, torch.zeros(num_images, len(self.names)), dist_reduce_fx="sum")

    def update(self, logits_BNC: Tensor, labels_BN: Tensor, labels_BS: Tensor, meta: BatchMeta) -> None:
        """Add a batch.

        Args:
            logits_BNC: logits at the tokens that pruning left.
            labels_BN: labels of the same tokens, -100 where nothing is to be answered.
            labels_BS: labels before pruning. Pruning keeps their order, so they give the question of each answer token.
            meta: metadata of the batch, from the collator.

        Raises:
            ValueError: the two sets of labels do not line up, or a logit of an answer is not finite.
        """
        asked_BS, asked_BN = labels_BS[:, 1:] != -100, labels_BN[:, 1:] != -100
        device = logits_BNC.device
        first_B = torch.tensor([0] + [len(f) for f in meta.families[:-1]]).cumsum(0)
        question_BS = first_B[:, None] + meta.segments[:, 1:] - 1
        question_T = question_BS[asked_BS.cpu()].to(device)
        target_T, logits_TC = labels_BN[:, 1:][asked_BN], logits_BNC[:, :-1][asked_BN]
        if len(target_T) != len(question_T):
            raise ValueError(
                f"{len(question_T)} answer tokens became {len(target_T)} in pruning; only vision tokens may be dropped."
            )
        if not bool(torch.isfinite(logits_TC).all()):
            raise ValueError("The model's logits are not finite; check its weights, or evaluate it in float32.")
        families = [name for listed in meta.families for name in listed]
        answers = Answers(logits_TC, target_T, question_T, families)
        self.add(meta, {name: metric(answers) for name, metric in self.metrics.items()})

    def add(self, meta: BatchMeta, measured: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add value and weight (Q,) of the questions of a batch, by the name of the metric."""
        row_Q = [row for row, listed in zip(meta.rows, meta.families, strict=True) for _ in listed]
        family_Q = [self.names.index(name) for listed in meta.families for name in listed]
        place = (torch.tensor(row_Q, device=self.device), torch.tensor(family_Q, device=self.device))
        self.seen |= set(measured)
        states = {"count_IF": torch.ones(len(row_Q))}
        for name, (value_Q, weight_Q) in measured.items():
            states |= {f"{name}_value_IF": value_Q, f"{name}_weight_IF": weight_Q}
        for name, value_Q in states.items():
            getattr(self, name).index_put_(place, value_Q.float().to(self.device), accumulate=True)

    def compute(self) -> Scores:
        """The scores over all families."""
        return self.scores()

    def scores(self, learnt: Sequence[str] | None = None, skipped: int = 0) -> Scores:
        """The scores, averaged over the learnt families."""
        arrays = {state: getattr(self, state).double().cpu().numpy() for state in self._defaults}
        sums = {n: (arrays[f"{n}_value_IF"], arrays[f"{n}_weight_IF"]) for n in self.metrics if n in self.seen}
        kept = None if learnt is None else tuple(learnt)
        return Scores(self.names, arrays["count_IF"], sums, self.metric, learnt=kept, skipped=skipped)
