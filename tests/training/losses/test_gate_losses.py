"""Losses on gates, scores and draws against references written row by row and token by token."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import answer_labels, batch, tiny_model
from training.losses.gate_passes import (
    LABELS,
    OWNER,
    TOKENS,
    B,
    D,
    R,
    S,
    V,
    answered,
    everything,
    made,
    parts,
    stage_of,
    valid_rows,
    variants,
    view_of,
)
from training.losses.gate_rows import COUNTS, rows

from tpcompress.families import resolve
from tpcompress.insertion.cost import decoder_flops
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.insertion.trace import Trace
from tpcompress.pruners import Selection, create
from tpcompress.pruners.base import INSTRUCTION
from tpcompress.training.losses import list_losses
from tpcompress.training.losses.bce import BCE
from tpcompress.training.losses.budget import OnBudget
from tpcompress.training.losses.entropy import Entropy
from tpcompress.training.losses.flops import Flops
from tpcompress.training.losses.imitate import Imitate
from tpcompress.training.losses.label import Label
from tpcompress.training.losses.reconstruct import Reconstruct
from tpcompress.training.losses.sparsity import Sparsity
from tpcompress.training.losses.twig import Twig
from tpcompress.training.passes import run_pass

GATE_LOSSES = [pair for pair in variants() if "gate" in list_losses()[pair[0]](**pair[1]).needs and pair[0] != "Twig"]


SUMS = [pair for pair in GATE_LOSSES if pair[0] not in ("Flops", "ScoreFunction")]
"""What the others make of two stages has tests of its own."""


# ------------------------------------------------------------------ rows, stages and padding


@pytest.mark.parametrize(("name", "arguments"), GATE_LOSSES, ids=str)
def test_padding_and_rows_without_a_token_change_nothing(name, arguments):
    loss = made(list_losses()[name], **arguments)
    here, _ = everything()
    taught = answered(7)
    expected = loss(here, taught)
    stage = here.trace.stages[0]
    # One column of loud padding, and a row of a prompt without images, for which the pruner saw a stand-in.
    loud = {"vision_BVD": 1e3, "valid_BV": False, "scores_BV": 50.0, "gate_BV": 0.9, "keep_BV": True, "log_prob_B": 9.0}

    def grown(value, name):
        if value is None or not isinstance(value, torch.Tensor) or name not in loud:
            return value
        wide = value if name.endswith("_B") else F.pad(value, (0, 0, 0, 1) if name.endswith("D") else (0, 1), value=0)
        if not name.endswith("_B"):
            wide[:, V:] = loud[name]
        return torch.cat([wide, torch.full_like(wide[:1], loud[name])])

    view = {k: grown(v, k) for k, v in vars(stage.view).items()}
    view["valid_BV"] = valid_rows([*TOKENS, 1], V + 1)
    for key in ("row_BV", "col_BV", "tile_BV", "image_BV"):
        view[key] = torch.zeros(R + 1, V + 1, dtype=torch.long)
    selection = replace(stage.selection, **{k: grown(v, k) for k, v in vars(stage.selection).items()})
    counts, owner = [*TOKENS, 0], [*OWNER, 2]
    here.trace = Trace([stage_of(type(stage.view)(**view), selection, counts, owner)])
    torch.testing.assert_close(loss(here, taught), expected)


@pytest.mark.parametrize(("name", "arguments"), SUMS, ids=str)
def test_stages_add_up(name, arguments):
    loss = made(list_losses()[name], **arguments)
    here, _ = everything()
    once = loss(here, None)
    (stage,) = here.trace.stages
    here.trace = Trace([stage, replace(stage, stage=1, layer=3), replace(stage, stage=1, selection=None, view=None)])
    here.budgets = here.budgets * 2
    torch.testing.assert_close(loss(here, None), 2 * once)


# ------------------------------------------------------------------ budgets


def reference_budget(mean, ratio, below, floor):
    gap = mean - ratio
    low = {"quadratic": gap**2, "linear": -gap, "zero": 0.0}[below]
    return (gap**2 if gap > 0 else low) + max(0.0, floor - mean) ** 2


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("ratio", [0.2, 0.9])
@pytest.mark.parametrize("below", ["quadratic", "linear", "zero"])
@pytest.mark.parametrize("floor", [0.0, 0.6])
def test_budget(below, floor, pooled, ratio):
    here, _ = everything(ratio=ratio)
    means = [float(gate.mean()) for gate, _ in rows(here)]
    ratios = [Budget(keep_ratio=ratio).count(n) / n for n in TOKENS]
    if pooled:
        means, ratios = [sum(means) / R], [sum(ratios) / R]
    expected = [reference_budget(m, r, below, floor) for m, r in zip(means, ratios, strict=True)]
    term = OnBudget(below, floor, pooled)(here, None)
    assert term.item() == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_a_count_that_a_selector_expects_goes_before_its_gates():
    here, _ = everything()
    stage = here.trace.stages[0]
    expected = torch.tensor([3.0, 3.0, 2.0], requires_grad=True)
    here.trace = Trace([replace(stage, selection=replace(stage.selection, expected_B=expected))])
    assert OnBudget()(here, None).item() == 0
    assert OnBudget()(everything()[0], None).item() > 1e-4


def test_at_full_length_the_budget_is_what_is_aimed_at():
    here, _ = everything(ratio=1.0)
    assert OnBudget()(here, None).item() == pytest.approx(sum((1 - float(g.mean())) ** 2 for g, _ in rows(here)) / R)


def work(lengths):
    return decoder_flops(parts.text_config, [int(n) for n in lengths])


@pytest.mark.parametrize("one_sided", [True, False])
def test_flops_are_those_of_the_cost_formula(one_sided):
    here, _ = everything()
    stage = here.trace.stages[0]
    expected = torch.tensor([2.0, 4.0, 1.0], requires_grad=True)
    second = torch.tensor([1.0, 2.0, 1.0], requires_grad=True)
    first = replace(stage, layer=1, selection=replace(stage.selection, expected_B=expected))
    then = replace(stage, stage=1, layer=3, selection=replace(stage.selection, expected_B=second))
    here.trace, here.budgets = Trace([first, then]), here.budgets * 2
    terms = []
    for total, one, two in ((12, 6, 3), (4, 1, 1)):  # a sample of two images, and one of one; text alone costs nothing
        text = S - total
        share = work([S, text + one, text + one, text + two]) / work([S] * 4)
        terms.append(max(0.0, share - 0.8) ** 2 if one_sided else (share - 0.8) ** 2)
    loss = made(Flops, target=0.8, one_sided=one_sided)
    assert sum(terms) > 0
    assert loss(here, None).item() == pytest.approx(sum(terms) / 2, rel=1e-4)
    loss(here, None).backward()
    assert expected.grad[2] != 0
    assert (expected.grad[:2] == 0).all() == one_sided  # that sample is below the target


def test_a_stage_that_nobody_asked_costs_what_it_retained():
    here, _ = everything()
    stage = here.trace.stages[0]
    first = replace(stage, layer=1, selection=None, view=None, vision_out=[3, 3, 2])
    then = replace(
        stage, stage=1, layer=2, selection=replace(stage.selection, expected_B=torch.tensor([1.0, 1.0, 1.0]))
    )
    here.trace, here.budgets = Trace([first, then]), here.budgets * 2
    shares = [work([S, S - n + a, S - n + b, S - n + b]) / work([S] * 4) for n, a, b in ((12, 6, 2), (4, 2, 1))]
    expected = sum((share - 0.1) ** 2 for share in shares) / 2
    assert made(Flops, target=0.1, one_sided=False)(here, None).item() == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------ gates and scores


def test_sparsity_bce_and_entropy_of_gates():
    here, _ = everything()
    l1, bce, entropy = [], [], []
    for (gate, _), k in zip(rows(here), COUNTS, strict=True):
        best = set(gate.argsort(descending=True)[:k].tolist())
        l1.append(sum(float(m) for m in gate) / len(gate))
        logs = [math.log(m if i in best else 1 - m) for i, m in enumerate(gate.tolist())]
        bce.append(-sum(logs) / len(gate))
        entropy.append(sum(-m * math.log2(m) - (1 - m) * math.log2(1 - m) for m in gate.tolist()) / len(gate))
    assert Sparsity()(here, None).item() == pytest.approx(sum(l1) / R, rel=1e-5)
    assert BCE()(here, None).item() == pytest.approx(sum(bce) / R, rel=1e-5)
    assert Entropy()(here, None).item() == pytest.approx(sum(entropy) / R, rel=1e-5)
    assert Entropy(spread=True)(here, None).item() == pytest.approx(-sum(entropy) / R, rel=1e-5)


def test_entropy_of_scores():
    here, _ = everything()
    found = []
    for _, scores in rows(here):
        p = scores.softmax(0).tolist()
        found.append(-sum(x * math.log(x) for x in p) / math.log(len(p)))
    assert Entropy("score")(here, None).item() == pytest.approx(sum(found) / R, rel=1e-5)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_gates_that_are_decided_cost_no_entropy_and_no_nan(gate):
    here, _ = everything()
    stage = here.trace.stages[0]
    hard = (torch.full((R, V), gate)).requires_grad_()
    here.trace = Trace([replace(stage, selection=replace(stage.selection, gate_BV=hard))])
    for loss in (Entropy(), BCE(), Sparsity(), OnBudget(), Reconstruct()):
        term = loss(here, None)
        term.backward()
        assert term.isfinite()
        assert hard.grad.isfinite().all()
    assert Entropy()(here, None) < 1e-4


def test_imitation_of_a_choice():
    here, _ = everything()
    view = here.trace.stages[0].view
    keep = create("uniform")(view, torch.tensor(COUNTS)).keep_BV
    terms = []
    for r, (_, scores) in enumerate(rows(here)):
        logs = scores.log_softmax(0)
        terms.append(-sum(logs[i] for i in range(len(logs)) if keep[r, i]) / COUNTS[r])
    torch.testing.assert_close(Imitate("uniform")(here, None), torch.stack(terms).mean())


def test_imitation_of_scores_is_over_when_the_order_and_shape_agree():
    here, _ = everything()
    stage = here.trace.stages[0]
    target = create("novelty")(stage.view, torch.tensor(COUNTS)).scores_BV
    loss = Imitate("novelty", of="scores", temperature=0.5)
    terms = []
    for r, (_, scores) in enumerate(rows(here)):
        p, q = (((x - x.mean()) / x.std(correction=0) / 0.5).softmax(0) for x in (target[r, : len(scores)], scores))
        terms.append((p * (p / q).log()).sum())
    torch.testing.assert_close(loss(here, None), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    same = (3 * target + 5).detach().requires_grad_()
    here.trace = Trace([replace(stage, selection=replace(stage.selection, scores_BV=same))])
    assert loss(here, None).abs() < 1e-5


def test_a_guide_may_read_what_the_gate_reads():
    """No other views: training does not collect them."""

    def plan(**scorer):
        gate = {"type": "learned_gate", "scorer": {"type": "local_global", **scorer}}
        return PruningPlan([Stage(gate, 2, keep_tokens=3), Stage("fastv", 3, keep_tokens=2)])

    Imitate("cdpruner").prepare(parts.model, parts, plan(question=True))
    with pytest.raises(
        ValueError, match=r"^Loss 'imitate': pruner 'cdpruner' needs text, which 'learned_gate' at [^\n]*$"
    ):
        Imitate("cdpruner").prepare(parts.model, parts, plan())
    with pytest.raises(ValueError, match="needs attention, which 'learned_gate' at layer 2 does not read"):
        Imitate("fastv").prepare(parts.model, parts, plan(question=True))
    here, _ = everything()
    stage = here.trace.stages[0]
    words = torch.ones(R, S, dtype=torch.bool)
    text = torch.randn(R, S, D, generator=torch.Generator().manual_seed(4))
    view = replace(stage.view, text_BSD=text, text_role_BS=words.to(torch.int8) * INSTRUCTION, text_valid_BS=words)
    here.trace = Trace([replace(stage, view=view)])
    keep = create("cdpruner")(view, torch.tensor(COUNTS)).keep_BV
    terms = [
        -scores.log_softmax(0)[keep[r, : len(scores)]].sum() / COUNTS[r] for r, (_, scores) in enumerate(rows(here))
    ]
    torch.testing.assert_close(Imitate("cdpruner")(here, None), torch.stack(terms).mean())


def test_mixed_precision_does_not_change_what_is_imitated():
    here, _ = everything()
    stage = here.trace.stages[0]
    scores = create("novelty")(stage.view, torch.tensor(COUNTS)).scores_BV
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = create("novelty")(stage.view, torch.tensor(COUNTS)).scores_BV
        term = Imitate("novelty", of="scores")(here, None)
    assert not torch.equal(scores, rounded), "control: half precision does change the guide"
    assert torch.equal(term, Imitate("novelty", of="scores")(here, None))


def test_scores_that_nothing_learns_are_not_imitated():
    here, _ = everything()
    stage = here.trace.stages[0]
    here.trace = Trace([replace(stage, selection=replace(stage.selection, scores_BV=torch.randn(R, V)))])
    assert Imitate()(here, None) is None
    assert Entropy("score")(here, None) is None


# ------------------------------------------------------------------ a scorer's own answers


def test_twig_is_the_label_loss_of_the_scorers_own_states():
    here, leaves = everything()
    loss = made(Twig)
    terms = []
    for b, s in itertools.product(range(B), range(S)):
        if LABELS[b, s] != -100:
            logits = loss.head(loss.norm(leaves["text"][b, s - 1]))
            terms.append(-logits.log_softmax(0)[LABELS[b, s]])
    torch.testing.assert_close(loss(here, None), torch.stack(terms).mean())
    loss.cap = 2.0
    assert (loss(here, None) - torch.stack(terms).mean()).abs() > 1e-3


def test_a_twig_behind_another_stage_is_refused():
    here, _ = everything()
    stage = here.trace.stages[0]
    short = replace(stage.selection, text_BSD=torch.randn(B, S - 4, D))
    here.trace = Trace([replace(stage, stage=1, selection=short)])
    here.budgets = here.budgets * 2
    with pytest.raises(ValueError, match=r"^Loss 'twig' needs a scorer that reads the whole sequence: stage 1 [^\n]*$"):
        made(Twig)(here, None)


def test_a_gate_that_a_pruner_gave_in_mode_drop_counts_as_well():
    view = view_of(TOKENS)
    keep = valid_rows(COUNTS)
    gate = (keep.float() * 0.5).requires_grad_()
    here = answered(trace=Trace([stage_of(view, Selection(keep, torch.zeros(R, V), gate), kept=COUNTS)]))
    here.budgets = [Budget(keep_ratio=0.5)]
    means = [0.5 * k / n for k, n in zip(COUNTS, TOKENS, strict=True)]
    assert Sparsity()(here, None).item() == pytest.approx(sum(means) / R)


# ------------------------------------------------------------------ on a model


def test_losses_read_what_they_need_of_a_real_model():
    model = tiny_model()
    found = resolve(model)
    text = model.config.get_text_config()
    flops = Flops()
    flops.prepare(model, found, None)
    a, b = flops.cost
    assert flops.num_layers == text.num_hidden_layers
    assert 2 * (a * 50 + b * 50**2) * flops.num_layers == decoder_flops(text, [50] * flops.num_layers)
    inputs = batch([(3, 1, 6), (9, 0, 5)])
    here = run_pass(model, inputs | {"labels": answer_labels(inputs)})
    # A scorer that carries the states which reach the last norm answers as the model does.
    before = []
    handle = found.final_norm.register_forward_pre_hook(lambda norm, args: before.append(args[0]))
    model(**inputs)
    handle.remove()
    selection = Selection(valid_rows([4]), torch.zeros(1, V), text_BSD=before[0])
    here.trace = Trace([stage_of(view_of([4]), selection, [4], [0])])
    here.budgets = [Budget(keep_tokens=2)]
    twig = Twig()
    twig.prepare(model, found, None)
    torch.testing.assert_close(twig(here, None), Label()(here, None))
