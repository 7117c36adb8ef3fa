"""Features that say less about a protected attribute: what the example keeps."""

import json
import pathlib
import subprocess
import sys

import numpy as np

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "fair_diabetes.py"


def _run(*options):
    return subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *options],
        capture_output=True,
        text=True,
    )


def test_the_reversal_takes_the_attribute_out_and_leaves_the_prediction(tmp_path):
    result = _run("--seeds", "6", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    assert (folder / "fair_diabetes.png").stat().st_size > 10_000
    results = json.loads((folder / "results.json").read_text())
    values = np.array(results["values"])
    assert values.shape == (5, 6, 3)
    r2, distance, _ = values[results["scales"].index(1.0)].mean(axis=0)
    plain_r2, plain_distance, _ = values[0].mean(axis=0)
    assert r2 > 0.3 and abs(r2 - plain_r2) < 0.05
    assert plain_distance > 0.3 and distance < plain_distance - 0.1


def test_a_wrong_value_is_refused(tmp_path):
    result = _run("--seeds", "1", "--output", tmp_path)
    assert result.returncode == 2
    assert "--seeds must be between 2 and 1000, got 1" in result.stderr
    assert not any(tmp_path.iterdir())
