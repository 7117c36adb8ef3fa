"""The forms of a scale: numbers, arrays, one for each example, prefixes, variables."""

import fractions
import functools
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxgrl import gradient_reversal

# Per-example scales align on leading axes.


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
def test_alignment(scale_shape, x_shape, jit, forward_mode):
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
def test_the_residual_is_no_larger_than_the_scale(forward_mode):
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
            r"\(4,\) for `x` of shape \(3, 4\)\. Shapes that fit: \(\), \(3,\), "
            r"\(3, 1\), \(3, 4\)\.(\n|$)",
        ),
        (
            (4,),
            (3, 4, 5),
            r"Shapes that fit: \(\), \(3,\), \(3, 1, 1\), \(3, 4, 5\)\.(\n|$)",
        ),
        ((3, 1, 1), (3, 4), r"got shape \(3, 1, 1\) for `x` of shape \(3, 4\)"),
        ((1,), (), r"got shape \(1,\) for `x` of shape \(\)\. Only a scalar fits"),
        ((2,), (0, 4), r"got shape \(2,\)"),
        ((3, 5), (3, 4), r"got shape \(3, 5\)"),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_what_does_not_align_is_refused_at_the_call(
    scale_shape, x_shape, shown, traced
):
    x, scale = jnp.ones(x_shape), jnp.ones(scale_shape)
    call = jax.jit(gradient_reversal) if traced else gradient_reversal
    with pytest.raises(ValueError, match=r"`scale` must .*" + shown):
        call(x, scale)


# 13, 14. The forms of a scale.


def test_an_nnx_variable_is_a_scale():
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


def test_x_may_hold_variables():
    def loss(tree):
        return jnp.sum(gradient_reversal(tree, 0.5)["a"][...] ** 2)

    grad = jax.grad(loss)({"a": nnx.Param(jnp.ones(3, jnp.float32))})
    assert (grad["a"][...] == -1).all()


def test_x_that_stands_for_an_array():
    class Wrapped:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    grad = jax.grad(lambda x: jnp.sum(gradient_reversal(Wrapped(x), 0.5)))
    assert (grad(jnp.ones(3, jnp.float32)) == -0.5).all()


def test_a_prefix_gives_each_subtree_its_scale():
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


def test_any_real_number_is_a_scale():
    for scale in (fractions.Fraction(1, 2), np.float64(0.5), np.float16(0.5)):
        grad = jax.grad(lambda x, s=scale: gradient_reversal(x, s))(1.0)
        assert grad == -0.5


@pytest.mark.parametrize("dtype", ["int32", "bool", "float16", "float32", "uint8"])
def test_trap_14_a_numpy_array_without_axes_outlives_jit(dtype):
    # JAX 0.7.2 keeps it in the program as a literal, which has no operators.
    scale = np.ones((), dtype)
    f = jax.jit(lambda x: jnp.sum(gradient_reversal(x, scale) ** 2))
    assert (jax.grad(f)(jnp.ones(3, jnp.float32)) == -2).all()
    assert jax.grad(jax.grad(lambda x: f(x[None])))(jnp.float32(1)) == 2


BEYOND_FLOATS = {
    "int": 10**400,
    "negative": -(10**400),
    "too long to be printed": 10**5000,
    "Fraction": fractions.Fraction(10**400),
    "longdouble": np.longdouble("1e400"),
    "prefix": [10**400],
}


@pytest.mark.parametrize("scale", BEYOND_FLOATS.values(), ids=BEYOND_FLOATS)
def test_a_number_beyond_all_floats_is_refused_by_name(scale):
    x = [jnp.ones(3)]
    for call in (gradient_reversal, jax.jit(lambda x, s: gradient_reversal(x, scale))):
        with pytest.raises(ValueError, match="`scale` must fit into a float"):
            call(x, scale if call is gradient_reversal else 0)


def test_infinity_is_a_float():
    for scale in (math.inf, np.longdouble("inf"), jnp.inf):
        assert jax.grad(lambda x, s=scale: gradient_reversal(x, s))(1.0) == -math.inf


