"""Promises about importing the package."""

import importlib.metadata
import pathlib
import subprocess
import sys

import jax
import optax
import pytest

import jaxgrl


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


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_without_flax_the_layers_say_what_to_install(name):
    result = _run(f"import sys; sys.modules['flax'] = None; import jaxgrl.{name}")
    assert result.returncode == 1
    assert f"jaxgrl.{name} needs Flax: pip install 'jaxgrl[flax]'" in result.stderr


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
