"""The ways in which a gradient reversal that looks right is wrong, a test for each."""

import functools
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from spellings import SPELLINGS

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
    assert float((jax.jit(grad) if jit else grad)(1.0)) == -2 * S.sum()
    assert float(jax.hessian(loss)(1.0)) == 2 * (S**2).sum()


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


# 8. Forward mode raises JAX's error, which shows a line of ours that says what to pass.


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
def test_trap_8_forward_mode_raises_and_shows_the_option(way, spelling):
    # A shape of its own: JAX keeps the trace of the first call for each shape.
    x = jnp.ones(3 + list(FORWARD).index(way), jnp.float32)
    reverse = SPELLINGS[spelling]
    with pytest.raises(TypeError) as info:
        FORWARD[way](lambda x: jnp.sin(reverse(x, 0.5)), x)
    assert "forward_mode=True" in "".join(traceback.format_exception(info.value))
    # Who searches for JAX's message finds the option, too.
    documented = " ".join(gradient_reversal.__doc__.split())
    assert str(info.value) in documented


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
    f = jax.jit(jax.grad(lambda x, s: jnp.sum(jnp.sin(gradient_reversal(x, s)))))
    compiled = f.lower(jnp.ones(3), 0.5).compile().as_text()
    assert re.search(r'op_name="[^"]*\bgradient_reversal\b[^"]*/mul"', compiled)


# 11. 0 * inf.


def test_trap_11_a_zero_scale_does_not_stop_what_is_not_finite():
    ct = jnp.array([np.inf, np.nan, 1.0], jnp.float32)
    (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, 0.0), ct)[1](ct)
    assert np.isnan(x_ct[:2]).all() and x_ct[2] == 0


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
