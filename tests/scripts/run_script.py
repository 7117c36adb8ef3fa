"""Runs the programs of examples/ and benchmarks/."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import pathlib
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
