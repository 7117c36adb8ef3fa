"""The benchmarks in a short form: that each runs, and what it saves and draws."""

import json
import re
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from run_script import ROOT, interrupted, load, run

COMMANDS = ("adaptation", "correctness", "curves", "overhead", "plot", "timing")
COMMANDS += ("scale", "training")
results = load("benchmarks/parts/results.py")


def _short(name, *options, output):
    """Returns what a benchmark printed, and what it saved."""
    finished = run(f"benchmarks/{name}.py", *options, "--output", output)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = output.glob("*.json")
    saved = results.read(path)
    assert saved["complete"] and f"Saved in {path}" in finished.stdout
    assert saved["command"].startswith(f"python benchmarks/{name}.py")
    assert results.whole(output, name) == []  # a quick run is none
    return finished.stdout, saved["rows"]


def test_a_file_beside_the_parts_is_a_command():
    folder = ROOT / "benchmarks"
    assert sorted(path.stem for path in folder.glob("*.py")) == sorted(COMMANDS)
    main = 'if __name__ == "__main__":'
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert (main in text) == (path.parent == folder), path
        assert "sys.path" not in text, path


@pytest.mark.slow
def test_timing_measures_every_section(tmp_path):
    printed, rows = _short("timing", "--quick", output=tmp_path)
    sections = {row["section"] for row in rows}
    assert sections == {"steps", "calls", "growth", "devices", "import"}
    assert "No claim was judged." in printed
    ratios = [row["ratio"] for row in rows if row["section"] in ("steps", "devices")]
    assert len(ratios) == 6 and all(0.1 < ratio < 10 for ratio in ratios)


@pytest.mark.slow
def test_an_interruption_leaves_the_sections_that_were_finished(tmp_path):
    options = ("--quick", "--only", "import", "steps", "--output", tmp_path)
    process = interrupted("benchmarks/timing.py", *options, text='"import jaxgrl')
    assert process.returncode == 1
    assert "what was finished is saved, marked incomplete" in process.stderr
    (path,) = tmp_path.iterdir()
    saved = results.read(path)
    assert [row["section"] for row in saved["rows"]] == ["import"]
    assert saved["complete"] is False


@pytest.mark.slow
def test_training_runs_without_pytorch_and_with_it(tmp_path):
    options = ("--quick", "--only", "PyTorch eager", "JAX by hand")
    printed, rows = _short("training", *options, output=tmp_path)
    trained = {row["trainer"]: row for row in rows if row["what"] == "training"}
    assert list(trained) == ["jaxgrl + NNX", "JAX by hand", "PyTorch eager"]
    torch = trained.pop("PyTorch eager")
    assert torch["settings"].startswith("not installed: torch") or torch["ratio"] > 0
    # By hand it is the same training, to rounding.
    assert trained["JAX by hand"]["apart"] < 0.1
    for row in trained.values():
        assert len(row["seconds"]) == 2 and row["steps/s"] > 0
        # The products alone take less time than the step that holds them, as a rule;
        # on a busy machine they may be disturbed and the step not.
        assert 0 < row["share"] < 10
    (swept,) = [row for row in rows if row["what"] == "sweep"]
    assert swept["trainer"] == "one program, lax.map on each device"
    assert "No claim was judged." in printed


def test_the_products_of_a_step_are_all_that_a_training_step_multiplies():
    trainers = load("benchmarks/parts/trainers.py")
    task = trainers.Task(hidden=100, steps=100, device="cpu")
    features, kernels = trainers.operands(task)
    counted = []

    class Counted:
        """A matrix that notes the flops of each product."""

        def __init__(self, shape):
            self.shape, self.T = shape, self
            self.T = None

        def __matmul__(self, other):
            counted.append(2 * self.shape[0] * self.shape[1] * other.shape[1])
            assert self.shape[1] == other.shape[0]
            return matrix((self.shape[0], other.shape[1]))

        def __getitem__(self, index):
            rows, columns = index if isinstance(index, tuple) else (index, slice(None))
            sizes = zip(self.shape, (rows, columns), strict=True)
            return matrix(tuple(len(range(n)[part]) for n, part in sizes))

        def __len__(self):
            return self.shape[0]

    def matrix(shape):
        one, other = Counted(shape), Counted(shape[::-1])
        one.T, other.T = other, one
        return one

    again, grads = trainers.products(
        matrix(features.shape), {name: matrix(k.shape) for name, k in kernels.items()}
    )
    assert again.shape == features.shape
    shapes = [grad.shape for grad in grads]
    assert all(kernel.shape in shapes for kernel in kernels.values())
    rows, batch = 2 * trainers.BATCH, trainers.BATCH
    forward = {
        name: 2 * (batch if name == "classifier" else rows) * inputs * outputs
        for name, (inputs, outputs) in task.layers().items()
    }
    # Forward and two gradients backward, but nobody needs that of the data.
    assert sum(counted) == 3 * sum(forward.values()) - forward["features"]


def test_more_than_the_gradient_is_found_among_what_chips_send():
    scale = load("benchmarks/scale.py")
    assert scale.byte_count("(f32[3,2]{1,0}, bf16[5], f32[], u8[2])") == 24 + 10 + 4 + 2
    row = {"topology": "t", "parameter bytes": 400}
    good = row | {"collectives": "all-reduce", "all-reduce bytes": 416}
    assert scale.judge(good) == []
    moved = good | {"collectives": "all-reduce, all-to-all"}
    assert scale.judge(moved) == ["t: collectives are all-reduce, all-to-all"]
    assert scale.judge(good | {"all-reduce bytes": 800}) == [
        "t: 400 bytes more than the parameters"
    ]


@pytest.mark.slow
def test_curves_saves_and_draws_what_it_prints(tmp_path, capsys):
    curves = load("benchmarks/curves.py")
    options = ("--seeds", "2", "--steps", "100")
    arguments = [*options, "--pictures", str(tmp_path), "--output", str(tmp_path)]
    few = {key: (label, values[-3:]) for key, (label, values) in curves.CHOICES.items()}
    few["scale"] = ("scale", (0.3, 1))
    few["gamma"], few["rate"] = ("gamma", (10, np.inf)), ("rate", (0.01, 0.1))
    with (
        mock.patch("sys.argv", ["benchmarks/curves.py", *arguments]),
        mock.patch.object(curves, "CHOICES", few),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        assert curves.main() == 0
    for name in ("runs.png", "choices.png"):
        drawn = (tmp_path / name).read_bytes()
        assert drawn.startswith(b"\x89PNG") and 20_000 < len(drawn) < 300_000
    (path,) = tmp_path.glob("*.json")
    (default,) = [r for r in results.read(path)["rows"] if r["setting"] == ""]
    mean = sum(default["target accuracy"]) / 2
    assert re.search(rf"target accuracy +{mean:.3f} ±", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "benchmarks" / "results").is_dir(),
    reason="the saved results are not part of the sdist",
)
def test_plot_draws_the_saved_results_and_only_whole_ones(tmp_path):
    saved = ROOT / "benchmarks" / "results"
    for path in saved.glob("*.json"):
        shutil.copy(path, tmp_path)
    finished = run("benchmarks/plot.py", "--results", tmp_path)
    assert finished.returncode == 0, finished.stderr
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in saved.glob("*.png")}
    for path in tmp_path.glob("*.json"):
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | {"complete": False}))
    refused = run("benchmarks/plot.py", "--results", tmp_path)
    assert refused.returncode == 2
    assert "--results must be a folder with whole results, got" in refused.stderr
