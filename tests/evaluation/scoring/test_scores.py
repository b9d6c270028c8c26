import numpy as np
import pytest

from tpcompress.evaluation.scoring.scores import Scores, learnt_families


def make(right, count=None, names=("a", "b", "c"), **more) -> Scores:
    right = np.asarray(right, dtype=float)
    count = np.ones_like(right) if count is None else np.asarray(count, dtype=float)
    return Scores(tuple(names[: right.shape[1]]), count, {"accuracy": (right, count)}, **more)


def bernoulli(share, images=400, seed=0):
    return (np.random.default_rng(seed).random((images, len(share))) < np.array(share)).astype(float)


def test_score_is_the_mean_of_learnt_families():
    scores = make([[1, 0, 1], [1, 1, 0]], learnt=("a", "b"))
    assert scores.families == {"a": 1.0, "b": 0.5, "c": 0.5}
    assert scores.score == 0.75
    assert scores.with_learnt(None).score == pytest.approx(2 / 3)
    assert np.isnan(scores.with_learnt([]).score)
    with pytest.raises(ValueError, match="learnt names d, but the data has a, b, c"):
        scores.with_learnt(["d"])


def test_interval_is_that_of_a_binomial_when_questions_are_independent():
    scores = make(bernoulli([0.3]))
    p = scores.score
    assert scores.ci95 == pytest.approx(1.96 * np.sqrt(p * (1 - p) / 400), rel=0.12)


def test_interval_counts_images_not_questions():
    """Ten equal answers about one image are one observation."""
    once = make(bernoulli([0.5]))
    tenfold = make(once.value_IF * 10, once.count_IF * 10)
    assert tenfold.ci95 == pytest.approx(once.ci95)


def test_interval_covers_the_truth():
    hits = [abs(make(bernoulli([0.4, 0.7], 60, seed)).score - 0.55) for seed in range(100)]
    widths = [make(bernoulli([0.4, 0.7], 60, seed)).ci95 for seed in range(100)]
    assert 0.86 <= np.mean(np.array(hits) <= np.array(widths)) <= 1


def test_bootstrap_is_seeded():
    right = bernoulli([0.3])
    assert make(right).ci95 == make(right).ci95
    assert make(right).ci95 != make(right, seed=1).ci95


def test_pairing_narrows_the_interval():
    before = bernoulli([0.5], 300)
    after = before.copy()
    after[:30] = 1
    first, second = make(before), make(after)
    delta, low, high = second.difference(first)
    assert delta == pytest.approx(second.score - first.score)
    assert 0 < low < delta < high
    assert high - low < first.ci95 + second.ci95
    assert first.difference(second) == pytest.approx((-delta, -high, -low))
    assert first.difference(first) == (0, 0, 0)


def test_difference_of_other_questions_is_refused():
    with pytest.raises(ValueError, match="Scores of different questions cannot be paired: 2 on 2 images and 3 on 3"):
        make([[1], [0]]).difference(make([[1], [0], [1]]))


def test_learnt_families_are_well_above_blind():
    dense, blind = make(bernoulli([0.9, 0.5, 0.55])), make(bernoulli([0.3, 0.5, 0.5], seed=1))
    assert learnt_families(dense, blind) == ["a"]
    few = make(bernoulli([0.5], 8, 3)), make(bernoulli([0.35], 8, 4))
    assert learnt_families(*few) == []


def test_a_family_missing_from_some_draws_does_not_matter():
    count = np.zeros((50, 2))
    count[:, 0], count[0, 1] = 1, 1
    scores = make(count * np.array([1, 0]), count)
    assert scores.score == 0.5
    assert 0 <= scores.ci95 <= 0.5


def test_scores_survive_a_file(tmp_path):
    for learnt in (None, (), ("a", "c")):
        scores = make(bernoulli([0.2, 0.5, 0.9]), learnt=learnt, skipped=3, seed=5)
        scores.save(tmp_path / "scores.npz")
        again = Scores.load(tmp_path / "scores.npz")
        assert (again.learnt, again.skipped, again.seed, again.names) == (learnt, 3, 5, scores.names)
        assert again.families == scores.families
        assert np.isnan(again.score) if learnt == () else again.score == scores.score
    with pytest.raises(FileNotFoundError, match="No scores at"):
        Scores.load(tmp_path / "none.npz")
