"""Losses against references written position by position."""

import pytest
import torch
import torch.nn.functional as F
from support import answer_labels, batch, tiny_model

from tpcompress.families.layout import plain
from tpcompress.insertion.attach import attach, mode, record
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.pruners import Selection, TokenView, create
from tpcompress.training.objectives import answer_logits, budget_loss, gate_losses, kl_to_teacher, warm_up_loss

SAMPLES = [(3, 1, 6), (1, 2, 9), (12, 0, 5)]


def shortened(keep: int, layer: int, side: str, temperature: float):
    """Student and teacher on one batch: (loss, reference) and the student's record."""
    model = tiny_model()
    inputs = batch(SAMPLES, side)
    labels = answer_labels(inputs)
    attach(model, PruningPlan([Stage("uniform", layer, keep_tokens=keep)]))
    with torch.no_grad():
        with record(model) as trace:
            student = model(**inputs, labels=labels).logits
        with mode(model, "off"):
            teacher = model(**inputs).logits
    loss = kl_to_teacher(student, trace.labels_BN, teacher, labels, temperature)
    return loss, student, trace.labels_BN, teacher, labels


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_compares_each_answer_token_with_itself(layer, side, temperature):
    loss, student, short, teacher, labels = shortened(8, layer, side, temperature)
    terms = []
    for b in range(len(SAMPLES)):
        # The n-th answer token of either side, found by counting, one at a time.
        mine = [i for i in range(short.shape[1]) if short[b, i] != -100]
        theirs = [i for i in range(labels.shape[1]) if labels[b, i] != -100]
        assert len(mine) == len(theirs) == 4
        for i, j in zip(mine, theirs, strict=True):
            assert short[b, i] == labels[b, j]
            p = (teacher[b, j - 1] / temperature).softmax(-1)
            q = (student[b, i - 1] / temperature).log_softmax(-1)
            terms.append((p * (p.log() - q)).sum() * temperature**2)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert student.shape[1] < teacher.shape[1]
    assert loss > 1e-3


def test_nothing_to_distil_between_equal_models():
    loss, student, short, teacher, labels = shortened(64, 0, "left", 1.0)
    assert student.shape == teacher.shape
    assert loss == 0


def test_distillation_trains_the_student_only():
    student = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.tensor([[-100, -100, 1, 2, -100], [-100, 3, -100, -100, 4]])
    kl_to_teacher(student, labels, torch.randn(2, 5, 7), labels, 1.0).backward()
    touched = student.grad.abs().sum(-1) > 0
    assert touched.tolist() == [[False, True, True, False, False], [True, False, False, True, False]]


def test_unequal_answers_are_refused():
    labels = torch.tensor([[-100, 1, 2]])
    with pytest.raises(ValueError, match=r"^Teacher and student predict 1 and 2 answer tokens;[^\n]*$"):
        kl_to_teacher(torch.zeros(1, 3, 5), labels, torch.zeros(1, 3, 5), torch.tensor([[-100, -100, 2]]), 1.0)


def test_labels_on_text_are_predicted_from_text():
    logits = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]])
    assert torch.equal(answer_logits(logits, labels), torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]]))


def test_budget_loss():
    gate = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.9, 0.9]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    expected = (((2.0 - 1) / 4) ** 2 + ((1.0 - 1) / 2) ** 2) / 2
    assert float(budget_loss(gate, valid, torch.tensor([1, 1]))) == pytest.approx(expected)


def test_warm_up_loss():
    scores = torch.tensor([[1.0, 2.0, 0.5, 9.0], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    valid = torch.tensor([[True, True, True, False], [True] * 4])
    keep = torch.tensor([[True, False, True, False], [False, False, False, True]])
    first = F.log_softmax(scores[0, :3], 0)
    expected = (-(first[0] + first[2]) / 2 - F.log_softmax(scores[1], 0)[3]) / 2
    loss = warm_up_loss(scores, keep, valid)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert scores.grad[0, 3] == 0


def gated(counts: list[int]) -> tuple[Trace, Selection]:
    view = TokenView.of(torch.randn(2, 6, 4))
    gate = torch.full((2, 6), 0.5, requires_grad=True)
    keep = torch.ones(2, 6, dtype=torch.bool)
    chosen = Selection(keep, torch.randn(2, 6, requires_grad=True), gate)
    # At full length a stage drops nothing: what comes out is what came in.
    stage = StageTrace(0, 0, [6, 6], counts, counts, 20, 20, keep, [0, 1], [(plain(2, 3),)] * 2, view, chosen)
    return Trace([stage]), chosen


def test_gate_losses_aim_at_the_budget_and_not_at_the_full_length():
    trace, chosen = gated([6, 6])
    losses = gate_losses(trace, [Budget(keep_ratio=1 / 3)], 2.0, create("uniform"), 0.5)
    assert losses["budget"].item() == pytest.approx(2.0 * ((3 - 2) / 6) ** 2)
    keep = create("uniform")(trace.stages[0].view, torch.tensor([2, 2])).keep_BV
    assert keep.sum() == 4
    torch.testing.assert_close(losses["warm_up"], 0.5 * warm_up_loss(chosen.scores_BV, keep, torch.ones_like(keep)))
    sum(losses.values()).backward()
    assert chosen.gate_BV.grad.abs().sum() > 0
    assert chosen.scores_BV.grad.abs().sum() > 0


def test_gate_losses_leave_out_what_weighs_nothing():
    trace, _ = gated([6, 6])
    assert gate_losses(trace, [Budget(keep_tokens=2)], 0.0, None, 1.0) == {}
    hard = StageTrace(0, 0, [6], [6], [2], 20, 16, torch.ones(1, 6, dtype=torch.bool), [0], [(plain(2, 3),)])
    assert gate_losses(Trace([hard]), [Budget(keep_tokens=2)], 1.0, create("uniform"), 1.0) == {}
