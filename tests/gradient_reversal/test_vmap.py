"""Batching: a shared x, a mapped scale, and every other way to map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrl import gradient_reversal

S = np.array([1.0, 2.0, 3.0], np.float32)


def _square(x, scale):
    return gradient_reversal(x, scale) ** 2


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_shared_x_with_a_mapped_scale(jit):
    def loss(x):
        return jnp.sum(jax.vmap(lambda s: _square(x, s))(S))

    grad = jax.grad(loss)
    assert float((jax.jit(grad) if jit else grad)(1.0)) == -2 * S.sum()
    assert float(jax.hessian(loss)(1.0)) == 2 * (S**2).sum()


def test_nested_and_partly_mapped():
    x = np.ones((2, 4), np.float32)

    def nested(x):
        rows = jax.vmap(lambda r: jax.vmap(lambda s: _square(x, r * s))(S))(S)
        return jnp.sum(rows)

    np.testing.assert_allclose(jax.grad(nested)(x), -2 * np.outer(S, S).sum() * x)

    def per_example(x, scales):  # each [2], aligned with the rows of the shared x
        return jnp.sum(jax.vmap(lambda s: _square(x, s))(scales))

    scales = np.arange(6, dtype=np.float32).reshape(3, 2)
    expected = -2 * scales.sum(0)[:, None] * x
    np.testing.assert_allclose(jax.grad(per_example)(x, scales), expected)


def test_under_spmd_axis_name():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    scales = np.array([1.0, 2.0], np.float32)
    with jax.set_mesh(mesh):
        mapped = jax.vmap(_square, in_axes=(None, 0), spmd_axis_name="i")
        grad = jax.jit(jax.grad(lambda x: jnp.sum(mapped(x, scales))))
        assert grad(1.0) == -6


@pytest.mark.parametrize("in_axes", [(None, 0), (0, None), (0, 0), (1, 0)])
@pytest.mark.parametrize("inner", [False, True], ids=["grad outside", "grad inside"])
def test_every_way_to_map(in_axes, inner):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 3)).astype(np.float32)
    scale = S if in_axes[1] == 0 else np.float32(2.0)

    def reverse(x, s):
        return jnp.sum(jnp.sin(gradient_reversal(x, s)))

    if inner:
        grad = jax.vmap(jax.grad(reverse), in_axes=in_axes)(x, scale)
        rows = {None: np.stack([x] * 3), 0: x, 1: x.T}[in_axes[0]]
        column = np.reshape(scale, (-1,) + (1,) * (rows.ndim - 1))
        np.testing.assert_allclose(grad, -column * np.cos(rows), rtol=1e-6)
        return

    def loss(x):
        return jnp.sum(jax.vmap(reverse, in_axes=in_axes)(x, scale))

    if in_axes[0] is None:
        factor = scale.sum()
    else:
        factor = np.broadcast_to(scale, 3)
        factor = factor[:, None] if in_axes[0] == 0 else factor[None, :]
    np.testing.assert_allclose(jax.grad(loss)(x), -factor * np.cos(x), rtol=1e-6)


def test_with_forward_mode():
    def loss(x):
        f = functools.partial(gradient_reversal, forward_mode=True)
        return jnp.sum(jax.vmap(lambda s: f(x, s) ** 2)(S))

    assert jax.grad(loss)(1.0) == -12
    assert jax.jacfwd(loss)(1.0) == -12
