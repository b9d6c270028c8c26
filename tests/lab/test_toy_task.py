import pytest
import torch

from tpcompress.lab.estimators.toy_task import (
    FACTS,
    KEEP,
    KEYS,
    TOKENS,
    WEIGHTS,
    WIDTH,
    World,
    answer,
    hard_scores,
    load_model,
    save_weights,
    train_dense,
)
from tpcompress.pruners import Pruner, Selection, create
from tpcompress.pruners.topk import keep_topk


class Knowing(Pruner):
    """Prefers tokens that it was told about."""

    name = "knowing"

    def __init__(self, scores_BV=None) -> None:
        super().__init__()
        self.scores_BV = scores_BV

    def forward(self, tokens, num_keep_B) -> Selection:
        return Selection(keep_topk(self.scores_BV, tokens.valid_BV, num_keep_B), self.scores_BV)


@pytest.fixture(scope="module")
def model():
    return load_model()


def draw(batch: int = 32, seed: int = 0):
    return World.make().draw(batch, torch.Generator().manual_seed(seed))


def gate(applier: str, selector: str = "straight_through") -> Pruner:
    torch.manual_seed(0)
    made = create({"type": "learned_gate", "scorer": "mlp", "selector": selector, "applier": applier})
    made.build(WIDTH)
    return made.train()


def test_the_answerer_is_dense_and_small(model):
    right, _ = hard_scores(model, None, batch=4096)
    assert right >= 0.995
    assert WEIGHTS.stat().st_size < 200_000
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_only_the_facts_matter():
    """Keeping them is as good as keeping all, keeping others as good as guessing, and chance knows neither."""
    model, samples = load_model(), draw(1024)
    facts = samples.fact_BV.float()
    right = {}
    for name, scores in (("facts", facts), ("others", -facts)):
        done = answer(model, samples, Knowing(scores), keep=FACTS)
        right[name] = (done.logits_BC.argmax(-1) == samples.answer_B).float().mean().item()
    assert right["facts"] > 0.98
    assert right["others"] < 0.25
    accuracy, recall = hard_scores(model, create("random"), batch=2048)
    assert recall == pytest.approx(KEEP / TOKENS, abs=0.02)
    assert accuracy < 0.4


def test_a_picture_answers_its_question_once():
    samples = draw(64)
    assert (samples.fact_BV.sum(1) == FACTS).all()
    assert samples.query_B.min() >= 0
    assert samples.query_B.max() < KEYS
    again, other = draw(64), draw(64, seed=1)
    assert torch.equal(samples.image_BVD, again.image_BVD)
    assert not torch.equal(samples.image_BVD, other.image_BVD)


def test_hiding_by_log_bias_is_gathering_and_by_values_is_not(model):
    """Full length with hard gates against truly shorter sequences: what the product's modes promise each other."""
    samples = draw()
    logits = {}
    for applier in ("log_bias", "value", "gather_value"):
        done = answer(model, samples, gate(applier), full_length=applier != "gather_value")
        assert done.selection.keep_BV.sum(1).tolist() == [KEEP] * 32
        logits[applier] = done.logits_BC
    assert torch.allclose(logits["log_bias"], logits["gather_value"], atol=1e-4)
    assert (logits["value"] - logits["gather_value"]).abs().max() > 0.1


@pytest.mark.parametrize("applier", ["value", "log_bias", "noise", "scale", "gather_value", "merge", "rest"])
def test_the_products_appliers_carry_a_gradient_to_the_scorer(model, applier):
    samples, pruner = draw(), gate(applier)
    done = answer(model, samples, pruner, full_length=pruner.applier.full_length)
    torch.nn.functional.cross_entropy(done.logits_BC, samples.answer_B).backward()
    assert all(p.grad is not None for p in pruner.scorer.parameters())
    assert sum(p.grad.abs().sum() for p in pruner.scorer.parameters()) > 0


def test_full_length_without_gates_is_cut(model):
    samples = draw()
    pruner = Knowing(samples.fact_BV.float())
    cut, hidden = (answer(model, samples, pruner, full_length=full).logits_BC for full in (False, True))
    assert torch.equal(cut, hidden)


def test_rows_of_different_counts_do_not_see_each_other(model):
    samples, pruner = draw(), gate("gather", "threshold").eval()
    together = answer(model, samples, pruner)
    counts = together.selection.keep_BV.sum(1)
    assert counts.min() < counts.max()
    for row in (int(counts.argmin()), int(counts.argmax())):
        one = type(samples)(*(value[row : row + 1] for value in vars(samples).values()))
        assert torch.allclose(answer(model, one, pruner).logits_BC[0], together.logits_BC[row], atol=1e-4)


def test_weights_come_back_in_half_precision(tmp_path):
    made = train_dense(steps=2)
    save_weights(made, tmp_path / "w.npz")
    loaded = load_model(tmp_path / "w.npz").state_dict()
    for name, value in made.state_dict().items():
        assert torch.equal(value.half().float(), loaded[name])
    with pytest.raises(FileNotFoundError, match=r"run scripts/build_retrieval.py"):
        load_model(tmp_path / "none.npz")


def test_training_the_answerer_is_reproducible_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = train_dense(steps=3), train_dense(steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.slow
def test_the_answerer_can_be_built_again():
    assert hard_scores(train_dense().eval(), None, batch=4096)[0] >= 0.995
