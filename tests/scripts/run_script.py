"""Runs the programs of examples/ and benchmarks/."""

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

import pytest

# Of the cache, as in pyproject.toml, an entry that is not whole is no error.
WARNINGS = ("-Werror", "-Wdefault:Error reading persistent compilation cache entry")
ROOT = pathlib.Path(__file__).parent.parent.parent
# Without the eight devices of the other tests.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def run(script, *options):
    """Returns the finished process of a script, in which warnings are errors."""
    return subprocess.run(
        [sys.executable, *WARNINGS, ROOT / script, *options],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


INTERRUPTING = """
import pathlib, runpy, signal, sys
text, number, script = sys.argv[1:4]
del sys.argv[:3]
sys.path[0] = str(pathlib.Path(script).parent)
replace = pathlib.Path.replace
def interrupting(draft, target):
    hit = text in pathlib.Path(draft).read_text(errors="ignore")
    if hit and int(number) == signal.SIGKILL:  # with a draft that never counts
        signal.raise_signal(signal.SIGKILL)
    found = replace(draft, target)
    if hit:
        pathlib.Path.replace = replace
        signal.raise_signal(int(number))
    return found
pathlib.Path.replace = interrupting
# A job in the background of a shell ignores the signal, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path(script, run_name="__main__")
"""


def interrupted(script, *options, text, by=signal.SIGINT):
    """Returns the process of a script that a signal ended once it had saved this text.

    The signal comes from within, so that no clock decides where it hits. SIGKILL comes
    a moment before, when the draft of the file is not yet in its place.
    """
    number = str(int(by))
    command = [sys.executable, "-c", INTERRUPTING, text, number, ROOT / script]
    command += options
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


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
