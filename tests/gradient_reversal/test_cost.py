"""What a call costs: traces, equations, and what is left in a compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np

import jaxgrl._gradient_reversal
from jaxgrl import gradient_reversal


def test_eager_calls_return_x_itself():
    x = jnp.ones(3)
    assert gradient_reversal(x, 0.5) is x
    assert gradient_reversal(x, jnp.float32(0.5)) is x
    n = np.ones(3)
    assert gradient_reversal(n) is n
    assert gradient_reversal(1.5) == 1.5


def test_one_trace_for_any_number_of_values():
    traces = []

    @jax.jit
    def grad(x, scale):
        traces.append(scale)
        return jax.grad(lambda x: jnp.sum(gradient_reversal(x, scale) ** 2))(x)

    x = jnp.ones(3, jnp.float32)
    for scale in (0.1, 0.2, 3.0):
        np.testing.assert_allclose(grad(x, scale), np.full(3, -2 * scale), rtol=1e-6)
    assert len(traces) == 1


def test_nothing_is_left_of_the_layer_in_a_forward_program():
    def compiled(reverse, scale):
        def f(x, s):
            return jnp.sin(reverse(jnp.cos(x) @ x, s))

        lowered = jax.jit(f, keep_unused=True).lower(jnp.ones((4, 4)), scale)
        lines = lowered.compile().as_text().splitlines()
        return sum(" = " in line for line in lines)

    for scale in (jnp.float32(0.5), jnp.ones(4)):
        assert compiled(gradient_reversal, scale) == compiled(lambda x, s: x, scale)


def test_the_rule_is_traced_once_for_each_shape(monkeypatch):
    ties = []
    tie = jaxgrl._gradient_reversal._tie
    monkeypatch.setattr(
        jaxgrl._gradient_reversal, "_tie", lambda *a: ties.append(1) or tie(*a)
    )
    for f in (jnp.sin, jnp.cos, jnp.tanh):
        jax.jit(lambda x, s, f=f: f(gradient_reversal(x, s)))(jnp.ones((7, 11)), 0.5)
    assert len(ties) == 1


def test_only_a_traced_scale_is_tied():
    x = jnp.ones(3, jnp.float32)
    for scale in (0.5, jnp.float32(0.5)):
        jaxpr = jax.make_jaxpr(lambda x, s=scale: gradient_reversal(x, s))(x)
        assert "select_n" not in str(jaxpr)
    assert "select_n" in str(jax.make_jaxpr(gradient_reversal)(x, 0.5))


def test_the_inner_jit_is_inlined():
    f = jax.jit(jax.grad(lambda x, s: jnp.sum(gradient_reversal(x, s) ** 2)))
    lowered = f.lower(jnp.ones(3), 0.5).as_text()
    assert "gradient_reversal" not in lowered and "call @" not in lowered


def test_profiles_show_the_name():
    f = jax.jit(jax.grad(lambda x, s: jnp.sum(jnp.sin(gradient_reversal(x, s)))))
    compiled = f.lower(jnp.ones(3), 0.5).compile().as_text()
    assert re.search(r'op_name="[^"]*\bgradient_reversal\b[^"]*/mul"', compiled)
