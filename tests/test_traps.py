"""The ways in which a gradient reversal that looks right is wrong, a test for each."""

import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxgrl._gradient_reversal
from jaxgrl import gradient_reversal

S = np.array([1.0, 2.0, 3.0], np.float32)


def _square(x, scale):
    return gradient_reversal(x, scale) ** 2


# 1. Shared x, mapped scale, grad outside vmap.


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_trap_1_shared_x_with_a_mapped_scale(jit):
    def loss(x):
        return jnp.sum(jax.vmap(lambda s: _square(x, s))(S))

    grad = jax.grad(loss)
    assert (jax.jit(grad) if jit else grad)(1.0) == -2 * S.sum()
    assert jax.hessian(loss)(1.0) == 2 * (S**2).sum()


def test_trap_1_nested_and_partly_mapped():
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


def test_trap_1_under_spmd_axis_name():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    scales = np.array([1.0, 2.0], np.float32)
    with jax.set_mesh(mesh):
        mapped = jax.vmap(_square, in_axes=(None, 0), spmd_axis_name="i")
        grad = jax.jit(jax.grad(lambda x: jnp.sum(mapped(x, scales))))
        assert grad(1.0) == -6


@pytest.mark.parametrize("in_axes", [(None, 0), (0, None), (0, 0), (1, 0)])
@pytest.mark.parametrize("inner", [False, True], ids=["grad outside", "grad inside"])
def test_trap_1_every_way_to_map(in_axes, inner):
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


def test_trap_1_with_forward_mode():
    def loss(x):
        f = functools.partial(gradient_reversal, forward_mode=True)
        return jnp.sum(jax.vmap(lambda s: f(x, s) ** 2)(S))

    assert jax.grad(loss)(1.0) == -12
    assert jax.jacfwd(loss)(1.0) == -12


# 3. Dtypes.

FLOATS = (
    *("float32", "float16", "bfloat16", "complex64"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn"),
)
SCALE_DTYPES = ("float32", "bfloat16", "float16", "int32", "bool", "uint8")


@pytest.mark.parametrize("scale_dtype", [None, *SCALE_DTYPES])
@pytest.mark.parametrize("dtype", FLOATS)
def test_trap_3_the_gradient_has_the_dtype_of_x(dtype, scale_dtype):
    values = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    x = jnp.asarray(values).astype(dtype)
    scale = 1.0 if scale_dtype is None else jnp.ones((), scale_dtype)
    y, pull = jax.vjp(gradient_reversal, x, scale)
    x_ct, _ = pull(x)
    assert y.dtype == x_ct.dtype == x.dtype
    expected = jnp.asarray(-values).astype(dtype)
    assert (x_ct.astype(jnp.complex64) == expected.astype(jnp.complex64)).all()
    per_example = jnp.ones(4, jnp.float32) * 0.5
    (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, per_example), x)[1](x)
    assert x_ct.dtype == x.dtype


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_trap_3_double_precision(dtype):
    with jax.enable_x64(True):
        x = jnp.array([1.0, 1 / 3], dtype)
        for scale in (0.1, jnp.array(0.1, jnp.float64)):
            (x_ct,) = jax.vjp(lambda x, s=scale: gradient_reversal(x, s), x)[1](x)
            assert x_ct.dtype == x.dtype
            np.testing.assert_allclose(x_ct, -0.1 * np.asarray(x), rtol=1e-15)


def test_trap_3_a_float64_scale_is_not_rounded_before_it_is_multiplied():
    with jax.enable_x64(True):
        ct = np.random.default_rng(0).normal(size=1000).astype(np.float32)
        scale = np.array(np.pi)
        (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, scale), ct)[1](ct)
        np.testing.assert_array_equal(x_ct, (-np.pi * ct.astype(float)).astype("f4"))
        assert (x_ct != -np.float32(np.pi) * ct).any()


