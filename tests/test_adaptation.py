"""The benchmark of adaptation: what it keeps, and that it runs no cell twice."""

import json
import pathlib
import shutil
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks" / "adaptation.py"
TASK = "breast cancer, mean -> worst cells"


def _run(*options):
    return subprocess.run(
        [sys.executable, SCRIPT, "--tasks", TASK, "--seeds", "2", *options],
        capture_output=True,
        text=True,
    )


def test_finished_cells_are_kept_and_not_run_twice(tmp_path):
    result = _run("--output", tmp_path)
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
    resumed = _run("--output", tmp_path / "unused", "--resume", path)
    assert "Kept in" in resumed.stdout, resumed.stderr
    again = json.loads(path.read_text())
    assert again["complete"] and not (tmp_path / "unused").exists()
    assert again["rows"][0]["target accuracy"] == 0.123
    accuracies = [[r["target accuracy"] for r in d["rows"][1:]] for d in (again, whole)]
    assert accuracies[0] == accuracies[1]  # the rest comes out the same

    other = tmp_path / "other.json"
    shutil.copy(path, other)
    other.write_text(other.read_text().replace('"seeds": 2', '"seeds": 3'))
    refused = _run("--resume", other)
    assert refused.returncode == 1
    assert "--resume must be a file with the same settings" in refused.stderr


def test_wrong_options_are_refused(tmp_path):
    refused = _run("--resume", tmp_path / "absent.json")
    assert "--resume must be a file, got" in refused.stderr
    refused = _run("--tasks", "cats")
    assert "--tasks must be part of a task's name, got 'cats'" in refused.stderr
    broken = tmp_path / "broken.json"
    broken.write_text('{"rows": []}')
    assert "--resume must be a file of results" in _run("--resume", broken).stderr
