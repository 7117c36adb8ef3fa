"""DANN at scale: the devices do not matter, and nothing wrong is read or written."""

import argparse
import concurrent.futures
import contextlib
import errno
import fcntl
import io
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import domains_apart
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from PIL import Image
from run_script import LIMIT, SERVER, load, refusal

pytestmark = pytest.mark.slow
SCRIPT = "examples/dann_at_scale.py"
example = load(SCRIPT)
scale = sys.modules[example.Folder.__module__]
domains_module = sys.modules[example.read_domains.__module__]
benchmark = load("benchmarks/scale.py")


def training(count, **options):
    """Returns what the example trains with, on so many devices, and its options."""
    args = argparse.Namespace(**scale.DEFAULTS | {"batch_size": 16} | options)
    devices = jax.devices()[:count]
    return example.make_training(args, (32, 32, 1), 10, devices), args


def losses(count, steps, wide=False, apart=False):
    """Returns [steps, 3]: the three losses of every step on so many devices."""
    loss_fn = domains_apart.loss_fn if apart else example.loss_fn
    make_input = domains_apart.Apart if apart else example.make_input
    rules = jax.numpy_dtype_promotion("standard" if wide else "strict")
    with mock.patch.object(example, "loss_fn", loss_fn), jax.enable_x64(wide), rules:
        options = {"dtype": "float64"} if wide else {}
        (_, init, step, by_row), _ = training(count, steps=steps, **options)
        batches = make_input(example.read_domains(None, pytest.fail), 16, 0, 0, 1)
        state, found = init(), []
        if wide:
            state = jax.tree.map(
                lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, state
            )
        for _ in range(steps):
            batch = jax.device_put(next(batches), by_row)
            state, metrics = step(state, batch)
            found.append([metrics[k] for k in ("loss", "label_loss", "domain_loss")])
        return np.array(found)


# Devices add their parts of a gradient in another order than one device adds its rows.
# A step then differs in the last place, by 1e-7 of a loss near 3, and training may
# multiply a difference by 1e4 in 100 steps. In float64 that leaves 1e-12. A wrong mean
# over devices is as wrong there as in float32.
@pytest.mark.parametrize("apart", [False, True], ids=["pairs", "domains apart"])
def test_the_global_batch_determines_the_losses(apart):
    if not apart:  # if apart, two processes and one device train for 100 steps
        one, eight = (losses(count, 100) for count in (1, 8))
        assert one[-10:, 0].mean() < one[:10, 0].mean()  # it trains
        np.testing.assert_allclose(one[:20], eight[:20], rtol=0, atol=1e-5)
        np.testing.assert_allclose(one, eight, rtol=0, atol=1e-2)
    one, eight = (losses(count, 30, wide=True, apart=apart) for count in (1, 8))
    np.testing.assert_allclose(one, eight, rtol=0, atol=1e-11)


def collectives(count, **options):
    """Returns the collectives of the compiled step, with what they move."""
    devices = jax.devices()[:count]
    compiled, abstract = benchmark.compile_step(example, devices, 16, **options)
    return benchmark.collectives(compiled.as_text()), abstract


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_only_collective_is_the_all_reduce_of_the_gradient(count, remat):
    found, abstract = collectives(count, remat=remat)
    if count == 1:
        assert found == []
        return
    ((moved, kind),) = found
    assert kind == "all-reduce"
    params = [p for p in jax.tree.leaves(abstract[0]) if p.dtype == np.float32]
    sizes = [
        np.prod([int(n) for n in dims.split(",") if n])
        for dims in re.findall(r"f32\[([\d,]*)\]", moved)
    ]
    # A gradient, and scalars: the parts of the metrics.
    assert sum(s for s in sizes if s > 1) + 1 == sum(p.size for p in params)
    assert sum(s == 1 for s in sizes) <= 1 + 4


class Identity(nnx.Module):
    """In place of the layer."""

    def __call__(self, x, scale):
        return x


@pytest.mark.parametrize("count", [2, 8])
def test_the_layer_adds_no_collective(count):
    with_layer, _ = collectives(count)
    make_model = example.make_model

    def without(*arguments):
        model = make_model(*arguments)
        model.gradient_reversal = Identity()
        return model

    with mock.patch.object(example, "make_model", without):
        assert collectives(count)[0] == with_layer


def test_one_domain_behind_the_other_costs_more(monkeypatch):
    def loss_fn(model, batch, scale):
        source, target = batch["images"][:, 0], batch["images"][:, 1]
        images = jax.numpy.concatenate([source, target]).astype(np.float32)
        n = len(source)
        label_logits, domain_logits = model(images, scale)
        domains = np.repeat(np.array([0, 1]), n)
        loss = label_logits[:n].mean() + example.jaxgrl.domain_loss(
            domain_logits, domains
        )
        return loss, {"loss": loss}

    monkeypatch.setattr(example, "loss_fn", loss_fn)
    kinds = {kind for _, kind in collectives(8)[0]}
    assert kinds > {"all-reduce"}


