"""Leaves that are not floating, and trees without a leaf."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrl import gradient_reversal


def test_other_leaves_pass_through_untouched():
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


def test_traced_integers_and_keys():
    @jax.jit
    def f(tree, scale):
        return gradient_reversal(tree, scale)

    tree = {"i": jnp.arange(3), "k": jax.random.key(1), "b": jnp.array(True)}
    out = f(tree, 0.5)
    assert (out["i"] == tree["i"]).all() and out["k"] == tree["k"] and out["b"]
    ints = {"i": tree["i"], "x": jnp.ones(3, jnp.float32)}
    grad = jax.grad(lambda t: jnp.sum(f(t, 0.5)["x"]), allow_int=True)(ints)
    assert grad["i"].dtype == jax.dtypes.float0 and (grad["x"] == -0.5).all()


def test_an_unused_leaf_costs_no_backward_work():
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
