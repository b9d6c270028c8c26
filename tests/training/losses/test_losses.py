"""What every loss promises, and the losses on answers against references written token by token."""

import importlib
import math
from dataclasses import replace

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from no_sync import NoSync
from support import answer_labels, batch, tiny_model
from training.losses.gate_passes import NUM_ANSWERS, C, answered, everything, made, moved_leaf, variants

from tpcompress.insertion.attach import attach, mode, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.training import losses as package
from tpcompress.training.losses import Loss, Ramp, list_losses, needs_of, weighed
from tpcompress.training.losses.hidden import Hidden
from tpcompress.training.losses.jsd import JSD, jensen_shannon
from tpcompress.training.losses.kl import KL, kl_to_teacher
from tpcompress.training.losses.label import Label, label_loss, sample_losses
from tpcompress.training.losses.sparsity import Sparsity
from tpcompress.training.passes import Pass, run_pass

EACH = pytest.mark.parametrize(("name", "arguments"), variants(), ids=lambda value: str(value))


def teacher_for(loss: Loss) -> Pass | None:
    return answered(7) if "teacher" in loss.needs else None


# ------------------------------------------------------------------ what every loss promises


def test_the_variants_cover_every_loss():
    assert {name for name, _ in variants()} == set(list_losses())
    assert len({cls.name for cls in list_losses().values()}) == len(list_losses()), "words in logs"


@EACH
def test_a_term_is_one_fp32_number_whose_gradient_reaches_what_it_moves(name, arguments):
    loss = made(list_losses()[name], **arguments)
    here, leaves = everything()
    term = loss(here, teacher_for(loss))
    assert term.shape == ()
    assert term.dtype == torch.float32
    term.backward()
    gradient = leaves[moved_leaf(loss)].grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 1e-6
    others = {name for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.abs().sum() > 0}
    assert others == {moved_leaf(loss)}


@EACH
def test_half_precision_is_widened_before_anything_is_added_up(name, arguments):
    loss = made(list_losses()[name], **arguments)
    rounded, wide = everything(torch.bfloat16)[0], everything(torch.bfloat16)[0]
    stage = wide.trace.stages[0]
    chosen = {k: v.float() for k, v in vars(stage.selection).items() if v is not None and v.dtype == torch.bfloat16}
    view = replace(stage.view, vision_BVD=stage.view.vision_BVD.float())
    wide.trace.stages[0] = replace(stage, view=view, selection=replace(stage.selection, **chosen))
    wide.logits_AC = wide.logits_AC.float()
    one, two = loss(rounded, teacher_for(loss)), loss(wide, teacher_for(loss))
    assert one.dtype == two.dtype == torch.float32
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@EACH
def test_a_batch_without_pictures_answers_or_teacher_leaves_nothing_to_say(name, arguments):
    loss = made(list_losses()[name], **arguments)
    silent = replace(answered(), logits_AC=torch.zeros(0, C), targets_A=torch.zeros(0, dtype=torch.long))
    silent.sample_A = silent.targets_A
    assert loss(silent, replace(silent) if "teacher" in loss.needs else None) is None
    if moved_leaf(loss) not in ("logits", "hidden", "own"):
        assert loss(answered(), answered(7)) is None
    elif loss.needs:
        assert loss(answered(), None) is None


@EACH
def test_no_loss_makes_the_host_wait(name, arguments):
    loss = made(list_losses()[name], **arguments)
    here, _ = everything()
    taught = teacher_for(loss)
    with NoSync() as guard:
        loss(here, taught).backward()
    assert guard.seen > 5


def test_the_guard_notices_a_wait():
    with NoSync(), pytest.raises(AssertionError, match="wait"):
        answered().logits_AC.sum().item()


@EACH
def test_recipes_name_losses_by_class(name, arguments):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--losses", type=list[Loss])
    cls = list_losses()[name]
    ramp = {"start": 0.1, "end": 2.0, "until": 0.5}
    config = {"losses": [{"class_path": cls.__name__, "init_args": arguments | {"weight": ramp}}]}
    (loss,) = parser.instantiate(parser.parse_object(config)).losses
    assert type(loss) is cls
    assert loss.weight == Ramp(**ramp)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, Ramp(1.0, -0.5)])
def test_a_weight_below_nothing_is_refused(weight):
    with pytest.raises(ValueError, match=r"^Loss 'label' has weight [^\n]*$"):
        Label(weight=weight)


