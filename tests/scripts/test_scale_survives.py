"""DANN at scale in real processes: killed, stopped, on a full disk, and left alone.

JAXGRL_KILLS=20 adds that many kills at random moments, and the slower forms.
"""

import json
import os
import pathlib
import re
import resource
import signal
import socket
import time

import numpy as np
import pytest
from run_script import LIMIT, Process

pytestmark = pytest.mark.slow
SCRIPT = "examples/dann_at_scale.py"
APART = "tests/scripts/domains_apart.py"
OPTIONS = ("--batch-size", "16", "--checkpoint-every", "2")
KILLS = int(os.environ.get("JAXGRL_KILLS", "0"))
STEPS = 60 if KILLS else 30
long = pytest.mark.skipif(not KILLS, reason="minutes long: JAXGRL_KILLS is not set")
started = []


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    for process in started:
        if process.returncode is None:
            process.send(signal.SIGKILL)
            process.wait()
    started.clear()


def start(*options, script=SCRIPT, devices=1):
    """Returns a running process of a script."""
    started.append(Process(script, *options, devices=devices))
    return started[-1]


def digest(process):
    """Returns the digest that a process printed in its last line."""
    assert process.end().returncode == 0, process.stderr
    last = process.stdout.splitlines()[-1]
    return re.fullmatch("sha256 of the final state: ([0-9a-f]{64})", last)[1]


def rows(run):
    """Returns the whole lines of the metrics of a run."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [
        json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"
    ]


def wait_for(run, step, *processes):
    """Waits until a run has logged a step."""
    give_up = time.monotonic() + LIMIT
    while len(rows(run)) < step:
        assert time.monotonic() < give_up
        for process in processes:
            assert process.returncode is None, process.stderr
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The digest and the metrics of a run that nothing disturbed, and its seconds."""
    start("--help").end()  # the first process waits for the imports
    run, began = tmp_path_factory.mktemp("undisturbed") / "run", time.monotonic()
    found = digest(start("--output", run, "--steps", STEPS, *OPTIONS))
    text = (run / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in rows(run)] == [*range(1, STEPS + 1)]
    assert {*rows(run)[0]} == {
        *("step", "loss", "label_loss", "domain_loss", "domain_accuracy")
    }
    return found, text, time.monotonic() - began


def same(run, process, undisturbed):
    """Asserts that a resumed run ends as the undisturbed one did, to the last bit."""
    assert digest(process) == undisturbed[0]
    assert (run / "metrics.jsonl").read_bytes() == undisturbed[1]


@long
def test_kill_minus_nine_at_random_moments_loses_nothing(tmp_path, undisturbed):
    seed = time.time_ns() % 2**32
    rng, in_checkpoint, steps = np.random.default_rng(seed), 0, []
    run, kills = tmp_path / "0", 0
    while kills < KILLS:
        # A run is killed again and again, until it comes through.
        new = ("--output", run, "--steps", STEPS, *OPTIONS)
        process = start(*(("--resume", run) if run.exists() else new))
        if not process.wait(rng.uniform(0, 1.1 * undisturbed[2])):
            process.send(signal.SIGKILL)
        if process.end().returncode == -signal.SIGKILL:
            kills += 1
            in_checkpoint += any("tmp" in p.name for p in run.rglob("*"))
            steps.append(len(rows(run)))
        if run.exists() and (process.returncode == 0 or kills == KILLS):
            same(run, start("--resume", run), undisturbed)
            run = tmp_path / str(kills)
    print(f"{kills} kills, {in_checkpoint} in a checkpoint, at steps {steps}; {seed=}")