def test_shapes_are_read_without_jnp_shape(monkeypatch):
    # An exporter patches it to return an array, whose truth value is another matter.
    monkeypatch.setattr(jnp, "shape", lambda x: np.array(np.shape(x)))
    x, scale = np.ones((2, 3), np.float32), np.array([0.5, 2], np.float32)
    for s, per_row in ((scale, scale), (np.float32(0.5), [0.5, 0.5])):
        grad = jax.grad(lambda x, s=s: gradient_reversal(x, s).sum())(x)
        np.testing.assert_array_equal(grad, -np.outer(per_row, [1, 1, 1]))
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        gradient_reversal(x, np.ones(4, np.float32))


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
        (jax.new_ref(jnp.array(0.5, jnp.float32)), "Ref"),
    ],
    ids=repr,
)
def test_what_is_no_scale_is_refused_by_name(scale, shown):
    with pytest.raises(TypeError, match="`scale` must be a real number.*" + shown):
        gradient_reversal(jnp.ones(3), scale)
    with pytest.raises(TypeError, match="`scale` must be a real number"):
        jax.grad(lambda x: jnp.sum(gradient_reversal(x, scale)))(jnp.ones(3))


def test_a_traced_reference_is_no_scale():
    @jax.jit
    def f(x):
        return gradient_reversal(x, jax.new_ref(jnp.array(0.5, jnp.float32)))

    # On JAX 0.7.2 a traced reference does not show that it is one; JAX says it then.
    refused = "`scale` must be a real number|forget to unpack .* the ref"
    with pytest.raises((TypeError, ValueError), match=refused):
        f(jnp.ones(3))


def test_none_is_refused_for_empty_trees_too():
    for x in (None, {}):
        with pytest.raises(TypeError, match=r"`scale` must be .*got None"):
            gradient_reversal(x, None)


def test_a_prefix_that_is_no_prefix():
    x = {"a": jnp.ones(3), "b": jnp.ones(3)}
    for scale in ({"a": 1.0}, {"a": 1.0, "b": None}, {"a": 1.0, "c": 1.0}, [1.0, 2.0]):
        with pytest.raises(TypeError, match="pytree prefix of `x`"):
            gradient_reversal(x, scale)


def test_without_a_scale_the_gradient_is_reversed_at_strength_one():
    assert jax.grad(gradient_reversal)(1.0) == -1
    assert jax.grad(jax.jit(gradient_reversal))(1.0) == -1


# The scale never receives a gradient, wherever it comes from.


@pytest.mark.parametrize("forward_mode", [False, True])
def test_the_scale_gets_no_gradient(forward_mode):
    def loss(s, x):
        reverse = functools.partial(gradient_reversal, forward_mode=forward_mode)
        return jnp.sum(jax.vmap(lambda r: reverse(r, jnp.exp(s)) ** 2)(x)) + s

    x = jnp.ones(3, jnp.float32)
    assert jax.grad(loss)(0.5, x) == 1
    assert jax.jit(jax.grad(loss))(0.5, x) == 1
    assert jax.grad(jax.grad(loss))(0.5, x) == 0


@pytest.mark.parametrize("forward_mode", [False, True])
def test_forward_mode_over_the_scale_alone_is_zero(forward_mode):
    @jax.jit
    def tangent(x, s):
        def f(s):
            return gradient_reversal(x, s, forward_mode=forward_mode)

        return jax.jvp(f, (s,), (jnp.ones_like(s),))[1]

    x = jnp.ones((3, 2), jnp.float32)
    assert not tangent(x, jnp.float32(2.0)).any()
    assert not tangent(x, jnp.ones(3, jnp.float32)).any()


@pytest.mark.slow
def test_a_scale_from_a_closure_leaks_nothing():
    def step(x, t):
        scale = jnp.tanh(t)

        def body(x, _):
            reverse = jax.checkpoint(lambda x: gradient_reversal(x, scale) ** 2)
            return x, jnp.sum(reverse(x))

        return jnp.sum(lax.scan(body, x, None, length=2)[1])

    gc.freeze()  # the check collects garbage, and what is older is none
    try:
        with jax.checking_leaks():
            grad = jax.jit(jax.grad(step))(jnp.ones(3, jnp.float32), jnp.float32(1.0))
    finally:
        gc.unfreeze()
    np.testing.assert_allclose(grad, -4 * np.tanh(1.0) * np.ones(3), rtol=1e-6)
