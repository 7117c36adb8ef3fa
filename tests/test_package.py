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


def test_the_test_above_can_fail():
    result = _run(IMPORT.format("jaxgrl.nnx"))
    assert result.returncode == 1 and "AssertionError: {'" in result.stderr


# What needs an extra, each with the extra.
NEEDING = {
    "import jaxgrl.nnx": "flax",
    "import jaxgrl.linen": "flax",
    "jaxgrl.proxy_a_distance(*numpy.ones((2, 9, 2)))": "evaluation",
}
WITHOUT = f"""
import sys, numpy, jaxgrl
sys.modules |= dict.fromkeys(["flax", "sklearn"])
for code in {list(NEEDING)}:
    try:
        exec(code)
    except ImportError as error:
        print(error)
"""


def test_what_is_missing_is_named_with_a_command_that_installs_it():
    # The missing package itself: "jaxgrl[extra]" asks an index for jaxgrl, and
    # ".[extra]" works in a clone only.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    errors = _run(WITHOUT).stdout.splitlines()
    for (code, extra), error in zip(NEEDING.items(), errors, strict=True):
        (name,) = re.findall(r"jaxgrl\.\w+", code)
        said = rf"`{name}` needs [^.]*\. Install it with: pip install '(.*)'"
        assert extras[extra] == [re.fullmatch(said, error)[1]]


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
