"""The example of USPS and MNIST: what it keeps, and which files it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import h5py
import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "dann_usps_mnist.py"
DATA = os.environ.get("JAXGRL_DATA")


def _run(*options):
    # Without the eight devices of conftest.py: the script needs one.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *options],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.skipif(
    DATA is None, reason="JAXGRL_DATA is not set: the folder of MNIST_vs_USPS.mat"
)
def test_a_short_run_keeps_a_table_a_picture_and_numbers(tmp_path):
    data = pathlib.Path(str(DATA), "MNIST_vs_USPS.mat")
    options = ("--steps", "200", "--seeds", "1", "--output", tmp_path)
    result = _run("--data", data, *options)
    assert result.returncode == 0, result.stderr
    for text in ("USPS -> MNIST", "transductive", "source only", "DANN", "Kept in"):
        assert text in result.stdout
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        "dann_usps_mnist.png",
        "results.json",
    ]
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and results["arguments"]["seeds"] == 1
    methods = results["methods"]
    assert list(methods) == ["source only", "DANN", "CDAN"]
    for curves in methods.values():
        (accuracy,) = curves["target_accuracy"][-1]
        assert accuracy > 0.5  # chance is 0.1; DATA's first run had 0.58 and more
        # Every target image is scored, and the diagonal holds the right ones.
        (confusion,) = np.array(curves["confusion"])
        assert confusion.sum() == 2000
        np.testing.assert_allclose(np.trace(confusion) / 2000, accuracy, rtol=1e-6)
    # At scale 0 the discriminator wins; the reversal takes its accuracy away.
    domain = {m: c["domain_accuracy"][-1][0] for m, c in methods.items()}
    assert domain["DANN"] < domain["source only"] - 0.05
    assert domain["CDAN"] < domain["source only"] - 0.05


def test_a_missing_file_is_refused_by_name(tmp_path):
    result = _run("--data", tmp_path / "none.mat", "--output", tmp_path)
    assert result.returncode == 2
    message = f"--data must be an existing file, got {tmp_path / 'none.mat'}"
    assert message in result.stderr
    assert not any(tmp_path.iterdir())


WRONG = {
    "no HDF5": (None, "--data must be an HDF5 file (MATLAB v7.3)"),
    "keys": (
        {"images": np.zeros((3, 256))},
        "--data must hold arrays Xs, Ys, Xt and Yt, got images",
    ),
    "shapes": (
        {x: np.ones((10, 256)) for x in ("Xs", "Xt")}
        | {y: np.arange(1, 11) for y in ("Ys", "Yt")},
        "--data must hold Xt of shape [n, 256] and Yt of shape [1, n]",
    ),
    "labels": (
        {x: np.ones((10, 256)) for x in ("Xs", "Xt")}
        | {y: np.arange(10)[None] for y in ("Ys", "Yt")},
        "--data must hold finite pixels in Xt and labels 1 to 10 in Yt",
    ),
}


@pytest.mark.parametrize("arrays, message", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_by_name(tmp_path, arrays, message):
    path = tmp_path / "wrong.mat"
    if arrays is None:
        path.write_text("no HDF5")
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    result = _run("--data", path, "--output", tmp_path / "runs")
    assert result.returncode == 2
    assert message in result.stderr and "wrong.mat" in result.stderr
    assert not (tmp_path / "runs").exists()
