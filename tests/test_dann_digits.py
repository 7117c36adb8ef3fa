"""The main example: what it keeps, what it refuses, and what an interruption leaves."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "dann_digits.py"


def _run(*options):
    return subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *options],
        capture_output=True,
        text=True,
    )


def test_a_short_run_keeps_a_table_a_picture_and_numbers(tmp_path):
    result = _run("--steps", "400", "--seeds", "2", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("source only", "DANN", "trained on target", "compile", "Kept in"):
        assert text in result.stdout
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        "dann_digits.png",
        "results.json",
    ]
    results = json.loads((folder / "results.json").read_text())
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


@pytest.mark.parametrize(
    "options, message",
    [
        (("--steps", "150"), "--steps must be a positive multiple of 100, got 150"),
        (("--seeds", "0"), "--seeds must be between 1 and 100, got 0"),
        (("--angle", "nan"), "--angle must be between -180 and 180, got nan"),
        (("--scale", "-1"), "--scale must be finite and 0 or more, got -1.0"),
        (("--learning-rate", "inf"), "--learning-rate must be finite and positive"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(tmp_path, options, message):
    result = _run(*options, "--output", tmp_path)
    assert result.returncode == 2 and message in result.stderr
    assert not any(tmp_path.iterdir())


def test_an_interruption_leaves_what_was_finished(tmp_path):
    command = [sys.executable, SCRIPT, "--seeds", "1", "--output", tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        kept = list(tmp_path.glob("*/results.json"))
        if kept and "source only" in json.loads(kept[0].read_text())["methods"]:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "marked incomplete" in errors
    results = json.loads(kept[0].read_text())
    assert results["complete"] is False
    assert "source only" in results["methods"]
    assert "trained on target" not in results["methods"]
