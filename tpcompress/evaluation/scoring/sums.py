"""Collects the answers of a test: teacher-forced ones from logits and labels, generated ones from texts.

B sequences, S tokens, N tokens left after pruning, C vocabulary, T answer tokens of a batch, Q its questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tpcompress.data.collate import BatchMeta
from tpcompress.evaluation.scoring.metrics import Answers, Metric, Reply, find_metric, list_metrics, name_of
from tpcompress.evaluation.scoring.questions import Questions
from tpcompress.evaluation.scoring.scores import Scores


class AnswerSums:
    """Answers of all batches so far.

    Args:
        families: question families of the data set.
        num_images: rows of the data set.
        metric: metric that the scores are of.
        generated: answers are generated; otherwise teacher-forced, for which all metrics of logits are measured.

    Raises:
        ValueError: unknown metric, or one that does not count such answers.
    """

    def __init__(self, families: Sequence[str], num_images: int, metric: str, generated: bool = False) -> None:
        self.names, self.num_images = tuple(families), num_images
        main = find_metric(metric)
        self.metric = name_of(main)
        if not (main.reads_text if generated else main.reads_logits):
            raise ValueError(_cannot_count(self.metric, generated))
        names = dict.fromkeys(
            [self.metric, *main.beside, "exact_match"] if generated else [self.metric, *list_metrics()]
        )
        metrics = {name: find_metric(name) for name in names}
        self.metrics = {n: m for n, m in metrics.items() if (m.reads_text if generated else m.reads_logits)}
        self.parts: list[Questions] = []

    def update(self, logits_BNC: Tensor, labels_BN: Tensor, labels_BS: Tensor, meta: BatchMeta) -> None:
        """Add a teacher-forced batch.

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
        counts = {name: _columns(metric(answers)) for name, metric in self.metrics.items()}
        said, confidence_Q = _predicted(answers)
        rows = [row for row, listed in zip(meta.rows, meta.families, strict=True) for _ in listed]
        self._add(rows, families, answers.right_Q.cpu().numpy(), confidence_Q, said, counts)

    def add_replies(
        self, rows: Sequence[int], replies: Sequence[Reply], confidence_Q: Sequence[float] | np.ndarray
    ) -> None:
        """Add generated answers.

        Args:
            rows: row of the data set of each question.
            replies: the answers.
            confidence_Q: probability of each answer.
        """
        counts = {
            name: np.array([metric.of_reply(reply) for reply in replies], dtype=float).T
            for name, metric in self.metrics.items()
        }
        main = self.metrics[self.metric]
        right = np.array([main.is_right(reply) for reply in replies], dtype=bool)
        said, families = [reply.text for reply in replies], [reply.family for reply in replies]
        self._add(rows, families, right, np.array(confidence_Q, dtype=float), said, counts)

    def scores(self, learnt: Sequence[str] | None = None, skipped: int = 0) -> Scores:
        """The scores, averaged over the learnt families."""
        questions, shape = Questions.join(self.parts), (self.num_images, len(self.names))
        (count_IF,) = questions.sums(np.ones((1, len(questions.image_Q))), *shape)
        sums = {name: questions.sums(values_KQ, *shape) for name, values_KQ in questions.counts.items()}
        kept = None if learnt is None else tuple(learnt)
        return Scores(self.names, count_IF, sums, self.metric, kept, skipped, questions=questions)

    def _add(
        self,
        rows: Sequence[int],
        families: Sequence[str],
        right_Q: np.ndarray,
        confidence_Q: np.ndarray,
        said: list[str],
        counts: dict[str, np.ndarray],
    ) -> None:
        places = np.array([self.names.index(name) for name in families])
        self.parts.append(Questions(np.array(rows), places, right_Q, confidence_Q, np.array(said, dtype=str), counts))


def _cannot_count(name: str, generated: bool) -> str:
    """Why a metric does not count such answers, and what to do."""
    fitting = [n for n, m in list_metrics().items() if (_reads(m, generated))]
    if generated:
        return f"Metric {name} reads logits, not generated text; leave `generate` out, or use {', '.join(fitting)}."
    return f"Metric {name} reads generated text; set `generate` of the task, or use {', '.join(fitting)}."


def _reads(metric: type[Metric], generated: bool) -> bool:
    return metric().reads_text if generated else metric().reads_logits


def _columns(counted: Sequence[Tensor]) -> np.ndarray:
    """(K, Q): what a metric counted of a batch."""
    return np.stack([values_Q.float().cpu().numpy().astype(float) for values_Q in counted])


def _predicted(answers: Answers) -> tuple[list[str], np.ndarray]:
    """Per question: the predicted ids up to the first wrong one, as text, and the probability of these."""
    best_T = answers.logits_TC.float().log_softmax(-1).amax(-1).cpu().tolist()
    said_T, right_T = answers.predicted_T.cpu().tolist(), answers.right_T.cpu().tolist()
    said: list[list[str]] = [[] for _ in answers.families]
    total, ended = np.zeros(len(said)), [False] * len(said)
    for question, token, right, best in zip(answers.question_T.cpu().tolist(), said_T, right_T, best_T, strict=True):
        if not ended[question]:
            said[question].append(str(token))
            total[question] += best
            ended[question] = not right
    return [" ".join(tokens) for tokens in said], np.exp(total)
