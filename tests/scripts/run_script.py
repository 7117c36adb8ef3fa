"""Runs the programs of examples/ and benchmarks/."""

import atexit
import concurrent.futures
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import warnings
from unittest import mock

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
LIMIT = 180  # seconds for any process of these tests; each takes about 10
# Each process forks from one that has imported what takes seconds, and run nothing.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    "flax.linen flax.nnx grain h5py matplotlib.animation matplotlib.figure optax "
    "pytest scipy.stats sklearn.datasets sklearn.linear_model "
    "sklearn.model_selection tqdm".split()
)

READERS = concurrent.futures.ThreadPoolExecutor(16)


class Process:
    """A script in a process of its own, in which warnings are errors.

    Attributes:
      pid: The number of the process.
    """

    def __init__(self, script, *options, devices=None, before=None):
        """Starts it.

        Args:
          script: Its path in the repository.
          *options: Of its command line.
          devices: Number of virtual devices; None is what JAX makes of the machine.
          before: Called in the process first, and picklable.
        """
        flag = "--xla_force_host_platform_device_count"
        flags = "" if devices is None else f"{flag}={devices}"
        (out, printed), (err, errors) = (SERVER.Pipe(duplex=False) for _ in range(2))
        options = [str(option) for option in options]
        self._process = SERVER.Process(
            target=_run,
            args=(str(ROOT / script), options, printed, errors, flags, before),
        )
        self._process.start()
        self.pid = self._process.pid
        for writer in (printed, errors):
            writer.close()  # the process has another
        self._stdout, self._stderr = (
            READERS.submit(_read, pipe) for pipe in (out, err)
        )

    @property
    def returncode(self):
        """None while it runs; a signal that ended it is a negative number."""
        return self._process.exitcode

    @property
    def stdout(self):
        """What it has printed, once it has ended."""
        return self._stdout.result(LIMIT)

    @property
    def stderr(self):
        """What it has printed as errors, once it has ended."""
        return self._stderr.result(LIMIT)

    def send(self, number):
        """Sends it a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout=LIMIT):
        """Waits for its end, and tells whether it came."""
        self._process.join(timeout)
        return self.returncode is not None

    def end(self):
        """Waits for its end, and returns it; kills it if that does not come."""
        if not self.wait():
            self._process.kill()
            raise AssertionError(f"no end in {LIMIT} seconds: {self.stderr}")
        return self


def _read(pipe):
    with pipe, open(pipe.fileno(), closefd=False, errors="replace") as file:
        return file.read()


def _run(script, options, printed, errors, flags, before):
    """What a process does."""
    for number, pipe in ((1, printed), (2, errors)):
        with pipe:
            os.dup2(pipe.fileno(), number)
    os.environ["XLA_FLAGS"] = flags
    sys.argv = [script, *options]
    sys.path.insert(0, str(pathlib.Path(script).parent))
    warnings.resetwarnings()
    warnings.simplefilter("error")
    # Of the cache, as in pyproject.toml, an entry that is not whole is no error.
    cut = "Error reading persistent compilation cache entry"
    warnings.filterwarnings("default", cut)
    if before:
        before()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing calls none


def run(script, *options):
    """Returns the finished process of a script."""
    return Process(script, *options).end()


def _interrupting(text, number):
    replace = pathlib.Path.replace

    def interrupting(draft, target):
        hit = text in pathlib.Path(draft).read_text(errors="ignore")
        if hit and number == signal.SIGKILL:  # with a draft that never counts
            signal.raise_signal(signal.SIGKILL)
        found = replace(draft, target)
        if hit:
            pathlib.Path.replace = replace
            signal.raise_signal(number)
        return found

    pathlib.Path.replace = interrupting
    # A job in the background of a shell ignores the signal, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(script, *options, text, by=signal.SIGINT):
    """Returns the process of a script that a signal ended once it had saved this text.

    The signal comes from within, so that no clock decides where it hits. SIGKILL comes
    a moment before, when the draft of the file is not yet in its place.
    """
    before = functools.partial(_interrupting, text, by)
    return Process(script, *options, before=before).end()


def finished(script, *options, output):
    """Returns what a script printed, the folder that it made, and its results."""
    result = run(script, *options, "--output", output)
    assert result.returncode == 0, result.stderr
    (folder,) = output.iterdir()
    return result.stdout, folder, json.loads((folder / "results.json").read_text())


@functools.cache
def load(script):
    """Returns a script as a module: another start of Python takes seconds."""
    path = ROOT / script
    if (path.parent / "__init__.py").exists():  # a part, imported by scripts beside
        with mock.patch.object(sys, "path", [str(path.parents[1]), *sys.path]):
            return importlib.import_module(f"{path.parent.name}.{path.stem}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


def refusal(script, *options, output):
    """Returns what a script says to options that it must refuse, keeping nothing."""
    arguments = [script, *map(str, options), "--output", str(output)]
    with (
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stderr(io.StringIO()) as said,
        pytest.raises(SystemExit) as exit_,
    ):
        load(script).main()
    assert exit_.value.code == 2 and not output.exists()
    return said.getvalue()
