"""Promises about importing the package, and the code in README."""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys

import jax
import optax
import pytest

import jaxgrl

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


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


def _readme_code():
    return "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.S | re.M))


def test_readme_code_runs_and_prints_what_it_says():
    code = _readme_code()
    result = _run(code, "-W", "error")
    assert result.returncode == 0, result.stderr
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.M)
    assert len(promised) >= 7 and result.stdout.splitlines() == promised


EVALUATE_TABLE = """
import json, sys
outcomes = []
for line in json.loads(sys.argv[1]):
    for R in (by_hand, gradient_reversal):
        try:
            outcomes.append(str(eval(line)))
        except Exception as error:
            outcomes.append(type(error).__name__)
print(json.dumps(outcomes))
"""


def test_readme_table_of_failures_is_what_happens():
    rows = re.findall(r"^\| `(jax\..*?)` \| (.*?) \| (.*?) \|$", README, re.M)
    assert len(rows) >= 7
    lines, by_hand, right = zip(*rows, strict=True)
    definitions = re.search(r"@jax.custom_vjp\ndef by_hand.*?(?=```)", README, re.S)
    assert definitions
    imports = "import jax, jax.numpy as jnp\nfrom jaxgrl import gradient_reversal\n"
    code = imports + definitions[0] + EVALUATE_TABLE
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert tuple(outcomes[1::2]) == right
    for outcome, promised in zip(outcomes[::2], by_hand, strict=True):
        since_0_12 = f"(JAX 0.12: {outcome})"
        assert promised.startswith(outcome) or promised.endswith(since_0_12)


def test_optax_scale_gradient_takes_no_traced_scale_as_readme_says():
    def grad(x, s):
        return jax.grad(lambda x: optax.scale_gradient(x, -s))(x)

    assert grad(1.0, 0.5) == -0.5
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(grad)(1.0, 0.5)


def test_readme_has_the_two_commands():
    section = re.search(r"^## Two commands\n(.*?)^## ", README, re.S | re.M)
    assert section and len(re.findall(r"^```sh\n", section[1], re.M)) == 2