def test_processes_read_their_rows_of_the_same_global_batches():
    digits = example.read_domains(None, pytest.fail)
    whole = example.make_input(digits, 16, 3, 0, 1)
    parts = [example.make_input(digits, 16, 3, p, 4) for p in range(4)]
    for _ in range(130):  # both domains start anew, after steps 62 and 49
        batch = next(whole)
        own = [next(part) for part in parts]
        for name, rows in batch.items():
            together = np.concatenate([part[name] for part in own])
            np.testing.assert_array_equal(together, rows)
    assert whole.get_state() == parts[3].get_state()


def restored(folder, abstract, expected):
    """Returns what restoring the newest checkpoint of a folder comes to."""
    batches = SimpleNamespace(set_state=lambda state: None)
    run = SimpleNamespace(checkpoints=folder, compare=lambda *_: None)
    try:
        with ocp.CheckpointManager(folder) as manager:
            assert manager.latest_step() == 5
            state = example.restore(manager, 5, abstract, batches, run, pytest.fail)
    except SystemExit as refused:
        assert f"{folder / '5'} must be a whole checkpoint, got" in str(refused)
        assert "move it elsewhere to go on from the one before" in str(refused)
        return "refused"
    assert example.sha256(state) == expected
    return "right"


def damaged(tmp_path):
    """Returns what comes of each damage to each file, and the largest file."""
    (abstract, init, _, _), _ = training(1)
    state, good, bad = init(), tmp_path / "good", tmp_path / "bad"
    batches = SimpleNamespace(get_state=lambda: {"next_index": 5})
    with ocp.CheckpointManager(good) as manager:
        example.save(manager, 5, state, batches, {"seed": 0})
    expected = example.sha256(state)
    assert restored(good, abstract, expected) == "right"
    rng, outcomes = np.random.default_rng(0), {}
    files = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    for file in files:
        content = (good / file).read_bytes()
        for damage in ("flipped", "truncated", "gone"):
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            if damage == "gone":
                (bad / file).unlink()
            elif not content:
                continue
            elif damage == "truncated":
                (bad / file).write_bytes(content[: len(content) // 2])
            else:
                position = rng.integers(len(content))
                changed = bytes([content[position] ^ (1 << rng.integers(8))])
                rest = content[position + 1 :]
                (bad / file).write_bytes(content[:position] + changed + rest)
            outcomes[file, damage] = restored(bad, abstract, expected)
    return outcomes, max(files, key=lambda file: (good / file).stat().st_size)


def test_a_broken_checkpoint_is_refused_and_never_read_as_another(tmp_path):
    # In a process of its own: Orbax leaves reads behind that failed.
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=SERVER) as pool:
        outcomes, largest = pool.submit(damaged, tmp_path).result(LIMIT)
    assert len(outcomes) > 20
    assert {outcomes[largest, d] for d in ("flipped", "truncated", "gone")} == {
        "refused"
    }
    print(len(outcomes), "damages,", [*outcomes.values()].count("refused"), "refused")


def test_a_flipped_number_is_found_even_where_the_format_finds_nothing(tmp_path):
    (abstract, init, _, _), _ = training(1)
    batches = SimpleNamespace(get_state=lambda: {"next_index": 5})
    state = init()
    other = jax.tree.map(lambda a: a + 1 if a.dtype == np.float32 else a, state)
    digest = example.sha256(
        state,
        json.dumps({"configuration": {}, "input": {"next_index": 5}}, sort_keys=True),
    )
    with (
        mock.patch.object(example, "sha256", lambda *_: digest),
        ocp.CheckpointManager(tmp_path / "run") as manager,
    ):
        example.save(manager, 5, other, batches, {})
    assert restored(tmp_path / "run", abstract, None) == "refused"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 0", "--steps must be between 1 and 999999999, got 0"),
        ("--batch-size 12", "--batch-size must be a multiple of the 8 devices, got 12"),
        ("--checkpoint-every 0", "--checkpoint-every must be positive, got 0"),
        ("--scale nan", "--scale must be finite in float32 and 0 or more, got nan"),
        ("--scale 1e39", "--scale must be finite in float32 and 0 or more, got 1e+39"),
        ("--timeout 9999999", "--timeout must be between 1 and 999999, got 9999999"),
        ("--seed -1", "--seed must be between 0 and 2147483647, got -1"),
        ("--data none", "--data must be a folder or a file of arrays, got none"),
        ("--coordinator a:1", "--coordinator must be given together with --num-proc"),
        (
            "--coordinator a --num-processes 2 --process-id 0",
            "--coordinator must be HOST:PORT, got a",
        ),
        (
            "--coordinator a:1 --num-processes 2 --process-id 2",
            "--process-id must be between 0 and 1, got 2",
        ),
        ("--resume none", "--output must be absent or equal to --resume"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, options, message):
    assert message in refusal(SCRIPT, *options.split(), output=tmp_path / "kept")


def refused(*options):
    """Returns what the script says to options that it must refuse."""
    with (
        mock.patch.object(sys, "argv", [SCRIPT, *map(str, options)]),
        contextlib.redirect_stderr(io.StringIO()) as said,
        pytest.raises(SystemExit) as exit_,
    ):
        example.main()
    assert exit_.value.code == 2
    return said.getvalue()


def test_an_old_folder_is_not_written_and_no_other_configuration_resumed(tmp_path):
    assert "--output must be a new folder" in refused("--output", tmp_path)
    assert "--resume must be the folder of a run" in refused("--resume", tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    saved = scale.DEFAULTS | {"data": "digits", "steps": 7}
    (run / "configuration.json").write_text(json.dumps(saved))
    for option, got, had in (
        ("--steps", 8, 7),
        ("--seed", 1, 0),
        ("--scale", 0.5, 1.0),
        ("--dtype", "bfloat16", "float32"),
        ("--batch-size", 128, 64),
    ):
        said = refused("--resume", run, option, got)
        assert f"{option} must be {had} as in the run, got {got}" in said
    said = refused("--resume", run, "--remat")
    assert "--remat must be False as in the run, got True" in said
    path = tmp_path / "images.npz"
    write_arrays(path)
    said = refused("--resume", run, "--data", path)
    assert "--data must be digits as in the run, got arrays " in said
    assert sorted(p.name for p in run.iterdir()) == ["configuration.json"]
    (run / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    said = refused("--resume", run)
    assert "must be inside the folder, and no link out of it" in said
    (run / "metrics.jsonl").unlink()
    with (run / "configuration.json").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as a process that trains there
        said = refused("--resume", run)
    assert f"--resume must be the folder of a run that has ended, got {run}" in said
    (run / "configuration.json").write_text('{"seed": 0}')
    assert "--resume must be the folder of a run" in refused("--resume", run)


def test_one_command_starts_a_run_and_resumes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale.signal, "signal", lambda *_: None)
    run = tmp_path / "run"
    options = ["dann_at_scale.py", "--output", str(run), "--resume", str(run)]
    with mock.patch.object(sys, "argv", [*options, "--steps", "7"]):
        args, late = scale.read_options(""), scale.read_options("")
        assert args.resume is None and args.folder == run
        scale.Folder(args, "digits").__exit__(None, None)
        with pytest.raises(SystemExit):  # another job, started at the same time
            scale.Folder(late, "digits")
        assert f"--output must be a new folder, got {run}" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [run]
    with mock.patch.object(sys, "argv", options):
        args = scale.read_options("")
        assert args.resume == run and args.steps == 7
        # A file system without locks is no error.
        monkeypatch.setattr(
            scale.fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "none"))
        )
        scale.Folder(args, "digits").__exit__(None, None)
    assert f"{run} cannot be locked" in capsys.readouterr().err


