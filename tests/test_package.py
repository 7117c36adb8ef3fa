"""Promises about importing the package."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import optax
import pytest

import jaxgrl

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


def _run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


# Not Flax, and nothing else of JAX: jax.extend alone takes 30 ms.
IMPORT = """
import sys, jax, optax
before = set(sys.modules)
import {}
new = {{name for name in sys.modules.keys() - before if not name.startswith("jaxgrl")}}
assert not new, new
"""


def test_import_loads_nothing_else():
    assert _run(IMPORT.format("jaxgrl")).returncode == 0


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_the_test_above_can_fail(name):
    result = _run(IMPORT.format(f"jaxgrl.{name}"))
    assert result.returncode == 1 and "AssertionError: {'" in result.stderr


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


def test_version_is_that_of_the_distribution():
    assert jaxgrl.__version__ == importlib.metadata.version("jaxgrl")


def test_package_is_typed():
    assert (pathlib.Path(jaxgrl.__file__).parent / "py.typed").exists()


def test_optax_scale_gradient_takes_no_traced_scale_as_readme_says():
    def grad(x, s):
        return jax.grad(lambda x: optax.scale_gradient(x, -s))(x)

    assert grad(1.0, 0.5) == -0.5
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(grad)(1.0, 0.5)
