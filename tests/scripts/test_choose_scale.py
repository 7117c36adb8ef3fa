"""The choice of the scale: its rule, and runs that diverge."""

import json
import math
from unittest import mock

import numpy as np
import pytest
from run_script import finished, load

pytestmark = pytest.mark.slow
SCRIPT = "examples/choose_scale.py"


@pytest.fixture(scope="module")
def example():
    return load(SCRIPT)


def test_of_scales_not_clearly_worse_the_nearest_to_one_is_chosen(example):
    scales = [0.0, 0.1, 1.0, 3.0]
    best = [5.0, 7.0, 9.0]
    close = [5.0, 7.0, 8.0]  # loses 1/3 ± 1/3
    worse = [4.0, 6.0, 8.0]  # loses 1 with every seed
    assert example.nearest_to_one(scales, [worse, best, close, close]) == 2
    assert example.nearest_to_one(scales, [close, best, worse, close]) == 3
    assert example.nearest_to_one(scales, [close, best, worse, worse]) == 1
    assert example.nearest_to_one([0.5, 2.0], [best, best]) == 0
    assert example.nearest_to_one([0.5, 2.0], [close, best]) == 1


def test_one_run_that_diverged_takes_its_scale_out(example):
    scales = [0.3, 1.0, 3.0]
    scores = np.array([[1.0, 1.0], [9.0, np.nan], [2.0, 2.0]])
    assert example.nearest_to_one(scales, scores) == 2
    with pytest.raises(ValueError, match="every scale diverged"):
        example.nearest_to_one(scales, np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="2 or more seeds, got 1"):
        example.nearest_to_one(scales, np.ones((3, 1)))


def test_a_short_run_shows_the_grid_its_choice_and_what_diverged(tmp_path, example):
    options = ("--scales", "0", "1", "1e30", "--seeds", "2", "--steps", "400")
    printed, folder, results = finished(SCRIPT, *options, output=tmp_path)
    (chosen,) = [r for r in printed.splitlines() if r.endswith("<- chosen")]
    (broken,) = [r for r in printed.splitlines() if "diverged: 2 of 2" in r]
    assert broken.split()[0] == "1e+30" and chosen.split()[0] in ("0", "1")
    assert (folder / "choose_scale.png").stat().st_size > 10_000
    grid = {name: np.array(values) for name, values in results["grid"].items()}
    assert {values.shape for values in grid.values()} == {(3, 2)}
    assert np.isnan([values[2] for values in grid.values()]).all()
    assert (grid["InfoMax"][:2] < math.log(10)).all()
    assert (grid["target accuracy"][:2] > 0.15).all()  # chance is 0.1
    index = example.nearest_to_one(results["arguments"]["scales"], grid["InfoMax"])
    assert results["chosen"] == results["arguments"]["scales"][index]


def test_if_every_scale_diverges_nothing_is_chosen(tmp_path, example):
    options = ("--scales", "1e30", "--seeds", "2", "--steps", "400")
    arguments = [SCRIPT, *options, "--output", str(tmp_path)]
    said = "every scale diverged; lower the learning rate"
    with mock.patch("sys.argv", arguments), pytest.raises(SystemExit, match=said):
        example.main()
    (path,) = tmp_path.glob("*/results.json")
    results = json.loads(path.read_text())
    assert not results["complete"] and "chosen" not in results
    assert np.isnan(results["grid"]["target accuracy"]).all()