def test_processes_that_differ_are_refused(monkeypatch):
    gathered = np.array([1, 2], np.uint32)
    folder = object.__new__(scale.Folder)
    folder.agree("seed", 3)
    monkeypatch.setattr(
        scale.multihost_utils, "process_allgather", lambda own: gathered
    )
    with pytest.raises(SystemExit, match="seed must be the same in every process, got"):
        folder.agree("seed", 3)


@pytest.mark.parametrize("line", ['{"step": 2}\n', "no json\n", "3\n", '{"step": 1}'])
def test_metrics_that_do_not_fit_the_checkpoint_are_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line)
    with pytest.raises(SystemExit, match="must hold steps 1 to 1, got"):
        scale.Metrics(SimpleNamespace(path=tmp_path), 1)
    assert path.read_text() == line


def test_no_two_epochs_domains_or_seeds_have_the_same_order():
    rows = np.arange(40)
    pair = SimpleNamespace(source=domains_module.Labelled(rows, rows), target=rows)
    orders = []
    for seed in range(3):
        batches = example.make_input(pair, len(rows), seed, 0, 1)
        for _ in range(3):
            orders += next(batches)["images"].T.tolist()
    assert len(set(map(tuple, orders))) == 18


def write_arrays(path, **changes):
    """Writes an archive of images, the rest as they must be."""
    arrays = {
        "source": np.zeros((6, 8, 8), np.uint8),
        "source_labels": np.arange(6) % 2,
        "target": np.zeros((5, 8, 8), np.uint8),
    }
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


