"""The main example: what it keeps, and what an interruption leaves."""

import json
import signal

import numpy as np
import pytest
from run_script import finished, interrupted

pytestmark = pytest.mark.slow
SCRIPT = "examples/dann_digits.py"


def test_a_short_run_keeps_a_table_a_picture_and_numbers(tmp_path):
    options = ("--steps", "400", "--seeds", "2")
    printed, folder, results = finished(SCRIPT, *options, output=tmp_path)
    for text in ("source only", "DANN", "trained on target", "compile", "Saved in"):
        assert text in printed
    assert sorted(p.name for p in folder.iterdir()) == [
        "dann_digits.png",
        "results.json",
    ]
    assert results["complete"] and results["arguments"]["seeds"] == 2
    methods = results["methods"]
    shape = (4, 2)  # evaluations, seeds
    assert {np.shape(c) for m in methods.values() for c in m.values()} == {shape}
    final = {m: np.array(c["target_accuracy"][-1]) for m, c in methods.items()}
    assert (final["trained on target"] > final["source only"] + 0.2).all()
    # At scale 0 the discriminator wins; the reversal takes its accuracy away.
    domain = {m: np.array(c["domain_accuracy"][-1]) for m, c in methods.items()}
    assert (domain["source only"] > 0.95).all()
    assert (domain["DANN"] < domain["source only"]).all()


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_what_was_finished(tmp_path, by):
    options = ("--seeds", "1", "--steps", "200", "--output", tmp_path)
    last = {signal.SIGINT: "source only", signal.SIGKILL: "DANN"}[by]
    process = interrupted(SCRIPT, *options, text=f'"{last}": {{', by=by)
    if by == signal.SIGINT:
        assert process.returncode == 1 and "marked incomplete" in process.stderr
    else:
        assert process.returncode == -signal.SIGKILL
    (path,) = tmp_path.glob("*/results.json")
    results = json.loads(path.read_text())
    assert results["complete"] is False
    assert list(results["methods"]) == ["source only"]
