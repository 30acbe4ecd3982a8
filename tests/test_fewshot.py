"""Few-shot least squares equals the published evaluator."""

import numpy as np
import pytest

from vit_jax.evaluation.protocols.fewshot import draw_shots, least_squares


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shots", [1, 5, 10, 25])
@pytest.mark.parametrize("l2", [1, 1024])
def test_reference(golden, seed, shots, l2):
    _, io = golden("fewshot_least_squares")
    index = draw_shots(io["labels_train"], shots, seed)
    predicted = least_squares(
        io["features_train"][index], io["labels_train"][index], io["features_test"], l2
    )
    correct = np.sum(predicted == io["labels_test"])
    assert correct == round(float(io[f"acc_seed{seed}_shots{shots}_l2_{l2}"]) * 600)


def test_both_sides_of_the_solution_agree():
    """Compares fewer examples than features with enough copies of them to be more."""
    rng = np.random.default_rng(0)
    x, y, test = rng.normal(size=(20, 30)), np.arange(20) % 4, rng.normal(size=(50, 30))
    x, test = x.astype(np.float32), test.astype(np.float32)
    few = least_squares(x, y, test, l2=10.0)
    many = least_squares(np.tile(x, (3, 1)), np.tile(y, 3), test, l2=30.0)
    np.testing.assert_array_equal(few, many)


def test_shots_are_balanced_distinct_and_seeded():
    labels = np.repeat([3, 5, 9], [30, 40, 50])
    index = draw_shots(labels, 10, seed=1)
    assert len(set(index)) == 30
    np.testing.assert_array_equal(
        np.unique(labels[index], return_counts=True), [[3, 5, 9], [10] * 3]
    )
    assert set(index) != set(draw_shots(labels, 10, seed=2))
    np.testing.assert_array_equal(index, draw_shots(labels, 10, seed=1))


def test_too_few_examples():
    with pytest.raises(ValueError, match="class 1 has 3 examples, fewer than 4 shots"):
        draw_shots(np.array([0] * 9 + [1] * 3), 4, seed=0)
