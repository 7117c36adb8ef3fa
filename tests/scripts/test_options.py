"""A wrong option is refused, by name and rule, before anything runs."""

import h5py
import numpy as np
import pytest
from run_script import refusal

DIGITS = "examples/dann_digits.py"
MOONS = "examples/dann_moons.py"
IMAGES = "examples/dann_usps_mnist.py"
FAIR = "examples/fair_diabetes.py"
CHOICE = "examples/choose_scale.py"
ADAPTATION = "benchmarks/adaptation.py"


@pytest.mark.parametrize(
    "script, options, message",
    [
        (DIGITS, "--steps 150", "--steps must be a positive multiple of 100, got 150"),
        (DIGITS, "--seeds 0", "--seeds must be between 1 and 1000, got 0"),
        (DIGITS, "--angle nan", "--angle must be between -180 and 180, got nan"),
        (
            DIGITS,
            "--scale -1",
            "--scale must be finite in float32 and 0 or more, got -1.0",
        ),
        (
            DIGITS,
            "--learning-rate inf",
            "--learning-rate must be finite in float32 and positive",
        ),
        (MOONS, "--steps 150", "--steps must be a positive multiple of 100, got 150"),
        (IMAGES, "--data none", "--data must be an existing file, got none"),
        (FAIR, "--seeds 1", "--seeds must be between 2 and 1000, got 1"),
        (
            CHOICE,
            "--scales 0 -1",
            "--scales must be finite in float32 and 0 or more, got [0.0, -",
        ),
        (CHOICE, "--seeds 1", "--seeds must be between 2 and 1000, got 1"),
        (CHOICE, "--angle nan", "--angle must be between -180 and 180, got nan"),
        (ADAPTATION, "--resume none", "--resume must be a file, got none"),
        (ADAPTATION, "--tasks cats", "--tasks must be part of a task's name, got 'cat"),
        (ADAPTATION, "--seeds 1", "--seeds must be 2 or more, got 1"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path, script, options, message):
    assert message in refusal(script, *options.split(), output=tmp_path / "kept")


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
def test_a_wrong_file_is_refused(tmp_path, arrays, message):
    path = tmp_path / "wrong.mat"
    if arrays is None:
        path.write_text("no HDF5")
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    said = refusal(IMAGES, "--data", path, output=tmp_path / "kept")
    assert message in said and "wrong.mat" in said