@pytest.mark.parametrize(
    ("module", "cls", "arguments"),
    [
        ("kl", "KL", {"temperature": 0.0}), ("jsd", "JSD", {"beta": 1.0}), ("hidden", "Hidden", {"metric": "l1"}),
        ("budget", "OnBudget", {"below": "cubic"}), ("budget", "OnBudget", {"floor": 1.0}),
        ("flops", "Flops", {"target": 0.0}), ("entropy", "Entropy", {"of": "tokens"}),
        ("imitate", "Imitate", {"of": "gate"}),
        ("imitate", "Imitate", {"pruner": "learned_gate"}), ("imitate", "Imitate", {"pruner": "vtw"}),
        ("reconstruct", "Reconstruct", {"through": "air"}), ("score_function", "ScoreFunction", {"baseline": "zero"}),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused_in_one_line(module, cls, arguments):
    found = getattr(importlib.import_module(f"{package.__name__}.{module}"), cls)
    with pytest.raises(ValueError, match=rf"^Loss '{module}'[^\n]*$"):
        found(**arguments)


# ------------------------------------------------------------------ weights


def test_a_ramp_moves_in_a_straight_line_and_stays():
    ramp = Ramp(0.1, 0.3, until=0.4)  # EPIC's gap: min(0.3, 0.1 + 0.5 p)
    for progress in (0.0, 0.1, 0.25, 0.4, 0.7, 1.0):
        assert ramp.at(progress) == pytest.approx(min(0.3, 0.1 + 0.5 * progress))
    with pytest.raises(ValueError, match=r"^A ramp needs [^\n]*$"):
        Ramp(0.0, 1.0, until=0.0)


def test_terms_are_weighed_by_the_progress_and_equal_names_add_up():
    here = answered()
    label = label_loss(here.logits_AC, here.targets_A).item()
    terms = weighed([Label(), Label(Ramp(0.0, 4.0)), Sparsity(9.0)], here, None, 0.25)
    assert set(terms) == {"label"}
    assert terms["label"].item() == pytest.approx(2 * label)


def test_a_loss_of_weight_0_is_not_even_asked():
    class Loud(Label):
        name = "loud"
        needs = frozenset({"teacher"})

        def __call__(self, here, taught):
            raise AssertionError("asked")

    loud = Loud(Ramp(1.0, 0.0, until=0.5))
    assert weighed([loud], answered(), None, 0.5) == {}
    assert needs_of([loud, Sparsity()], 0.5) == {"gate"}
    assert needs_of([loud, Sparsity()], 0.4) == {"gate", "teacher"}
    with pytest.raises(AssertionError, match="asked"):
        weighed([loud], answered(), None, 0.4)


# ------------------------------------------------------------------ losses on answers


def test_label_loss_of_the_batch_and_of_each_sample():
    here = answered()
    each = [-F.log_softmax(z, 0)[t] for z, t in zip(here.logits_AC, here.targets_A, strict=True)]
    torch.testing.assert_close(Label()(here, None), torch.stack(each).mean())
    cost, count = sample_losses(here.logits_AC, here.targets_A, here.sample_A, 4)
    assert count.tolist() == [3, 2, 3, 0]
    for b in range(3):
        mine = torch.stack([e for e, s in zip(each, here.sample_A, strict=True) if s == b])
        torch.testing.assert_close(cost[b], mine.mean())
    assert cost[3] == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_scaled_by_the_square_of_its_temperature(temperature):
    here, taught = answered(), answered(7)
    terms = []
    for z, t in zip(here.logits_AC, taught.logits_AC, strict=True):
        p, log_q = (t / temperature).softmax(0), (z / temperature).log_softmax(0)
        terms.append(sum(p[c] * (p[c].log() - log_q[c]) for c in range(C)))
    expected = torch.stack(terms).mean()
    loss = KL(temperature)(here, taught)
    torch.testing.assert_close(loss, temperature**2 * expected)
    torch.testing.assert_close(loss, kl_to_teacher(here.logits_AC, taught.logits_AC, temperature))
    loss.backward()
    # d KL / dz = (q - p) / T, so the square keeps gradients of one size at any temperature.
    gap = (here.logits_AC / temperature).softmax(1) - (taught.logits_AC / temperature).softmax(1)
    torch.testing.assert_close(here.logits_AC.grad, temperature * gap / NUM_ANSWERS)
    assert taught.logits_AC.grad is None


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_jsd_against_a_loop_over_the_vocabulary(beta):
    here, taught = answered(), answered(7)
    terms = []
    for z, t in zip(here.logits_AC.detach(), taught.logits_AC.detach(), strict=True):
        p, q = t.softmax(0), z.softmax(0)
        m = beta * p + (1 - beta) * q
        terms.append(sum(beta * p[c] * (p[c] / m[c]).log() + (1 - beta) * q[c] * (q[c] / m[c]).log() for c in range(C)))
    torch.testing.assert_close(JSD(beta)(here, taught), torch.stack(terms).mean())
    assert JSD(beta)(here, here).abs() < 1e-6


def test_jsd_is_bounded_where_kl_is_not():
    p, q = torch.tensor([[30.0, 0.0]]).log_softmax(1), torch.tensor([[0.0, 30.0]]).log_softmax(1)
    assert float(jensen_shannon(p, q)) == pytest.approx(math.log(2), abs=1e-5)
    assert kl_to_teacher(q, p) > 29


def cached(taught: Pass, top: int) -> Pass:
    """What a cache keeps of a pass."""
    log_p, index = taught.logits_AC.detach().log_softmax(1).topk(top)
    return replace(
        taught, logits_AC=log_p, top_indices_AT=index, tail_A=torch.log1p(-log_p.exp().sum(1)), hidden_AD=None,
        own_AC=None,
    )  # fmt: skip


@pytest.mark.parametrize("top", [1, 4, C - 1])
def test_kl_to_a_cache_misses_only_what_happens_within_the_rest(top):
    here, taught = answered(), answered(7)
    missed = []
    for z, t in zip(here.logits_AC, taught.logits_AC, strict=True):
        p, q = t.softmax(0), z.softmax(0)
        rest = t.argsort(descending=True)[top:]
        p_rest, q_rest = p[rest].sum(), q[rest].sum()
        missed.append(p_rest * sum(p[c] / p_rest * ((p[c] / p_rest) / (q[c] / q_rest)).log() for c in rest))
    full, part = KL()(here, taught), KL()(here, cached(taught, top))
    torch.testing.assert_close(full - part, torch.stack(missed).mean(), rtol=1e-4, atol=1e-5)
    assert part > 0
    assert (full - part > 1e-3) == (top < C - 1)


def test_at_other_temperatures_both_sides_are_conditioned_on_what_the_cache_holds():
    here, taught = answered(), answered(7)
    kept = cached(taught, 3)
    terms = []
    for z, t, index in zip(here.logits_AC, taught.logits_AC, kept.top_indices_AT, strict=True):
        p, log_q = (t[index] / 2).softmax(0), (z[index] / 2).log_softmax(0)
        terms.append((p * (p.log() - log_q)).sum())
    torch.testing.assert_close(KL(2.0)(here, kept), 4 * torch.stack(terms).mean())


def test_a_cache_has_no_hidden_states_and_no_logits_at_the_answers():
    here, kept = answered(), cached(answered(7), 3)
    with pytest.raises(ValueError, match=r"^Loss 'hidden' compares hidden states, [^\n]*$"):
        Hidden()(here, kept)
    with pytest.raises(ValueError, match=r"^KL with shifted: false needs logits [^\n]*$"):
        KL(shifted=False)(here, kept)


def test_hidden_states_by_direction_and_by_distance():
    here, taught = answered(), answered(7)
    pairs = list(zip(here.hidden_AD, taught.hidden_AD, strict=True))
    cosine = torch.stack([1 - (h @ t) / (h.norm() * t.norm()) for h, t in pairs]).mean()
    error = torch.stack([(h - t).square().sum() / t.square().sum() for h, t in pairs]).mean()
    torch.testing.assert_close(Hidden()(here, taught), cosine)
    torch.testing.assert_close(Hidden("mse")(here, taught), error)
    longer = replace(here, hidden_AD=3 * taught.hidden_AD)
    assert Hidden()(longer, taught).abs() < 1e-5
    assert Hidden("mse")(longer, taught).item() == pytest.approx(4, rel=1e-5)


# ------------------------------------------------------------------ on a model

SAMPLES = [(3, 1, 6), (1, 2, 9), (12, 0, 5)]


def shortened(keep: int, layer: int, side: str, own: bool = False):
    """Passes of student and teacher on one batch, and all logits of both with the labels that belong to them."""
    model = tiny_model()
    inputs = batch(SAMPLES, side)
    labels = answer_labels(inputs)
    attach(model, PruningPlan([Stage("uniform", layer, keep_ratio=keep / 64)]))
    with torch.no_grad():
        here = run_pass(model, inputs | {"labels": labels}, own=own)
        with mode(model, "off"):
            taught = run_pass(model, inputs | {"labels": labels}, own=own)
            teacher = model(**inputs).logits
        with record(model) as trace:
            student = model(**inputs, labels=labels).logits
    return here, taught, student, trace.labels_BN, teacher, labels


@pytest.mark.parametrize(("side", "layer"), [("left", 2), ("right", 0)])
@pytest.mark.parametrize("shifted", [True, False])
def test_distillation_compares_each_answer_token_with_itself(side, layer, shifted):
    here, taught, student, short, teacher, labels = shortened(8, layer, side, own=not shifted)
    assert student.shape[1] < teacher.shape[1]
    terms = []
    for b in range(len(SAMPLES)):
        # The n-th answer token of either side, found by counting, one at a time.
        mine = [i for i in range(short.shape[1]) if short[b, i] != -100]
        theirs = [i for i in range(labels.shape[1]) if labels[b, i] != -100]
        for i, j in zip(mine, theirs, strict=True):
            assert short[b, i] == labels[b, j]
            p, log_q = teacher[b, j - shifted].softmax(-1), student[b, i - shifted].log_softmax(-1)
            terms.append((p * (p.log() - log_q)).sum())
    loss = KL(shifted=shifted)(here, taught)
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)
    assert len(terms) == 12
    assert loss > 1e-3


def test_a_shift_by_one_token_changes_the_loss():
    here, taught, *_ = shortened(8, 0, "left", own=True)
    aligned, official = KL()(here, taught), KL(shifted=False)(here, taught)
    off_by_one = KL()(here, replace(taught, logits_AC=taught.own_AC))
    assert (aligned - official).abs() > 1e-3
    assert off_by_one > aligned + 0.1


def test_equal_models_have_nothing_to_distil():
    here, taught, *_ = shortened(64, 0, "left")
    assert KL()(here, taught) == 0
    assert Hidden("mse")(here, taught) == 0