WRONG = {
    "no target": ({"target": None}, "must hold source, source_labels, target, got"),
    "shapes": ({"target": np.zeros((5, 9, 8))}, "must hold source and target [n, "),
    "labels": ({"source_labels": np.arange(6) + 1}, "source_labels 0 to C - 1"),
    "one class": ({"source_labels": np.zeros(6)}, "source_labels 0 to C - 1"),
    "dates": (
        {"source_labels": (np.arange(6) % 2).astype("datetime64[ns]")},
        "source_labels 0 to C - 1",
    ),
    "beyond float32": (
        {"source": np.full((6, 8, 8), 1e39), "target": np.ones((5, 8, 8))},
        "bytes or finite floats in source",
    ),
    "nan": ({"source": np.full((6, 8, 8), np.nan)}, "bytes or finite floats in source"),
    "dtypes": ({"source": np.zeros((6, 8, 8))}, "source and target of one dtype"),
    "pickle": ({"target": np.array([{}] * 5)}, "a NumPy archive of plain arrays"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_arrays_are_refused(tmp_path, changes, message):
    path = tmp_path / "images.npz"
    write_arrays(path, **changes)
    assert message in refusal(SCRIPT, "--data", path, output=tmp_path / "kept")


def write_folder(path):
    """Writes images of two classes and a target, of different numbers."""
    for name, count in (("source/cat", 3), ("source/dog", 2), ("target", 4)):
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path / name / f"{i}.png")


def test_folders_of_images_are_read_as_they_are_and_wrong_ones_refused(tmp_path):
    data, kept = tmp_path / "data", tmp_path / "kept"
    write_folder(data)
    found = example.read_domains(data, pytest.fail)
    assert found.shape == (8, 8, 3) and found.classes == 2
    assert [label for _, label in (found.source[i] for i in range(5))] == [
        0,
        0,
        0,
        1,
        1,
    ]
    assert found.target[3][0, 0].tolist() == [3, 0, 0]
    other = example.read_domains(data, pytest.fail)
    assert other.fingerprint == found.fingerprint
    (data / "source" / "fox").symlink_to(data / "source" / "dog")
    linked = example.read_domains(data, pytest.fail)
    assert linked.classes == 3 and len(linked.source) == 7
    (data / "source" / "fox").unlink()
    (data / "target" / "up").symlink_to(data)
    assert len(example.read_domains(data, pytest.fail).target) == 4
    (data / "target" / "up").unlink()
    Image.new("L", (8, 8)).save(data / "source" / "cat" / "0.png")
    mixed = example.read_domains(data, pytest.fail)
    assert mixed.shape == (8, 8, 3) and mixed.target[[0]].shape == (1, 8, 8, 3)
    Image.new("I;16", (8, 8)).save(data / "target" / "4.png")
    said = refusal(SCRIPT, "--data", data, output=kept)
    assert "--data must hold images of bytes, got mode I;16 in" in said
    Image.new("RGB", (9, 8)).save(data / "target" / "4.png")
    said = refusal(SCRIPT, "--data", data, output=kept)
    assert "--data must hold images of one size, 8 x 8, got 9 x 8" in said
    assert "4.png" in said
    (data / "target" / "4.png").write_text("no image")
    assert "must hold images, got" in refusal(SCRIPT, "--data", data, output=kept)
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 10):
        Image.new("L", (8, 8)).save(data / "target" / "4.png")
        said = refusal(SCRIPT, "--data", data, output=kept)
        assert "must hold images, got" in said
    (data / "target" / "4.png").unlink()
    hidden = data / "source" / ".ipynb_checkpoints"
    hidden.mkdir()
    for path in (hidden / "0.png", data / "target" / "._0.png"):
        path.write_text("no image")
    odd = os.fsdecode(bytes(data / "target") + b"/caf\xe9.png")  # no UTF-8
    (data / "target" / "0.png").rename(odd)
    visible = example.read_domains(data, pytest.fail)
    assert visible.classes == 2 and len(visible.target) == 4
    shutil.rmtree(data / "target")
    said = refusal(SCRIPT, "--data", data, output=kept)
    assert "--data must hold images in target, got none" in said


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_cannot_be_read_ends_the_run_by_name(tmp_path, damage):
    data = tmp_path / "data"
    write_folder(data)
    found = example.read_domains(data, pytest.fail)
    batches = example.make_input(found, 2, 0, 0, 1)
    next(batches)
    path = data / "target" / "2.png"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(OSError) as raised:
        for _ in range(40):  # Grain has up to 16 batches ready
            next(batches)
    assert f"Reading {path}" in raised.value.__notes__