def test_a_run_stopped_killed_and_out_of_disk_ends_as_an_undisturbed_one(
    tmp_path, undisturbed
):
    run = tmp_path / "run"
    process = start("--output", run, "--steps", STEPS, *OPTIONS)
    wait_for(run, 7, process)
    process.send(signal.SIGTERM)
    assert process.end().returncode == 75
    step = int(re.search(r"SIGTERM: saved step (\d+) in", process.stderr)[1])
    assert rows(run)[-1]["step"] == step
    assert (run / "checkpoints" / str(step)).is_dir()

    process = start("--resume", run)
    wait_for(run, step + 5, process)
    process.send(signal.SIGKILL)
    process.end()
    with (run / "metrics.jsonl").open("a") as file:  # as a line that was cut
        file.write('{"step": 31, "lo')

    process = start("--resume", run)
    wait_for(run, step + 12, process)
    # From now on no file may grow beyond a kilobyte, the metrics among them.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, 1024))
    assert process.end().returncode == 1
    assert "File too large" in process.stderr
    assert f"go on with --resume {run}" in process.stderr
    same(run, start("--resume", run), undisturbed)


def pair(port, *options, script=SCRIPT, devices=4):
    """Returns two running processes of one run."""
    several = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2)
    several += ("--timeout", 10, *options)
    return [
        start(*several, "--process-id", i, script=script, devices=devices)
        for i in range(2)
    ]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listening(port):
    """Returns the addresses, in hexadecimal, at which this host listens on a port."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {
        line[1].split(":")[0]
        for line in lines
        if line[3] == "0A" and int(line[1].split(":")[1], 16) == port
    }


@pytest.mark.parametrize("script", [APART, pytest.param(SCRIPT, marks=long)])
def test_two_processes_stop_together_and_end_as_one_device(tmp_path, port, script):
    runs = [tmp_path / "two", tmp_path / "one"]
    options = ("--steps", 100, "--batch-size", 16)
    processes = pair(port, "--output", runs[0], *options, script=script)
    wait_for(runs[0], 12, *processes)
    # Where the user said, 127.0.0.1, and not everywhere.
    assert {address[-8:] for address in listening(port)} == {"0100007F"}
    processes[1].send(signal.SIGTERM)
    for process in processes:
        assert process.end().returncode == 75
    assert len(rows(runs[0])) < 100
    resumed = pair(port, "--resume", runs[0], script=script)
    digest(resumed[0])
    resumed[1].end()
    digest(start("--output", runs[1], *options, script=script))
    two, one = (
        np.array(
            [
                [row[k] for k in ("step", "loss", "label_loss", "domain_loss")]
                for row in rows(run)
            ]
        )
        for run in runs
    )
    np.testing.assert_allclose(two[:20], one[:20], rtol=0, atol=1e-5)
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-2)  # rounding grows


@long
def test_a_run_may_be_resumed_on_another_number_of_devices(tmp_path, undisturbed):
    run = tmp_path / "run"
    process = start("--output", run, "--steps", STEPS, *OPTIONS)
    wait_for(run, 12, process)
    process.send(signal.SIGKILL)
    process.end()
    digest(start("--resume", run, devices=8))
    lines = undisturbed[1].splitlines()
    expected = [json.loads(line)["loss"] for line in lines]
    found = [row["loss"] for row in rows(run)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@long
@pytest.mark.parametrize("lost", [1, 0])
def test_a_process_that_dies_ends_the_other_within_the_timeout(tmp_path, port, lost):
    run = tmp_path / "run"
    options = ("--output", run, "--steps", 5000, *OPTIONS)
    processes = pair(port, *options, devices=1)
    wait_for(run, 5, *processes)
    processes[lost].send(signal.SIGKILL)
    began = time.monotonic()
    other = processes[1 - lost].end()
    assert time.monotonic() - began < 10 + 20
    assert other.returncode not in (0, 75)
    assert "another task died" in other.stderr or "Gloo" in other.stderr
    assert any(p.name.isdecimal() for p in (run / "checkpoints").iterdir())


@long
def test_a_process_that_never_arrives_is_not_awaited_for_ever(tmp_path, port):
    options = ("--num-processes", 2, "--process-id", 0, "--timeout", 5)
    began = time.monotonic()
    process = start(
        *options, "--coordinator", f"127.0.0.1:{port}", "--output", tmp_path / "run"
    )
    assert process.end().returncode != 0 and time.monotonic() - began < 5 + 60
    errors = process.stderr
    assert f"Waiting up to 5 s for 2 processes at 127.0.0.1:{port}" in errors
    assert "DEADLINE_EXCEEDED" in errors and not (tmp_path / "run").exists()