def test_trap_3_a_python_number_does_not_widen_the_product():
    with jax.enable_x64(True):
        x = jnp.ones(3, jnp.float32)
        f = jax.grad(lambda x: jnp.sum(gradient_reversal(x, 0.1) ** 2))
        assert "f64[3]" not in str(jax.make_jaxpr(f)(x))
        f = jax.grad(lambda x: jnp.sum(gradient_reversal(x, np.array(0.1)) ** 2))
        assert "f64[3]" in str(jax.make_jaxpr(f)(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["python", "traced", "per example"])
def test_trap_3_low_precision_is_rounded_once_and_unbiased(dtype, kind):
    rng = np.random.default_rng(0)
    ct = jnp.asarray(rng.uniform(1, 2, 100_000).astype(np.float32)).astype(dtype)
    scale = {"python": 0.3, "traced": jnp.float32(0.3)}.get(kind)
    if scale is None:
        scale = jnp.full(ct.shape, 0.3, jnp.float32)
    (x_ct,) = jax.jit(lambda x, s: jax.vjp(gradient_reversal, x, s)[1](ct)[:1])(
        ct, scale
    )
    exact = -np.float32(0.3) * np.asarray(ct, np.float32)
    assert x_ct.dtype == ct.dtype
    np.testing.assert_array_equal(x_ct, jnp.asarray(exact).astype(dtype))
    bias = np.mean(np.asarray(x_ct, np.float64) / exact) - 1
    assert abs(bias) < 2e-5  # a bfloat16 scale would be off by 2.6e-3


def test_trap_3_features_that_feed_another_head_too():
    x = jnp.ones(3, jnp.bfloat16)

    def loss(x, scale):
        return jnp.sum(x * x) + jnp.sum(gradient_reversal(x, scale))

    grad = jax.grad(loss)(x, jnp.float32(0.5))
    assert grad.dtype == jnp.bfloat16 and (grad == 1.5).all()


def test_trap_3_complex_gradients_keep_their_infinities():
    ct = jnp.array([complex(np.inf, 1.0)], jnp.complex64)
    (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, 2.0), ct)[1](ct)
    assert x_ct[0].real == -np.inf and x_ct[0].imag == -2.0


# 4. Leaves that are not floating.


def test_trap_4_other_leaves_pass_through_untouched():
    key = jax.random.key(0)
    rest = {
        "int": jnp.arange(3),
        "int4": jnp.arange(3).astype(jnp.int4),
        "bool": jnp.array([True, False]),
        "key": key,
        "none": None,
        "string": "name",
        "function": jnp.sin,
        "numpy": np.arange(3),
    }

    def loss(h, scale):
        out = gradient_reversal({"h": h, **rest}, scale)
        assert all(out[name] is rest[name] for name in rest)
        return jnp.sum(out["h"] ** 2)

    h = jnp.ones(3, jnp.float32)
    for scale in (0.5, jnp.float32(0.5), jnp.full(3, 0.5, jnp.float32)):
        assert (jax.grad(loss)(h, scale) == -1).all()
        assert (jax.jit(jax.grad(loss))(h, scale) == -1).all()


def test_trap_4_traced_integers_and_keys():
    @jax.jit
    def f(tree, scale):
        return gradient_reversal(tree, scale)

    tree = {"i": jnp.arange(3), "k": jax.random.key(1), "b": jnp.array(True)}
    out = f(tree, 0.5)
    assert (out["i"] == tree["i"]).all() and out["k"] == tree["k"] and out["b"]
    ints = {"i": tree["i"], "x": jnp.ones(3, jnp.float32)}
    grad = jax.grad(lambda t: jnp.sum(f(t, 0.5)["x"]), allow_int=True)(ints)
    assert grad["i"].dtype == jax.dtypes.float0 and (grad["x"] == -0.5).all()


def test_trap_4_an_unused_leaf_costs_no_backward_work():
    w = jnp.ones((4, 4), jnp.float32)

    def loss(x, reverse):
        tree = reverse({"used": x @ w, "unused": jnp.sin(x) @ w})
        return jnp.sum(tree["used"] ** 2)

    def dots(reverse):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: loss(x, reverse)))(w)
        return str(jaxpr).count("dot_general[")

    assert dots(lambda t: gradient_reversal(t, 0.5)) == dots(lambda t: t)


def test_empty_trees():
    assert gradient_reversal(None, 0.5) is None
    assert gradient_reversal({}, 0.5) == {}
    assert gradient_reversal((), ()) == ()


# 5. Per-example scales align on leading axes.


