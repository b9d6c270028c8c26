"""What every applier promises, the formulas of each, and every selector with every applier."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from no_sync import NoSync
from support import config_id, make_view, pad_view
from torch import Tensor

from tpcompress.pruners import Selection, TokenView, create
from tpcompress.pruners.appliers.log_bias import log_gate
from tpcompress.pruners.appliers.noise import noise_gate
from tpcompress.pruners.appliers.rest import fuse_rest
from tpcompress.pruners.gate_components import Applier, Choice
from tpcompress.pruners.registry import create_part, list_parts
from tpcompress.pruners.selectors.relaxations import straight_through
from tpcompress.pruners.topk import keep_topk, standardise

APPLIERS: dict[str, type[Applier]] = list_parts("applier")  # type: ignore[assignment]
SELECTORS = list_parts("selector")
PAIRS = [
    {
        "type": "learned_gate",
        "scorer": {"type": "cross_attention", "union": True} if selector_class.votes else {"type": "linear"},
        "selector": {"type": selector},
        "applier": {"type": applier},
    }
    for selector, selector_class in SELECTORS.items()
    for applier, applier_class in APPLIERS.items()
    if selector_class.exact_count or not applier_class.merges
]
"""Every selector with every applier, but for merging and counting for itself, which learned_gate refuses."""

B, V, D, COUNTS = 3, 12, 16, [1, 5, 12]

every_applier = pytest.mark.parametrize("name", APPLIERS)
every_pair = pytest.mark.parametrize("config", PAIRS, ids=lambda c: f"{c['selector']['type']}-{c['applier']['type']}")


def view(soft: bool, padding: int = 0, dtype: torch.dtype = torch.float32) -> TokenView:
    x = torch.randn(B, V, D, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    tokens = TokenView.of(x, (3, 4), soft=soft)
    return pad_view(tokens, padding, (5, 5)) if padding else tokens


def choice_of(tokens: TokenView, hard: bool = True, gated: bool = True) -> tuple[Choice, Tensor]:
    """A choice with a gate of fresh weights, and the leaf that its gradient should reach."""
    g = torch.Generator().manual_seed(1)
    scores = standardise(F.pad(torch.randn(B, V, generator=g), (0, tokens.valid_BV.shape[1] - V)), tokens.valid_BV)
    keep = keep_topk(scores, tokens.valid_BV, torch.tensor(COUNTS))
    leaf = torch.rand(B, tokens.valid_BV.shape[1], generator=g).requires_grad_()
    soft = leaf.masked_fill(~tokens.valid_BV, 0.0)
    gate = straight_through(keep, soft) if hard else soft
    return Choice(keep, scores, gate if gated else None, log_prob_B=leaf.sum(1), expected_B=leaf.mean(1)), leaf


def attention(x_BVD: Tensor, selection: Selection, hidden: bool) -> Tensor:
    """What two words behind the tokens read of them and of themselves in one layer, gates and all: (B, 2, D).

    Args:
        x_BVD: the tokens, values of the selection or those of the view.
        selection: whose gates act.
        hidden: dropped tokens are cut.
    """
    word_B2D = torch.randn(B, 2, D, generator=torch.Generator().manual_seed(2))
    seen_BND = torch.cat([x_BVD, word_B2D], 1)
    logits_B2N = word_B2D @ seen_BND.mT / D**0.5
    if hidden:
        logits_B2N = logits_B2N.masked_fill(F.pad(~selection.keep_BV, (0, 2))[:, None], -torch.inf)
    if selection.key_bias_BV is not None:
        logits_B2N = logits_B2N + F.pad(selection.key_bias_BV, (0, 2))[:, None]
    if selection.value_gate_BV is not None:
        seen_BND = seen_BND * F.pad(selection.value_gate_BV, (0, 2), value=1.0)[..., None]
    return logits_B2N.softmax(-1) @ seen_BND


def run(name: str, tokens: TokenView, choice: Choice) -> tuple[Selection, Tensor]:
    """A selection, and what a layer behind it makes of the training pass."""
    torch.manual_seed(11)
    selection = create_part("applier", name)(tokens, choice)
    x = tokens.vision_BVD if selection.vision_BVD is None else selection.vision_BVD
    full = tokens.soft and selection.gate_BV is not None
    return selection, attention(x, selection, hidden=not full)


@every_applier
def test_config_round_trip(name: str) -> None:
    applier = create_part("applier", name)
    assert create_part("applier", applier.config()).config() == json.loads(json.dumps(applier.config()))
    assert applier.__doc__
    assert "eeds no full length" in applier.__doc__ or "eeds full length" in applier.__doc__
    assert ("eeds full length" in applier.__doc__) == applier.full_length
    assert "`drop`" in applier.__doc__ or "both modes" in applier.__doc__


@every_applier
def test_without_a_gate_it_passes_the_choice_on(name: str) -> None:
    for soft in (False, True):
        tokens = view(soft)
        choice, _ = choice_of(tokens, gated=False)
        selection, _ = run(name, tokens, choice)
        assert selection.keep_BV is choice.keep_BV
        assert selection.scores_BV is choice.scores_BV
        assert selection.log_prob_B is choice.log_prob_B
        assert selection.expected_B is choice.expected_B
        assert selection.gate_BV is selection.value_gate_BV is selection.key_bias_BV is None
        assert (selection.vision_BVD is not None) == APPLIERS[name].merges


@every_applier
def test_what_acts_where(name: str) -> None:
    """Under a view that is soft a gate keeps everything; elsewhere gates go along, and full-length ones do not act."""
    cls = APPLIERS[name]
    for soft in (False, True):
        tokens = view(soft)
        choice, _ = choice_of(tokens)
        selection, _ = run(name, tokens, choice)
        acts = [selection.value_gate_BV, selection.key_bias_BV]
        assert selection.keep_BV is choice.keep_BV
        assert selection.log_prob_B is choice.log_prob_B
        assert selection.expected_B is choice.expected_B
        assert (selection.gate_BV is choice.gate_BV) == (cls.full_length or not soft)
        assert any(a is not None for a in acts) == (cls.gates and (soft or not cls.full_length))
        if cls.full_length:
            changes = selection.vision_BVD is not None or any(a is not None for a in acts)
            assert changes == soft
        if selection.key_bias_BV is not None:
            assert selection.key_bias_BV.dtype == torch.float32


EXACT = {"gather", "gather_value", "log_bias", "merge", "rest"}
"""Whose training with hard gates is inference. Of the others the softmax mass of dropped tokens remains."""


@every_applier
@pytest.mark.parametrize("soft", [False, True])
def test_training_with_hard_gates_is_inference(name: str, soft: bool) -> None:
    tokens = view(soft)
    choice, _ = choice_of(tokens)
    _, trained = run(name, tokens, choice)
    bare, _ = choice_of(tokens, gated=False)
    _, inference = run(name, tokens, bare)
    gap = (trained - inference).abs().amax((1, 2))
    if name in EXACT or not soft:
        assert gap.max() < 1e-6
    else:
        assert gap[:2].min() > 1e-2, "control: dropped tokens keep their share of the softmax"
        assert gap[2] < 1e-2 or name == "noise", "without a dropped token nothing remains"
    if name != "log_bias":
        return
    smooth, _ = choice_of(tokens, hard=False)
    _, through = run(name, tokens, smooth)
    assert not soft or (through - inference).abs().max() > 1e-2, "control: smooth gates are read through"


@every_applier
def test_the_gradient_reaches_the_gates(name: str) -> None:
    """At full length those of every token; on cut sequences those of retained tokens, or of what joined them."""
    for hard in (True, False):
        tokens = view(APPLIERS[name].full_length)
        choice, leaf = choice_of(tokens, hard=hard)
        _, out = run(name, tokens, choice)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        grad = torch.autograd.grad((out * weight).sum(), leaf, allow_unused=True)[0]
        if name in ("gather", "rest"):
            assert grad is None, "the gate does not act"
            continue
        assert grad is not None
        assert grad.isfinite().all()
        reached = grad.abs() > 1e-9
        if name == "gather_value":
            assert torch.equal(reached, choice.keep_BV)
        elif name == "merge":
            assert reached[0].all(), "all joined the one"
            assert not reached[2].any(), "nothing joins where nothing is dropped"
        elif hard and name == "noise":
            assert reached.any()
        else:
            assert reached.all()


@every_applier
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_stay_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    tokens = view(APPLIERS[name].full_length, dtype=dtype)
    choice, _ = choice_of(tokens)
    selection = create_part("applier", name)(tokens, choice)
    assert selection.vision_BVD is None or selection.vision_BVD.dtype == dtype
    for what in (selection.vision_BVD, selection.key_bias_BV, selection.value_gate_BV):
        assert what is None or what.isfinite().all()


@every_applier
def test_padding_changes_nothing(name: str) -> None:
    for soft in (False, True):
        found = []
        for padding in (0, 5):
            tokens = view(soft, padding)
            choice, _ = choice_of(tokens, gated=name != "noise")  # which draws per token of the batch
            found.append(create_part("applier", name)(tokens, choice))
        plain, padded = found
        assert torch.equal(padded.keep_BV[:, :V], plain.keep_BV)
        if plain.vision_BVD is not None:
            assert torch.allclose(padded.vision_BVD[:, :V], plain.vision_BVD, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- log bias


def test_log_gate_neither_underflows_nor_leaks() -> None:
    gate = torch.tensor([0.0, 1e-20, 1e-10, 0.25, 1.0], requires_grad=True)
    bias = log_gate(gate)
    assert torch.allclose(bias.detach(), torch.tensor([-30.0, -30.0, -23.0259, -1.3863, 0.0]), atol=2e-3)
    assert bias[-1] == 0
    (slope,) = torch.autograd.grad(bias.sum(), gate)
    assert slope.isfinite().all()
    assert slope[0].item() == pytest.approx(1.0686e13, rel=1e-3)


def test_log_bias_has_the_gradient_of_the_masked_softmax() -> None:
    """d/dm of sum_j e^l_j m_j v_j / sum_j e^l_j m_j, which is the derivative of removing or adding a token."""
    tokens = view(True)
    for hard in (True, False):
        choice, leaf = choice_of(tokens, hard=hard)
        selection, out = run("log_bias", tokens, choice)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        (ours,) = torch.autograd.grad((out * weight).sum(), leaf, retain_graph=True)
        word = torch.randn(B, 2, D, generator=torch.Generator().manual_seed(2))
        seen = torch.cat([tokens.vision_BVD.detach(), word], 1)
        mass = (word @ seen.mT / D**0.5).exp() * F.pad(choice.gate_BV, (0, 2), value=1.0)[:, None]
        product = mass / mass.sum(-1, keepdim=True) @ seen
        assert torch.allclose(product, out, atol=1e-5)
        (theirs,) = torch.autograd.grad((product * weight).sum(), leaf)
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
        assert selection.key_bias_BV.max() <= 0


# ------------------------------------------------------------------------------------------------- noise and scale


def test_noise_applier_is_the_noise_gate() -> None:
    tokens = view(True)
    choice, _ = choice_of(tokens, hard=False)
    selection, _ = run("noise", tokens, choice)
    torch.manual_seed(11)
    assert torch.equal(selection.vision_BVD, noise_gate(tokens.vision_BVD, choice.gate_BV, tokens.valid_BV))


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_noise_keeps_mean_and_variance_of_each_channel(level: float) -> None:
    x = torch.randn(4, 4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 10.0]) + 5
    valid = torch.ones(4, 4000, dtype=torch.bool)
    torch.manual_seed(11)
    out = noise_gate(x, torch.full((4, 4000), level), valid)
    assert torch.allclose(out.mean((0, 1)), x.mean((0, 1)), atol=0.2)
    assert torch.allclose(out.std((0, 1)), x.std((0, 1)), rtol=0.03)
    kept = torch.corrcoef(torch.stack([out[..., 1].flatten(), x[..., 1].flatten()]))[0, 1].item()
    assert kept == pytest.approx(level**0.5, abs=0.03)


def test_a_norm_undoes_the_scale() -> None:
    tokens = view(True)
    choice, _ = choice_of(tokens, hard=False)
    scaled = create_part("applier", "scale")(tokens, choice).vision_BVD
    assert torch.allclose(scaled, tokens.vision_BVD * choice.gate_BV[..., None])
    assert torch.allclose(F.normalize(scaled, dim=-1), F.normalize(tokens.vision_BVD, dim=-1), atol=1e-5)


# -------------------------------------------------------------------------------------------------- merge and rest


def test_merge_is_the_mean_of_each_group() -> None:
    tokens = view(False)
    choice, leaf = choice_of(tokens)
    merged = create_part("applier", "merge")(tokens, choice).vision_BVD
    x = tokens.vision_BVD
    unit = F.normalize(x, dim=-1)
    for b in range(B):
        kept = choice.keep_BV[b].nonzero()[:, 0].tolist()
        groups: dict[int, list[int]] = {s: [s] for s in kept}
        for v in set(range(V)) - set(kept):
            groups[max(kept, key=lambda s: (unit[b, v] @ unit[b, s]).item())].append(v)
        for s, members in groups.items():
            assert torch.allclose(merged[b, s], x[b, members].mean(0), atol=1e-6)
        if b == 0:
            (grad,) = torch.autograd.grad(merged[0, kept[0]].sum(), leaf, retain_graph=True)
            assert torch.allclose(grad[0], (x[0] - x[0].mean(0)).sum(-1) / V, atol=1e-5)


def test_rest_token_is_the_softmax_mean_of_what_was_dropped() -> None:
    tokens = view(False)
    choice, _ = choice_of(tokens, gated=False)
    scores = choice.scores_BV.clone().requires_grad_()
    x = tokens.vision_BVD
    out = fuse_rest(x, scores, choice.keep_BV, tokens.valid_BV)
    for b, k in enumerate(COUNTS):
        order = scores[b].argsort(descending=True)
        whole, pool = order[: k - 1], order[k - 1 :]
        assert torch.equal(out[b, whole], x[b, whole]), "the best ones stay as they are"
        expected = scores[b, pool].softmax(0) @ x[b, pool]
        assert torch.allclose(out[b, order[k - 1]], expected, atol=1e-5)
        assert torch.equal(out[b, order[k:]], x[b, order[k:]])
    assert torch.equal(out[2], x[2]), "nothing was dropped, nothing changes"
    (grad,) = torch.autograd.grad(out[choice.keep_BV].square().sum(), scores)
    assert (grad[0] != 0).all(), "the one token stands for all"
    assert ((grad[1] != 0) == (scores[1] <= scores[1].sort(descending=True).values[4])).all()
    assert grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ pairs


def built(config: dict[str, Any]) -> Any:
    pruner = create(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pruner.build(D)
    return pruner


@every_pair
def test_every_selector_goes_with_every_applier(config: dict[str, Any]) -> None:
    pruner = built(config).train()
    pruner.set_progress(0.4)
    x = torch.randn(B, V, D, generator=torch.Generator().manual_seed(0))
    for soft in (True, False):
        tokens = make_view(pruner, x.clone().requires_grad_(), (3, 4), soft=soft)
        selection = pruner(tokens, torch.tensor(COUNTS))
        if pruner.exact_count:
            assert selection.keep_BV.sum(1).tolist() == COUNTS
        values = x if selection.vision_BVD is None else selection.vision_BVD
        full = soft and selection.gate_BV is not None
        loss = attention(values, selection, hidden=not full).square().sum() + selection.scores_BV.square().sum()
        loss = loss + sum(p.sum() for p in (selection.log_prob_B, selection.expected_B) if p is not None)
        loss.backward()
        grads = [p.grad for p in pruner.parameters()]
        assert all(g is None or g.isfinite().all() for g in grads)
        assert any(g is not None and g.abs().max() > 1e-8 for g in grads)
    again = create(pruner.config())
    assert again.config() == pruner.config()
    again.build(D)
    again.load_state_dict(pruner.state_dict())
    hard, same = (p.eval()(make_view(p, x, (3, 4)), torch.tensor(COUNTS)) for p in (pruner, again))
    assert torch.equal(hard.keep_BV, same.keep_BV)
    assert hard.gate_BV is hard.value_gate_BV is hard.key_bias_BV is None


@every_pair
def test_no_pair_makes_the_host_wait(config: dict[str, Any]) -> None:
    pruner = built(config)
    tokens = make_view(pruner, torch.randn(B, V, D), (3, 4), soft=True)
    with NoSync() as guard:
        for train in (True, False):
            pruner.train(train)(tokens, torch.tensor(COUNTS))
    assert guard.seen > 10, "control: it ran under the guard"


def test_pairs_cover_both_registries() -> None:
    assert {c["selector"]["type"] for c in PAIRS} == set(SELECTORS)
    assert {c["applier"]["type"] for c in PAIRS} == set(APPLIERS)
    assert len(PAIRS) >= len(SELECTORS) * (len(APPLIERS) - 2)
    assert config_id(PAIRS[0])


def test_the_default_gate_is_what_it_was() -> None:
    """Soft top-k and noise, with the same draws: its formula written out."""
    pruner = built({"type": "learned_gate"}).train()
    tokens = make_view(pruner, torch.randn(B, V, D, generator=torch.Generator().manual_seed(5)), (3, 4), soft=True)
    torch.manual_seed(3)
    selection = pruner(tokens, torch.tensor(COUNTS))
    scores = standardise(pruner.scorer(tokens).scores_BV, tokens.valid_BV)
    low, high = -scores.amax(1, keepdim=True) / 0.5 - 20, -scores.amin(1, keepdim=True) / 0.5 + 20
    for _ in range(60):
        middle = (low + high) / 2
        below = (scores / 0.5 + middle).sigmoid().sum(1, keepdim=True) < torch.tensor(COUNTS)[:, None]
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    gate = (scores / 0.5 + middle).sigmoid()
    assert torch.allclose(selection.gate_BV, gate, atol=1e-5)
    torch.manual_seed(3)
    x = tokens.vision_BVD
    mu, sigma = x.mean((0, 1)), x.std((0, 1), correction=0)
    m = gate[..., None]
    expected = mu + m.sqrt() * (x - mu) + (1 - m).clamp(min=1e-6).sqrt() * torch.randn_like(x) * sigma
    assert torch.allclose(selection.vision_BVD, expected, atol=1e-4)
