"""Features that say less about a protected attribute: what the example keeps."""

import numpy as np
import pytest
from run_script import finished

pytestmark = pytest.mark.slow
SCRIPT = "examples/fair_diabetes.py"


def test_the_reversal_takes_the_attribute_out_and_leaves_the_prediction(tmp_path):
    _, folder, results = finished(SCRIPT, "--seeds", "6", output=tmp_path)
    assert (folder / "fair_diabetes.png").stat().st_size > 10_000
    values = np.array(results["values"])
    assert values.shape == (5, 6, 3)
    r2, distance, _ = values[results["scales"].index(1.0)].mean(axis=0)
    plain_r2, plain_distance, _ = values[0].mean(axis=0)
    assert r2 > 0.3 and abs(r2 - plain_r2) < 0.05
    assert plain_distance > 0.3 and distance < plain_distance - 0.1
