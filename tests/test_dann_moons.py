"""The example of the two moons: what it keeps, and what it refuses."""

import json
import pathlib
import subprocess
import sys

import numpy as np

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "dann_moons.py"


def _run(*options):
    return subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *options],
        capture_output=True,
        text=True,
    )


def test_a_short_run_keeps_a_table_a_picture_a_film_and_numbers(tmp_path):
    result = _run("--steps", "1500", "--seeds", "4", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("source only", "DANN", "trained on target", "worst seed", "Kept in"):
        assert text in result.stdout
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        "dann_moons.gif",
        "dann_moons.png",
        "results.json",
    ]
    assert (folder / "dann_moons.gif").read_bytes().startswith(b"GIF89a")
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and results["arguments"]["seeds"] == 4
    methods = results["methods"]
    shape = (15, 4)  # evaluations, seeds
    assert {np.shape(c) for m in methods.values() for c in m.values()} == {shape}
    final = {m: np.array(c["target_accuracy"][-1]) for m, c in methods.items()}
    assert (final["trained on target"] > final["source only"] + 0.1).all()
    assert final["DANN"].mean() > final["source only"].mean() + 0.05
    # At scale 0 the discriminator wins; the reversal takes its accuracy away.
    domain = {m: np.array(c["domain_accuracy"][-1]) for m, c in methods.items()}
    assert (domain["DANN"] < domain["source only"] - 0.05).all()
    # The seed that is drawn is in the middle: one is below it, two are above.
    assert final["DANN"][results["drawn_seed"]] == np.sort(final["DANN"])[1]


def test_a_wrong_value_is_refused_before_anything_runs(tmp_path):
    result = _run("--steps", "150", "--output", tmp_path)
    assert result.returncode == 2
    assert "--steps must be a positive multiple of 100, got 150" in result.stderr
    assert not any(tmp_path.iterdir())
