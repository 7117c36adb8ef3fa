"""The example of the two moons: what it keeps."""

import numpy as np
import pytest
from run_script import finished

pytestmark = pytest.mark.slow
SCRIPT = "examples/dann_moons.py"


def test_a_short_run_keeps_a_table_a_picture_a_film_and_numbers(tmp_path):
    options = ("--steps", "1500", "--seeds", "4")
    printed, folder, results = finished(SCRIPT, *options, output=tmp_path)
    for text in ("source only", "DANN", "trained on target", "worst seed", "Saved in"):
        assert text in printed
    assert sorted(p.name for p in folder.iterdir()) == [
        "dann_moons.gif",
        "dann_moons.png",
        "results.json",
    ]
    assert (folder / "dann_moons.gif").read_bytes().startswith(b"GIF89a")
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
