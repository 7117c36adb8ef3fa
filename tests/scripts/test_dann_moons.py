"""The example of the two moons: what it keeps."""

import json

import numpy as np
from run_script import run

SCRIPT = "examples/dann_moons.py"


def test_a_short_run_keeps_a_table_a_picture_a_film_and_numbers(tmp_path):
    result = run(SCRIPT, "--steps", "1500", "--seeds", "4", "--output", tmp_path)
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
