"""The benchmark of adaptation: what it keeps, and that it runs no cell twice."""

import json

import pytest
from run_script import run

pytestmark = pytest.mark.slow
SCRIPT = "benchmarks/adaptation.py"
FEW = ("--tasks", "breast cancer, mean -> worst cells", "--seeds", "2")


def test_finished_cells_are_kept_and_not_run_twice(tmp_path):
    result = run(SCRIPT, *FEW, "--output", tmp_path)
    assert "Kept in" in result.stdout, result.stderr
    (path,) = tmp_path.iterdir()
    whole = json.loads(path.read_text())
    methods = [(row["method"], row["scale"], row["seed"]) for row in whole["rows"]]
    assert len(set(methods)) == len(methods) == 6 * 2 + 3 * 2
    assert all(0 < row["target accuracy"] < 1 for row in whole["rows"])
    names = [row["method"].partition(" (")[0] for row in whole["summary"]]
    assert names == [
        "source only",
        "DANN",
        "DANN, chosen",
        "CDAN",
        "CDAN+E",
        "trained on target",
    ]

    # Interrupted after the first cell, in which a mark shows that it is not run again.
    cut = dict(whole, complete=False, rows=whole["rows"][:12])
    cut["rows"][0] = cut["rows"][0] | {"target accuracy": 0.123}
    path.write_text(json.dumps(cut))
    resumed = run(SCRIPT, *FEW, "--output", tmp_path / "unused", "--resume", path)
    assert "Kept in" in resumed.stdout, resumed.stderr
    again = json.loads(path.read_text())
    assert again["complete"] and not (tmp_path / "unused").exists()
    assert again["rows"][0]["target accuracy"] == 0.123
    accuracies = [[r["target accuracy"] for r in d["rows"][1:]] for d in (again, whole)]
    assert accuracies[0] == accuracies[1]  # the rest comes out the same

    other = tmp_path / "other.json"
    other.write_text(json.dumps(again | {"settings": {"seeds": 3}}))
    refused = run(SCRIPT, *FEW, "--resume", other)
    assert refused.returncode == 1
    assert "--resume must be a file with the same settings" in refused.stderr
    other.write_text('{"rows": []}')
    refused = run(SCRIPT, *FEW, "--resume", other)
    assert "--resume must be a file of results" in refused.stderr
