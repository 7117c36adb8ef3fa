"""Known limits: documented, and pinned so that they cannot change unnoticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrl import gradient_reversal


def test_a_zero_scale_does_not_stop_what_is_not_finite():
    ct = jnp.array([np.inf, np.nan, 1.0], jnp.float32)
    (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, 0.0), ct)[1](ct)
    assert np.isnan(x_ct[:2]).all() and x_ct[2] == 0


def test_limit_jet_gives_the_term_without_the_reversal():
    from jax.experimental import jet

    def first_term():
        def f(x):
            return jnp.sin(gradient_reversal(x, 0.5))

        return jet.jet(f, (1.0,), ((1.0, 0.0),))[1][0]

    if getattr(jax.config, "jax_custom_jvp3", False):
        with pytest.raises(KeyError):  # JAX's future rules make it an error
            first_term()
    elif jax.__version_info__ < (0, 10):
        with pytest.raises(TypeError, match="symbolic_zeros"):  # of any custom_vjp
            first_term()
    else:
        np.testing.assert_allclose(first_term(), np.cos(1.0), rtol=1e-6)


def test_limit_linear_transpose_of_the_layer():
    with pytest.raises(NotImplementedError, match=r"[Tt]ranspose"):
        jax.linear_transpose(lambda x: gradient_reversal(x, 2.0), 1.0)(3.0)


def test_limit_donating_x_deletes_an_eager_y():
    x = jnp.ones(3)
    y = gradient_reversal(x, 0.5)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    with pytest.raises(RuntimeError, match="deleted"):
        y.block_until_ready()