@pytest.mark.parametrize(
    "scale_shape, x_shape",
    [
        ((3,), (3, 3)),  # B == D: NumPy would scale the columns
        ((3,), (3, 4)),
        ((3, 1), (3, 4)),
        ((1, 4), (3, 4)),
        ((3, 4), (3, 4)),
        ((1,), (3, 4)),
        ((3,), (3, 2, 2, 5)),
        ((3, 2), (3, 2, 5)),
        ((3,), (3,)),
        ((), ()),
        ((0,), (0, 4)),
        ((1,), (0, 4)),
        ((3,), (3, 0)),
    ],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("forward_mode", [False, True])
def test_trap_5_alignment(scale_shape, x_shape, jit, forward_mode):
    rng = np.random.default_rng(0)
    scale = rng.normal(size=scale_shape).astype(np.float32)
    x = rng.normal(size=x_shape).astype(np.float32)

    def loss(x, scale):
        return jnp.sum(jnp.sin(gradient_reversal(x, scale, forward_mode=forward_mode)))

    grad = jax.grad(loss)
    grad = (jax.jit(grad) if jit else grad)(x, scale)
    column = scale.reshape(scale_shape + (1,) * (len(x_shape) - len(scale_shape)))
    np.testing.assert_allclose(grad, -column * np.cos(x), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_trap_5_the_residual_is_no_larger_than_the_scale(forward_mode):
    x = jnp.ones((64, 128), jnp.bfloat16)

    @jax.jit
    def residuals(x, scale):
        pull = jax.vjp(
            lambda x: gradient_reversal(x, scale, forward_mode=forward_mode), x
        )[1]
        return [leaf for leaf in jax.tree.leaves(pull)]

    for scale in (jnp.float32(0.5), jnp.ones(64, jnp.float32)):
        assert sum(leaf.nbytes for leaf in residuals(x, scale)) <= scale.nbytes + 4


@pytest.mark.parametrize(
    "scale_shape, x_shape, shown",
    [
        (
            (4,),
            (3, 4),
            r"\(4,\) for `x` of shape \(3, 4\)\. Shapes that fit: \(\), \(3,",
        ),
        ((3, 1, 1), (3, 4), r"got shape \(3, 1, 1\) for `x` of shape \(3, 4\)"),
        ((1,), (), r"got shape \(1,\) for `x` of shape \(\)\. Only a scalar fits"),
        ((2,), (0, 4), r"got shape \(2,\)"),
        ((3, 5), (3, 4), r"got shape \(3, 5\)"),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_trap_5_what_does_not_align_is_refused_at_the_call(
    scale_shape, x_shape, shown, traced
):
    x, scale = jnp.ones(x_shape), jnp.ones(scale_shape)
    call = jax.jit(gradient_reversal) if traced else gradient_reversal
    with pytest.raises(ValueError, match=r"`scale` must .*" + shown):
        call(x, scale)


# 6. The scale never receives a gradient, wherever it comes from.


@pytest.mark.parametrize("forward_mode", [False, True])
def test_trap_6_the_scale_gets_no_gradient(forward_mode):
    def loss(s, x):
        reverse = functools.partial(gradient_reversal, forward_mode=forward_mode)
        return jnp.sum(jax.vmap(lambda r: reverse(r, jnp.exp(s)) ** 2)(x)) + s

    x = jnp.ones(3, jnp.float32)
    assert jax.grad(loss)(0.5, x) == 1
    assert jax.jit(jax.grad(loss))(0.5, x) == 1
    assert jax.grad(jax.grad(loss))(0.5, x) == 0


@pytest.mark.parametrize("forward_mode", [False, True])
def test_trap_6_forward_mode_over_the_scale_alone_is_zero(forward_mode):
    @jax.jit
    def tangent(x, s):
        def f(s):
            return gradient_reversal(x, s, forward_mode=forward_mode)

        return jax.jvp(f, (s,), (jnp.ones_like(s),))[1]

    x = jnp.ones((3, 2), jnp.float32)
    assert not tangent(x, jnp.float32(2.0)).any()
    assert not tangent(x, jnp.ones(3, jnp.float32)).any()


def test_trap_6_a_scale_from_a_closure_leaks_nothing():
    def step(x, t):
        scale = jnp.tanh(t)

        def body(x, _):
            reverse = jax.checkpoint(lambda x: gradient_reversal(x, scale) ** 2)
            return x, jnp.sum(reverse(x))

        return jnp.sum(lax.scan(body, x, None, length=2)[1])

    with jax.checking_leaks():
        grad = jax.jit(jax.grad(step))(jnp.ones(3, jnp.float32), jnp.float32(1.0))
    np.testing.assert_allclose(grad, -4 * np.tanh(1.0) * np.ones(3), rtol=1e-6)


# 9. Dispatch.


def test_trap_9_eager_calls_return_x_itself():
    x = jnp.ones(3)
    assert gradient_reversal(x, 0.5) is x
    assert gradient_reversal(x, jnp.float32(0.5)) is x
    n = np.ones(3)
    assert gradient_reversal(n) is n
    assert gradient_reversal(1.5) == 1.5


def test_trap_9_one_trace_for_any_number_of_values():
    traces = []

    @jax.jit
    def grad(x, scale):
        traces.append(scale)
        return jax.grad(lambda x: jnp.sum(gradient_reversal(x, scale) ** 2))(x)

    x = jnp.ones(3, jnp.float32)
    for scale in (0.1, 0.2, 3.0):
        np.testing.assert_allclose(grad(x, scale), np.full(3, -2 * scale), rtol=1e-6)
    assert len(traces) == 1


def test_trap_9_nothing_is_left_of_the_layer_in_a_forward_program():
    def compiled(reverse, scale):
        def f(x, s):
            return jnp.sin(reverse(jnp.cos(x) @ x, s))

        lowered = jax.jit(f, keep_unused=True).lower(jnp.ones((4, 4)), scale)
        lines = lowered.compile().as_text().splitlines()
        return sum(" = " in line for line in lines)

    for scale in (jnp.float32(0.5), jnp.ones(4)):
        assert compiled(gradient_reversal, scale) == compiled(lambda x, s: x, scale)


def test_trap_9_the_rule_is_traced_once_for_each_shape(monkeypatch):
    ties = []
    tie = jaxgrl._gradient_reversal._tie
    monkeypatch.setattr(
        jaxgrl._gradient_reversal, "_tie", lambda *a: ties.append(1) or tie(*a)
    )
    for f in (jnp.sin, jnp.cos, jnp.tanh):
        jax.jit(lambda x, s, f=f: f(gradient_reversal(x, s)))(jnp.ones((7, 11)), 0.5)
    assert len(ties) == 1


def test_trap_9_only_a_traced_scale_is_tied():
    x = jnp.ones(3, jnp.float32)
    for scale in (0.5, jnp.float32(0.5)):
        jaxpr = jax.make_jaxpr(lambda x, s=scale: gradient_reversal(x, s))(x)
        assert "select_n" not in str(jaxpr)
    assert "select_n" in str(jax.make_jaxpr(gradient_reversal)(x, 0.5))


def test_trap_9_the_inner_jit_is_inlined():
    f = jax.jit(jax.grad(lambda x, s: jnp.sum(gradient_reversal(x, s) ** 2)))
    lowered = f.lower(jnp.ones(3), 0.5).as_text()
    assert "gradient_reversal" not in lowered and "call @" not in lowered


def test_trap_9_profiles_show_the_name():
    jaxpr = jax.make_jaxpr(gradient_reversal)(jnp.ones(3), 0.5)
    f = jax.jit(jax.vmap(gradient_reversal))
    text = f.lower(jnp.ones(3), jnp.ones(3)).as_text(debug_info=True)
    assert "gradient_reversal" in text or "_reverse_rule" in str(jaxpr)


# 11. 0 * inf.


def test_trap_11_a_zero_scale_does_not_stop_what_is_not_finite():
    ct = jnp.array([np.inf, np.nan, 1.0], jnp.float32)
    (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, 0.0), ct)[1](ct)
    assert np.isnan(x_ct[:2]).all() and x_ct[2] == 0


# 13, 14. The forms of a scale.


def test_trap_13_an_nnx_variable_is_a_scale():
    x = jnp.ones((2, 3), jnp.float32)

    def grad(scale, x):
        return jax.grad(lambda x: jnp.sum(gradient_reversal(x, scale)))(x)

    assert (grad(nnx.Variable(jnp.float32(0.5)), x) == -0.5).all()
    per_example = nnx.Variable(jnp.array([1.0, 2.0], jnp.float32))
    np.testing.assert_array_equal(grad(per_example, x), [[-1] * 3, [-2] * 3])

    def prefix(x):
        out = gradient_reversal(
            {"a": x, "b": [x, x]}, {"a": 0.25, "b": nnx.Variable(jnp.float32(2.0))}
        )
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

    assert (jax.grad(prefix)(x) == -4.25).all()


def test_trap_13_x_may_hold_variables():
    def loss(tree):
        return jnp.sum(gradient_reversal(tree, 0.5)["a"][...] ** 2)

    grad = jax.grad(loss)({"a": nnx.Param(jnp.ones(3, jnp.float32))})
    assert (grad["a"][...] == -1).all()


def test_trap_13_x_that_stands_for_an_array():
    class Wrapped:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    grad = jax.grad(lambda x: jnp.sum(gradient_reversal(Wrapped(x), 0.5)))
    assert (grad(jnp.ones(3, jnp.float32)) == -0.5).all()


def test_trap_14_a_prefix_gives_each_subtree_its_scale():
    def loss(tree, scale):
        return sum(
            jnp.sum(v**2) for v in jax.tree.leaves(gradient_reversal(tree, scale))
        )

    x = np.ones((2, 2), np.float32)
    tree = {"a": (x, x), "b": x}
    scale = {"a": 0.5, "b": np.array([1.0, 2.0], np.float32)}
    for grad in (jax.grad(loss), jax.jit(jax.grad(loss))):
        out = grad(tree, scale)
        assert (out["a"][0] == -1).all() and (out["a"][1] == -1).all()
        np.testing.assert_array_equal(out["b"], [[-2, -2], [-4, -4]])
    out = jax.grad(loss)(tree, {"a": (1, np.float32(2)), "b": -1.0})
    assert [float(v.mean()) for v in jax.tree.leaves(out)] == [-2, -4, 2]
    assert gradient_reversal([x, None], [0.5, None])[1] is None


def test_trap_14_any_real_number_is_a_scale():
    for scale in (fractions.Fraction(1, 2), np.float64(0.5), np.float16(0.5)):
        grad = jax.grad(lambda x, s=scale: gradient_reversal(x, s))(1.0)
        assert grad == -0.5


@pytest.mark.parametrize(
    "scale, shown",
    [
        (None, "None"),
        (1j, "1j"),
        (np.complex64(1), r"complex64\[\]"),
        (np.ones(3, np.complex64), r"complex64\[3\]"),
        ("0.5", "'0.5'"),
        (object, "<class 'object'>"),
        (jax.random.key(0), r"key<fry>\[\]"),
        (np.array(["a"]), "<U1"),
        ([0.5, 0.5, 0.5], r"PyTreeDef\(\[\*, \*, \*\]\) for `x` with PyTreeDef\(\*\)"),
        ({"a": 0.5}, "PyTreeDef"),
        ((0.5,), "an array, not a list"),
        ({}, "PyTreeDef"),
        ([1j], "1j"),
        (jax.ShapeDtypeStruct((), jnp.float32), "float32"),
    ],
    ids=repr,
)
def test_trap_14_what_is_no_scale_is_refused_by_name(scale, shown):
    with pytest.raises(TypeError, match="`scale` must be a real number.*" + shown):
        gradient_reversal(jnp.ones(3), scale)
    with pytest.raises(TypeError, match="`scale` must be a real number"):
        jax.grad(lambda x: jnp.sum(gradient_reversal(x, scale)))(jnp.ones(3))


def test_trap_14_none_is_refused_for_empty_trees_too():
    for x in (None, {}):
        with pytest.raises(TypeError, match=r"`scale` must be .*got None"):
            gradient_reversal(x, None)


def test_trap_14_a_prefix_that_is_no_prefix():
    x = {"a": jnp.ones(3), "b": jnp.ones(3)}
    for scale in ({"a": 1.0}, {"a": 1.0, "b": None}, {"a": 1.0, "c": 1.0}, [1.0, 2.0]):
        with pytest.raises(TypeError, match="pytree prefix of `x`"):
            gradient_reversal(x, scale)


# 15. A float without a sign, and a reference.


def test_trap_15_a_float_without_a_sign_is_refused():
    x = jnp.ones(3, jnp.float8_e8m0fnu)
    for call in (gradient_reversal, jax.jit(gradient_reversal)):
        with pytest.raises(TypeError, match=r"`x` must .*float8_e8m0fnu.*no sign"):
            call(x, 0.5)


def test_a_mutable_reference_is_refused():
    ref = jax.new_ref(jnp.ones(3))
    with pytest.raises(TypeError, match=r"`x` must not hold a mutable .*`x\[\.\.\.\]`"):
        gradient_reversal(ref, 0.5)


# 16. Known limits: documented, and pinned so that they cannot change unnoticed.


def test_limit_jet_gives_the_term_without_the_reversal():
    from jax.experimental import jet

    def first_term():
        def f(x):
            return jnp.sin(gradient_reversal(x, 0.5))

        return jet.jet(f, (1.0,), ((1.0, 0.0),))[1][0]

    if getattr(jax.config, "jax_custom_jvp3", False):
        with pytest.raises(KeyError):  # JAX's future rules make it an error
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
