"""One law, many spellings: forward the identity, backward -scale times the gradient.

The oracle is ordinary autodiff of the same function without the layer.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from spellings import SPELLINGS, assert_close, identity

from jaxgrl import gradient_reversal

X = np.linspace(-2.0, 2.0, 12, dtype=np.float32).reshape(3, 4)
SCALES = {
    "float": 0.5,
    "int": 3,
    "bool": True,
    "zero": 0.0,
    "negative": -1.0,
    "numpy scalar": np.float32(0.3),
    "numpy array": np.array(0.7, np.float32),
    "jax array": jnp.array(1.5, jnp.float32),
    "bfloat16": jnp.array(0.25, jnp.bfloat16),
    "int32": jnp.array(2, jnp.int32),
}


def _head(reverse, x, scale):
    return jnp.sin(reverse(jnp.tanh(x), scale))


def _policies():
    names = (
        "everything_saveable",
        "nothing_saveable",
        "dots_saveable",
        "checkpoint_dots",
        "dots_with_no_batch_dims_saveable",
        "checkpoint_dots_with_no_batch_dims",
    )
    for name in names:
        yield name, getattr(jax.checkpoint_policies, name)
    yield "save_names", jax.checkpoint_policies.save_only_these_names("h")
    yield (
        "save_any_names_but",
        jax.checkpoint_policies.save_any_names_but_these("h"),
    )
    yield (
        "offload_names",
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["h"],
            names_which_can_be_offloaded=[],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    )
    yield (
        "offload_dots",
        jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    )
    yield (
        "save_from_both",
        jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_saveable,
            jax.checkpoint_policies.save_only_these_names("h"),
        ),
    )


def _checkpointed(policy):
    def run(reverse, x, scale):
        def f(x, scale):
            return jnp.cos(checkpoint_name(_head(reverse, x, scale), "h"))

        return jax.checkpoint(f, policy=policy)(x, scale)

    return run


def _scan(reverse, x, scale):
    return lax.scan(lambda c, row: (c, _head(reverse, row, scale)), None, x)[1]


def _scan_over_scales(reverse, x, scale):
    scales = jnp.full((3,), 1.0, jnp.float32) * jnp.asarray(scale).astype(jnp.float32)
    rows = lax.scan(lambda c, r: (c, _head(reverse, *r)), None, (x, scales))
    return rows[1]


def _fori_loop(reverse, x, scale):
    def body(i, y):
        return y.at[i].set(_head(reverse, x[i], scale))

    return lax.fori_loop(0, 3, body, jnp.zeros((3, 4), jnp.float32))


def _cond(reverse, x, scale):
    def branch(x):
        return _head(reverse, x, scale)

    return lax.cond(jnp.sum(x) < 100, branch, jnp.negative, x)


def _switch(reverse, x, scale):
    branches = [jnp.negative, lambda x: _head(reverse, x, scale), jnp.abs]
    return lax.switch(jnp.int32(1), branches, x)


def _associative_scan(reverse, x, scale):
    return lax.associative_scan(jnp.add, _head(reverse, x, scale))


def _vmap(**kwargs):
    def run(reverse, x, scale):
        return jax.vmap(lambda row: _head(reverse, row, scale), **kwargs)(x)

    return run


def _vmap_both(reverse, x, scale):
    scales = jnp.stack([jnp.asarray(scale)] * 3)
    return jax.vmap(lambda row, s: _head(reverse, row, s))(x, scales)


def _vmap_scale(reverse, x, scale):
    scales = jnp.stack([jnp.asarray(scale)] * 3)
    return jax.vmap(lambda s: _head(reverse, x, s))(scales)


def _vmap_nested(reverse, x, scale):
    scales = jnp.stack([jnp.asarray(scale)] * 3)
    inner = jax.vmap(lambda e, s: _head(reverse, e, s), in_axes=(0, None))
    return jax.vmap(inner)(x, scales)


TRANSFORMATIONS = {
    "none": _head,
    "jit inside": lambda r, x, s: jax.jit(lambda x, s: _head(r, x, s))(x, s),
    "jit, static scale": lambda r, x, s: jax.jit(lambda x: _head(r, x, s))(x),
    "jit twice": lambda r, x, s: jax.jit(jax.jit(lambda x, s: _head(r, x, s)))(x, s),
    "vmap over x": _vmap(),
    "vmap over columns": _vmap(in_axes=1, out_axes=1),
    "vmap with out_axes": _vmap(out_axes=1),
    "vmap over both": _vmap_both,
    "vmap over scale": _vmap_scale,
    "vmap nested": _vmap_nested,
    "scan": _scan,
    "scan over scales": _scan_over_scales,
    "fori_loop": _fori_loop,
    "cond": _cond,
    "switch": _switch,
    "associative_scan": _associative_scan,
    "checkpoint": lambda r, x, s: jax.checkpoint(lambda x: _head(r, x, s))(x),
    **{f"checkpoint {name}": _checkpointed(policy) for name, policy in _policies()},
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_law_under_every_transformation(spelling, transformation, jit):
    reverse, run = SPELLINGS[spelling], TRANSFORMATIONS[transformation]
    scale = jnp.array(0.7, jnp.float32)

    def loss(reverse):
        return lambda x, scale: jnp.sum(run(reverse, x, scale) ** 2)

    maybe_jit = jax.jit if jit else lambda f: f
    value, grad = maybe_jit(jax.value_and_grad(loss(reverse)))(X, scale)
    expected_value, plain = maybe_jit(jax.value_and_grad(loss(identity)))(X, scale)
    assert_close(value, expected_value)
    assert_close(grad, -scale * plain)
    assert np.abs(grad).max() > 0.01


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_law_for_every_kind_of_scale(spelling, name, jit):
    reverse, scale = SPELLINGS[spelling], SCALES[name]

    def loss(x, scale, reverse=reverse):
        return jnp.sum(_head(reverse, x, scale))

    grad = jax.jit(jax.grad(loss)) if jit else jax.grad(loss)
    plain = jax.grad(loss)(X, scale, identity)
    assert_close(grad(X, scale), -np.float32(scale) * plain)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_forward_is_the_same_bits(spelling):
    bits = jnp.array([0, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001], jnp.uint32)
    x = lax.bitcast_convert_type(bits, jnp.float32)
    for f in (SPELLINGS[spelling], jax.jit(SPELLINGS[spelling])):
        y = f(x, 0.5)
        assert (lax.bitcast_convert_type(y, jnp.uint32) == bits).all()
    y, _ = jax.vjp(lambda x: SPELLINGS[spelling](x, jnp.float32(2.0)), x)
    assert (lax.bitcast_convert_type(y, jnp.uint32) == bits).all()


SECOND_ORDER = {
    "hessian": lambda f: lambda x, v: jax.hessian(f)(x) @ v,
    "jvp of grad": lambda f: lambda x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "grad of grad": lambda f: lambda x, v: jax.grad(lambda x: jax.grad(f)(x) @ v)(x),
    "jacrev of grad": lambda f: lambda x, v: jax.jacrev(jax.grad(f))(x) @ v,
    "jacrev of jacrev": lambda f: lambda x, v: jax.jacrev(jax.jacrev(f))(x) @ v,
    "jacfwd of jacrev": lambda f: lambda x, v: jax.jacfwd(jax.jacrev(f))(x) @ v,
    "linearize of grad": lambda f: lambda x, v: jax.linearize(jax.grad(f), x)[1](v),
    "vjp of grad": lambda f: lambda x, v: jax.vjp(jax.grad(f), x)[1](v)[0],
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("order", SECOND_ORDER)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_differentiation_passes_through_the_rule(spelling, order, jit):
    reverse, scale = SPELLINGS[spelling], jnp.array(0.5, jnp.float32)
    weights = jnp.array([[1.0, 0.2, 0.3], [0.5, 2.0, 0.1]], jnp.float32)
    x, v = X[0, :3], X[1, :3] + 1

    def f(reverse):
        return lambda x: jnp.sum(jnp.sin(weights @ reverse(x, scale)))

    maybe_jit = jax.jit if jit else lambda f: f
    second = maybe_jit(SECOND_ORDER[order](f(reverse)))(x, v)
    plain = SECOND_ORDER[order](f(identity))(x, v)
    np.testing.assert_allclose(second, scale**2 * plain, rtol=1e-5, atol=1e-6)


FORWARD_OVER_REVERSE = (
    "hessian",
    "jvp of grad",
    "jacfwd of jacrev",
    "linearize of grad",
)


def _through_scan(reverse):
    """Reverses twice, in the body of a scan whose constant is hoisted out of it."""

    def body(x, _):
        return jnp.sin(reverse(x, 0.5) * jnp.exp(0.1)), None

    return lambda x: jnp.sum(lax.scan(body, x, None, length=2)[0])


def _unrolled(x):
    for _ in range(2):
        x = jnp.sin(gradient_reversal(x, 0.5) * jnp.exp(0.1))
    return jnp.sum(x)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("order", SECOND_ORDER)
def test_higher_order_through_scan(order, forward_mode, jit):
    reverse = functools.partial(gradient_reversal, forward_mode=forward_mode)
    x, v = X[0, :3], X[1, :3] + 1
    second = SECOND_ORDER[order](_through_scan(reverse))
    second = jax.jit(second) if jit else second
    if jax.__version_info__ < (0, 12) and order in FORWARD_OVER_REVERSE:
        with pytest.raises(TypeError, match="forward-mode"):
            second(x, v)
        return
    assert_close(second(x, v), SECOND_ORDER[order](_unrolled)(x, v))


def test_third_order_in_both_modes_through_scan():
    def third(f):
        along = lambda x: jax.jvp(jax.grad(f), (x,), (v,))[1]  # noqa: E731
        return jax.grad(lambda x: jnp.sum(along(x) * v))(x)

    x, v = X[0, :3], X[1, :3] + 1
    f = _through_scan(gradient_reversal)
    if jax.__version_info__ < (0, 12):
        with pytest.raises(NotImplementedError, match="custom_lin"):
            third(f)
        return
    assert_close(third(f), third(_unrolled))


def test_third_derivative_is_minus_scale_cubed():
    def f(x):
        return jnp.sin(gradient_reversal(x, 0.5))

    third = jax.grad(jax.grad(jax.grad(f)))(1.0)
    np.testing.assert_allclose(third, -(0.5**3) * -np.cos(1.0), rtol=1e-5)


def test_values_that_torch_gives():
    # torch 2.13 autograd.Function, x=3, scale=.5, y=x**2: first -3, second +.5
    def f(x):
        return gradient_reversal(x, 0.5) ** 2

    assert jax.grad(f)(3.0) == -3.0
    assert jax.grad(jax.grad(f))(3.0) == 0.5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_jacrev_and_vjp(spelling):
    def f(x):
        return jnp.sin(SPELLINGS[spelling](x, 0.5))

    jacobian = jax.jacrev(f)(X[0])
    assert_close(jacobian, np.diag(-0.5 * np.cos(X[0])))
    y, pull = jax.vjp(f, X)
    assert_close(pull(y)[0], -0.5 * jnp.cos(X) * y)


def test_while_loop_forward():
    def body(x):
        return gradient_reversal(x, 0.5) * 2

    assert lax.while_loop(lambda x: x < 100, body, jnp.float32(1.0)) == 128
    assert jax.jit(lambda x: lax.while_loop(lambda x: x < 9, body, x))(1.0) == 16


def test_applied_n_times_in_a_scan_gives_the_nth_power():
    def f(x):
        return lax.scan(lambda x, _: (gradient_reversal(x, 0.5), None), x, length=3)[0]

    assert jax.grad(f)(1.0) == (-0.5) ** 3
    assert jax.grad(f)(1.0) == jax.jit(jax.grad(f))(1.0)


def test_disable_jit():
    with jax.disable_jit():
        grad = jax.grad(lambda x: jnp.sum(gradient_reversal(x, 0.5) ** 2))(X)
    assert_close(grad, -X)


def test_debug_nans_and_leak_checking():
    def loss(x, scale):
        return jnp.sum(gradient_reversal(x, scale) ** 2)

    with jax.debug_nans(True), jax.checking_leaks():
        assert_close(jax.jit(jax.grad(loss))(X, 0.5), -X)
        assert_close(jax.grad(loss)(X, jnp.float32(0.5)), -X)


def test_checkify():
    from jax.experimental import checkify

    def loss(x, scale):
        return jnp.sum(jnp.log(gradient_reversal(x, scale)))

    checked = jax.jit(checkify.checkify(jax.grad(loss), errors=checkify.all_checks))
    error, grad = checked(jnp.array([1.0, 2.0], jnp.float32), 0.5)
    error.throw()
    assert_close(grad, np.array([-0.5, -0.25], np.float32))


@pytest.mark.parametrize("x64", [False, True])
def test_x64(x64):
    with jax.enable_x64(x64):
        x = jnp.arange(3, dtype=jnp.float32)
        for scale in (0.1, np.float32(0.1), jnp.float32(0.1)):
            grad = jax.grad(lambda x, s=scale: jnp.sum(gradient_reversal(x, s)))(x)
            assert grad.dtype == jnp.float32
            assert (grad == np.float32(-0.1)).all()
        wide = jnp.arange(3, dtype=jnp.float64 if x64 else jnp.float32)
        grad = jax.jit(jax.grad(lambda x, s: jnp.sum(gradient_reversal(x, s))))
        assert grad(wide, 0.1).dtype == wide.dtype
        assert (grad(wide, 0.1) == wide.dtype.type(-0.1)).all()


def test_donated_buffers():
    def step(x):
        return x - jax.grad(lambda x: jnp.sum(gradient_reversal(x, 0.5) ** 2))(x)

    x = jnp.asarray(X)
    y = jax.jit(step, donate_argnums=0)(x)
    assert x.is_deleted()
    assert_close(y, 2 * X)


@pytest.mark.parametrize("scale_kind", ["scalar", "per example"])
def test_export_to_three_platforms_with_a_symbolic_batch(scale_kind):
    def loss(x, scale):
        return jnp.sum(jnp.sin(gradient_reversal(x, scale)))

    (batch,) = jax.export.symbolic_shape("batch")
    scale_shape = () if scale_kind == "scalar" else (batch,)
    exported = jax.export.export(jax.jit(loss), platforms=("cpu", "cuda", "tpu"))(
        jax.ShapeDtypeStruct((batch, 4), jnp.float32),
        jax.ShapeDtypeStruct(scale_shape, jnp.float32),
    )
    restored = jax.export.deserialize(exported.serialize(vjp_order=1))
    scale = jnp.full(() if scale_kind == "scalar" else 3, 0.5, jnp.float32)
    np.testing.assert_allclose(restored.call(X + 1, scale), np.sin(X + 1).sum(), 1e-6)
    x_grad, scale_grad = jax.grad(restored.call, argnums=(0, 1))(X, scale)
    assert_close(x_grad, -0.5 * np.cos(X))
    assert not scale_grad.any()
