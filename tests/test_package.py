"""Promises about importing the package, and the code in README."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import optax
import pytest

import jaxgrl

ROOT = pathlib.Path(__file__).parent.parent
# Of the cache, as in pyproject.toml, an entry that is not whole is no error.
WARNINGS = ("-Werror", "-Wdefault:Error reading persistent compilation cache entry")
README = (ROOT / "README.md").read_text()


def _run(code, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True
    )


FLAX_IS_ABSENT = (
    "import sys; assert not any(m.split('.')[0] == 'flax' for m in sys.modules)"
)


def test_import_never_imports_flax():
    assert _run(f"import jaxgrl; {FLAX_IS_ABSENT}").returncode == 0


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_the_test_above_can_fail(name):
    result = _run(f"import jaxgrl.{name}; {FLAX_IS_ABSENT}")
    assert result.returncode == 1 and "AssertionError" in result.stderr


PROXY = "import numpy, jaxgrl; jaxgrl.proxy_a_distance(*numpy.ones((2, 9, 2)))"


@pytest.mark.parametrize(
    "code, extra, module",
    [
        ("import jaxgrl.nnx", "flax", "flax"),
        ("import jaxgrl.linen", "flax", "flax"),
        (PROXY, "evaluation", "sklearn"),
    ],
)
def test_what_is_missing_is_named_with_a_command_that_installs_it(code, extra, module):
    result = _run(f"import sys; sys.modules['{module}'] = None; {code}")
    assert result.returncode == 1
    *_, error = result.stderr.splitlines()
    found = re.fullmatch(
        r"ImportError: `jaxgrl\.\w+` needs .*\. Install it with: pip install '(.*)'",
        error,
    )
    # The missing package itself: "jaxgrl[extra]" asks an index for jaxgrl, and
    # ".[extra]" works in a clone only.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found and project["optional-dependencies"][extra] == [found[1]]


def test_types_that_users_annotate_with_are_public():
    assert jaxgrl.ScaleLike and jaxgrl.ProxyADistance.__name__ == "ProxyADistance"


def test_version_is_that_of_the_distribution():
    assert jaxgrl.__version__ == importlib.metadata.version("jaxgrl")


def test_package_is_typed():
    assert (pathlib.Path(jaxgrl.__file__).parent / "py.typed").exists()


def _code(document):
    return "\n".join(re.findall(r"^```python\n(.*?)^```", document, re.S | re.M))


def test_readme_code_runs_and_prints_what_it_says():
    code = _code(README)
    result = _run(code, *WARNINGS)
    assert result.returncode == 0, result.stderr
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.M)
    assert len(promised) >= 7 and result.stdout.splitlines() == promised


def test_guide_code_runs_and_its_report_finds_nothing_to_mend():
    guide = (ROOT / "docs" / "guide.md").read_text()
    result = _run(_code(guide), *WARNINGS)
    assert result.returncode == 0, result.stderr
    assert "reversed once, by `scale`: nothing to mend in the reversal" in result.stdout
    # Numbers may differ in the last digit between versions; what is reversed may not.
    (promised,) = re.findall(r"^```text\n(parameter.*?)^```", guide, re.S | re.M)
    rows = [
        [line.split()[:2] for line in t.splitlines()[:9]]
        for t in (promised, result.stdout)
    ]
    assert rows[0] == rows[1]
    # Of the two scales that tie, as the guide says, rounding chooses.
    assert re.search(r"^scale (1|3), seed \d$", result.stdout, re.M)


def _table_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_readme_table_of_failures_is_what_happens(tmp_path):
    section = re.search(r"^## Why not five lines.*?(?=^## )", README, re.S | re.M)
    assert section
    promised = _table_rows(section[0])
    script = ROOT / "benchmarks" / "correctness.py"
    options = ("--quick", "--markdown", "--output", tmp_path)
    # Without the flags for JAX's future rules, under which errors read otherwise.
    env = {k: v for k, v in os.environ.items() if not re.match(r"JAX_.*3$|JAX_EN", k)}
    result = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, env=env
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = _table_rows(result.stdout)
    assert len(promised) == len(found) >= 12
    for row, expected in zip(found, promised, strict=True):
        for cell, entries in zip(row, expected, strict=True):
            allowed = entries.split(" / ")  # on the newest JAX, on the oldest
            if jax.__version_info__ >= (0, 12):
                allowed = allowed[:1]
            elif jax.__version_info__ < (0, 8):
                allowed = allowed[-1:]
            assert cell in allowed, row


def test_optax_scale_gradient_takes_no_traced_scale_as_readme_says():
    def grad(x, s):
        return jax.grad(lambda x: optax.scale_gradient(x, -s))(x)

    assert grad(1.0, 0.5) == -0.5
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(grad)(1.0, 0.5)


def test_readme_has_the_two_commands():
    section = re.search(r"^## Two commands\n(.*?)^## ", README, re.S | re.M)
    assert section and len(re.findall(r"^```sh\n", section[1], re.M)) == 2
