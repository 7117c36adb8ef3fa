"""What type checkers accept runs, and what they refuse raises."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import typed_calls


@pytest.mark.parametrize("calls", typed_calls.CORRECT, ids=lambda f: f.__name__)
def test_correct_calls_run(calls):
    calls()


@pytest.mark.parametrize("call", typed_calls.INCORRECT)
def test_incorrect_calls_raise(call):
    with pytest.raises((TypeError, ValueError, AttributeError)):
        call()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None,
    reason="pyright is missing: pip install pyright",
)
def test_pyright_refuses_each_incorrect_call_and_nothing_else(tmp_path):
    source = pathlib.Path(typed_calls.__file__)
    comment = "  # pyright: ignore["
    lines = source.read_text().splitlines()
    bare = tmp_path / "bare_calls.py"
    bare.write_text("\n".join(line.split(comment)[0] for line in lines))
    # From the root, so that the settings are those of the project.
    options = ("--outputjson", "--pythonpath", sys.executable)
    result = subprocess.run(
        [sys.executable, "-m", "pyright", *options, source, bare],
        cwd=source.parent.parent,
        capture_output=True,
        text=True,
    )
    report = json.loads(result.stdout)
    assert report["summary"]["filesAnalyzed"] == 2, report
    found = {
        (pathlib.Path(d["file"]).name, d["range"]["start"]["line"], d.get("rule"))
        for d in report["generalDiagnostics"]
    }
    expected = {
        (bare.name, number, line.split(comment)[1].rstrip("]"))
        for number, line in enumerate(lines)
        if comment in line
    }
    assert found == expected and len(expected) == len(typed_calls.INCORRECT) > 20
