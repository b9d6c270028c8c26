"""The metric behind an evaluation: what each image's questions were answered, from logits and shortened labels.

B sequences, S tokens, N tokens left after pruning, C vocabulary, T answer tokens of a batch, Q its conversations,
I images, F question families.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from tpcompress.data.collate import BatchMeta
from tpcompress.evaluation.scoring.scores import Scores


class AnswerMetric(Metric):
    """Sums of right answers, answer tokens and loss by image and family; the states add up across processes.

    Args:
        families: question families of the data set.
        num_images: rows of the data set.
    """

    full_state_update = False
    STATES = ("right_IF", "count_IF", "right_tokens_IF", "tokens_IF", "loss_IF")

    def __init__(self, families: Sequence[str], num_images: int) -> None:
        super().__init__()
        self.names = tuple(families)
        for name in self.STATES:
            self.add_state(name, torch.zeros(num_images, len(self.names)), dist_reduce_fx="sum")

    def update(self, logits_BNC: Tensor, labels_BN: Tensor, labels_BS: Tensor, meta: BatchMeta) -> None:
        """Add a batch.

        Args:
            logits_BNC: of the tokens that pruning left.
            labels_BN: labels of the same tokens, -100 where nothing is asked.
            labels_BS: labels as they came from the collator: pruning keeps their order, so they tell whose they are.
            meta: of the collator.

        Raises:
            ValueError: the two kinds of labels do not line up, or a logit of an answer is not finite.
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
        right_T = logits_TC.argmax(-1) == target_T
        loss_T = F.cross_entropy(logits_TC.float(), target_T, reduction="none")
        zero_Q = torch.zeros(meta.num_conversations, device=device)
        tokens_Q = zero_Q.index_add(0, question_T, torch.ones_like(loss_T))
        right_tokens_Q = zero_Q.index_add(0, question_T, right_T.float())
        loss_Q = zero_Q.index_add(0, question_T, loss_T)
        self.add(meta, right_tokens_Q == tokens_Q, right_tokens_Q, tokens_Q, loss_Q)

    def add(self, meta: BatchMeta, right_Q: Tensor, *others_Q: Tensor) -> None:
        """Add what is known of the Q conversations of a batch, in the order of the states after `count`."""
        row_Q = [row for row, listed in zip(meta.rows, meta.families, strict=True) for _ in listed]
        family_Q = [self.names.index(name) for listed in meta.families for name in listed]
        place = (torch.tensor(row_Q, device=self.device), torch.tensor(family_Q, device=self.device))
        for name, value_Q in zip(self.STATES, (right_Q, torch.ones_like(right_Q), *others_Q), strict=False):
            getattr(self, name).index_put_(place, value_Q.float().to(self.device), accumulate=True)

    def compute(self) -> Scores:
        """The scores over all families."""
        return self.scores()

    def scores(self, learnt: Sequence[str] | None = None, skipped: int = 0) -> Scores:
        """The scores over the learnt families."""
        arrays = {name: getattr(self, name).double().cpu().numpy() for name in self.STATES}
        return Scores(self.names, **arrays, learnt=None if learnt is None else tuple(learnt), skipped=skipped)
