"""Forward mode: on request, and else an error that shows the option."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from spellings import SPELLINGS, assert_close

from jaxgrl import gradient_reversal

X = np.linspace(-2.0, 2.0, 12, dtype=np.float32).reshape(3, 4)


def _jvp(f, x):
    return jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


FORWARD = {
    "jvp": _jvp,
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "jacfwd of jacfwd": lambda f, x: jax.jacfwd(jax.jacfwd(f))(x),
    "jacrev of jacfwd": lambda f, x: jax.jacrev(jax.jacfwd(f))(x),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "linearize of jit": lambda f, x: jax.linearize(jax.jit(f), x)[1](x),
    "jit of jvp": lambda f, x: jax.jit(lambda x: _jvp(f, x))(x),
    "jvp of jit": lambda f, x: _jvp(jax.jit(f), x),
    "jvp of vmap": lambda f, x: _jvp(jax.vmap(f), x),
    "vmap of jvp": lambda f, x: jax.vmap(lambda x: _jvp(f, x))(x),
    "checkpoint": lambda f, x: _jvp(jax.checkpoint(f), x),
    "scan": lambda f, x: _jvp(
        lambda x: lax.scan(lambda x, _: (f(x), None), x, None, length=2)[0], x
    ),
    "map": lambda f, x: _jvp(lambda x: lax.map(f, x), x),
    "cond": lambda f, x: _jvp(lambda x: lax.cond(x[0] > 0, f, jnp.sin, x), x),
    "switch": lambda f, x: _jvp(lambda x: lax.switch(1, [jnp.sin, f], x), x),
    "while": lambda f, x: _jvp(
        lambda x: lax.while_loop(lambda x: x[0] < 3, lambda x: f(x) + 1, x), x
    ),
    "fori_loop": lambda f, x: _jvp(
        lambda x: lax.fori_loop(0, 2, lambda i, x: f(x), x), x
    ),
    "grad of jvp": lambda f, x: jax.grad(lambda x: _jvp(f, x).sum())(x),
}


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_forward_mode_raises_and_shows_the_option(way, spelling):
    # A shape of its own: JAX keeps the trace of the first call for each shape.
    x = jnp.ones(3 + list(FORWARD).index(way), jnp.float32)
    reverse = SPELLINGS[spelling]
    with pytest.raises(TypeError) as info:
        FORWARD[way](lambda x: jnp.sin(reverse(x, 0.5)), x)
    assert "forward_mode=True" in "".join(traceback.format_exception(info.value))
    # Who searches for JAX's message finds the option, too.
    documented = " ".join(gradient_reversal.__doc__.split())
    assert str(info.value) in documented


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_forward_mode_on_request(jit):
    def f(x, scale):
        return jnp.sin(gradient_reversal(x, scale, forward_mode=True))

    maybe_jit = jax.jit if jit else lambda f: f
    scale = jnp.float32(0.5)
    t = jnp.ones_like(X)
    expected = -0.5 * np.cos(X)
    _, tangent = maybe_jit(lambda x, s: jax.jvp(lambda x: f(x, s), (x,), (t,)))(
        X, scale
    )
    assert_close(tangent, expected)
    assert_close(jax.linearize(lambda x: f(x, scale), X)[1](t), expected)
    jacobian = maybe_jit(jax.jacfwd(f))(X[0], scale)
    assert_close(jacobian, np.diag(expected[0]))
    assert_close(jax.grad(lambda x: jnp.sum(f(x, scale)))(X), expected)
    second = jax.jacfwd(jax.jacfwd(f))(jnp.float32(1.0), scale)
    np.testing.assert_allclose(second, -(0.5**2) * np.sin(1.0), rtol=1e-6)
