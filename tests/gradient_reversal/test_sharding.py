"""The layer on meshes: shard_map, Auto and Explicit axes. Eight virtual CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spellings import SPELLINGS

from jaxgrl import gradient_reversal

X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
S = np.arange(1, 9, dtype=np.float32)


def _mesh(kind):
    return jax.make_mesh((8,), ("i",), axis_types=(kind,))


@pytest.fixture
def auto_mesh():
    return _mesh(AxisType.Auto)


@pytest.fixture
def explicit_mesh():
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        yield


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("x_spec", [P(), P("i")], ids=["x replicated", "x sharded"])
@pytest.mark.parametrize("s_spec", [P(), P("i")], ids=["s replicated", "s sharded"])
@pytest.mark.parametrize(
    "spelling, jit", [*((name, True) for name in SPELLINGS), ("function", False)]
)
def test_shard_map(auto_mesh, spelling, jit, x_spec, s_spec, check_vma):
    reverse = SPELLINGS[spelling]

    def local(x, s):
        return lax.psum(jnp.sum(jnp.sin(reverse(x, s.sum()))), "i")

    f = jax.shard_map(
        local,
        mesh=auto_mesh,
        in_specs=(x_spec, s_spec),
        out_specs=P(),
        check_vma=check_vma,
    )
    grad = jax.grad(f)
    grad = jax.jit(grad) if jit else grad
    # Each device reverses its part of x by the sum of its part of s.
    strength = S if s_spec == P("i") else np.full(8, S.sum())
    factor = strength[:, None] if x_spec == P("i") else strength.sum()
    np.testing.assert_allclose(grad(X, S), -factor * np.cos(X), rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_grad_inside_shard_map_and_second_order(auto_mesh, check_vma):
    def local(x, s):
        hessian = jax.hessian(lambda x: jnp.sin(gradient_reversal(x, s[0])))(x)
        return lax.psum(hessian, "i")

    f = jax.shard_map(
        local,
        mesh=auto_mesh,
        in_specs=(P(), P("i")),
        out_specs=P(),
        check_vma=check_vma,
    )
    if check_vma:  # the hessian sums over the mesh by itself: x is replicated
        local_sum = (S**2).sum()
        np.testing.assert_allclose(f(1.0, S) / 8, -local_sum * np.sin(1.0), rtol=1e-5)
    else:
        np.testing.assert_allclose(f(1.0, S), -(S**2).sum() * np.sin(1.0), rtol=1e-5)


@pytest.mark.parametrize("per_example", [False, True])
def test_data_parallel_adds_no_collective(auto_mesh, per_example):
    scale = S if per_example else np.float32(0.5)
    w = np.ones((4, 3), np.float32)

    def loss(w, x, scale, reverse):
        return jnp.sum(jnp.sin(reverse(x @ w, scale)))

    def compiled(reverse):
        f = jax.jit(
            jax.grad(functools.partial(loss, reverse=reverse)),
            in_shardings=tuple(
                NamedSharding(auto_mesh, spec)
                for spec in (P(), P("i"), P("i") if per_example else P())
            ),
            keep_unused=True,
        )
        text = f.lower(w, X, scale).compile().as_text()
        kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
        return f(w, X, scale), {kind: text.count(f" {kind}(") for kind in kinds}

    grad, collectives = compiled(gradient_reversal)
    _, without = compiled(lambda x, s: x)
    assert collectives == without and without["all-reduce"] == 1
    column = np.reshape(scale, (-1, 1))
    np.testing.assert_allclose(grad, X.T @ (-column * np.cos(X @ w)), rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "scale, spec",
    [
        (np.float32(0.5), P()),
        (S, P("i")),
        (S, P()),
        (S[:, None], P("i")),
        (np.ones((8, 4), np.float32), P("i")),
        (np.ones((1, 4), np.float32), P()),
    ],
    ids=["scalar", "sharded", "replicated", "column", "like x", "row"],
)
def test_explicit_axes_that_agree(explicit_mesh, scale, spec, jit):
    def loss(x, scale):
        return jnp.sum(jnp.sin(gradient_reversal(x, scale)))

    x, s = jax.device_put(X, P("i")), jax.device_put(scale, spec)
    grad = jax.grad(loss)
    grad = (jax.jit(grad) if jit else grad)(x, s)
    assert jax.typeof(grad) == jax.typeof(x)
    column = np.reshape(scale, scale.shape + (1,) * (2 - scale.ndim))
    np.testing.assert_allclose(grad, -column * np.cos(X), rtol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "scale, spec, x_spec",
    [(S, P("i"), P()), (np.ones((8, 8), np.float32), P(None, "i"), P("i"))],
)
def test_explicit_axes_that_disagree(explicit_mesh, scale, spec, x_spec, traced):
    x = jax.device_put(np.ones((8, 8), np.float32), x_spec)
    s = jax.device_put(scale, spec)
    call = jax.jit(gradient_reversal) if traced else gradient_reversal
    with pytest.raises(ValueError, match=r"`scale` must be sharded like .*'i'.*None"):
        call(x, s)
