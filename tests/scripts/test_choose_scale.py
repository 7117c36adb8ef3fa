"""The choice of the scale: its criteria by hand, and runs that diverge."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from run_script import finished, load

SCRIPT = "examples/choose_scale.py"


@pytest.fixture(scope="module")
def example():
    return load(SCRIPT)


def test_centroid_agreement_by_hand(example):
    source = jnp.array([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    labels = jnp.array([0, 0, 1, 1])  # centroids (0, 1) and (4, 1)
    target = jnp.array([[1.0, 9.0], [3.0, -9.0], [1.9, 1.0], [2.1, 1.0]])
    logits = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert example.centroid_agreement(source, labels, target, logits) == 0.75
    broken = logits.at[0, 0].set(jnp.nan)
    assert jnp.isnan(example.centroid_agreement(source, labels, target, broken))


def test_reverse_validation_by_hand(example):
    target_logits = jnp.array([[2.0, 1.0], [0.0, 1.0]])
    given = []

    def fit(labels):
        given.append(labels.tolist())
        return lambda x: jnp.stack([-x, x], axis=1)  # class 1 where x > 0

    inputs, labels = jnp.array([1.0, -1.0, 2.0, 3.0]), jnp.array([1, 0, 1, 0])
    assert example.reverse_validation(fit, target_logits, inputs, labels) == 0.75
    assert given == [[0, 1]]  # what the first network says, as labels
    inputs = inputs.at[0].set(jnp.inf)
    assert jnp.isnan(example.reverse_validation(fit, target_logits, inputs, labels))


def test_one_run_that_diverged_takes_its_scale_out(example):
    grid = {"InfoMax": np.array([[1.0, 1.0], [9.0, np.nan], [2.0, 2.0]])}
    assert example.choose(grid, "InfoMax") == 2
    with pytest.raises(SystemExit, match="Every scale diverged"):
        example.choose({"InfoMax": np.full((3, 2), np.nan)}, "InfoMax")


@pytest.mark.slow
def test_a_short_run_shows_the_grid_its_choice_and_what_diverged(tmp_path, example):
    options = ("--scales", "0", "1", "1e30", "--seeds", "2", "--steps", "400")
    printed, folder, results = finished(SCRIPT, *options, output=tmp_path)
    (chosen,) = [r for r in printed.splitlines() if r.endswith("<- chosen")]
    (broken,) = [r for r in printed.splitlines() if "diverged: 2 of 2" in r]
    assert broken.split()[0] == "1e+30" and chosen.split()[0] in ("0", "1")
    assert "one vmapped program" in printed
    assert (folder / "choose_scale.png").stat().st_size > 10_000
    grid = {name: np.array(values) for name, values in results["grid"].items()}
    assert {values.shape for values in grid.values()} == {(3, 2)}
    assert np.isnan([values[2] for values in grid.values()]).all()
    assert (grid["InfoMax"][:2] < math.log(10)).all()
    assert (grid["reverse validation"][:2] > 0.15).all()  # chance is 0.1
    assert (
        results["chosen"]["InfoMax"]
        == results["scales"][example.choose(grid, "InfoMax")]
    )
