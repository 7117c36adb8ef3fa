"""The layer in Flax NNX and Linen: same behaviour, under each API's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import linen, nnx
from flax.nnx import bridge

import jaxgrl.linen
import jaxgrl.nnx

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)


class NNXModel(nnx.Module):
    def __init__(self, scale, rngs):
        self.features = nnx.Linear(2, 4, rngs=rngs)
        self.reversal = jaxgrl.nnx.GradientReversal(scale)
        self.discriminator = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x, scale=None):
        return self.discriminator(self.reversal(jnp.tanh(self.features(x)), scale))


class LinenModel(linen.Module):
    scale: float = 1.0

    @linen.compact
    def __call__(self, x, scale=None):
        h = jnp.tanh(linen.Dense(4)(x))
        return linen.Dense(1)(jaxgrl.linen.GradientReversal(self.scale)(h, scale))


def _loss(model, x, scale=None):
    return jnp.sum(jnp.sin(model(x, scale)))


def assert_reversed(grads, plain, scale):
    """The features get -scale times the plain gradient, the discriminator the plain."""
    for layer, factor in (("features", -scale), ("discriminator", 1.0)):
        for a, b in zip(
            jax.tree.leaves(grads[layer]), jax.tree.leaves(plain[layer]), strict=True
        ):
            np.testing.assert_allclose(a, factor * b, rtol=1e-5, atol=1e-7)
            assert np.abs(a).max() > 1e-3


@pytest.fixture
def plain():
    """The gradient without reversal: the law with scale -1."""
    model = NNXModel(-1.0, nnx.Rngs(0))
    return nnx.grad(_loss)(model, X)


def _variable(value):
    return nnx.Variable(jnp.array(value, jnp.float32))


@pytest.mark.parametrize(
    "constructor, call, effective",
    [
        (0.5, None, 0.5),
        (0.5, 2.0, 2.0),
        (0.5, jnp.float32(2.0), 2.0),
        (_variable(0.5), None, 0.5),
        (_variable(0.5), 0.0, 0.0),
        (jnp.array(0.5, jnp.float32), None, 0.5),
    ],
    ids=["constructor", "call", "traced call", "variable", "zero call", "array"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "nnx.jit"])
def test_nnx_constructor_and_call(plain, constructor, call, effective, jit):
    model = NNXModel(constructor, nnx.Rngs(0))
    grad = nnx.grad(_loss, argnums=nnx.DiffState(0, nnx.Param))
    grads = (nnx.jit(grad) if jit else grad)(model, X, call)
    if effective:
        assert_reversed(grads, plain, effective)
    else:
        assert not any(g.any() for g in jax.tree.leaves(grads["features"]))


def test_nnx_layer_has_no_state():
    layer = jaxgrl.nnx.GradientReversal(0.5)
    assert not jax.tree.leaves(nnx.state(layer))
    assert jax.tree.leaves(nnx.split(layer)[1]) == []


def test_nnx_float_is_static_and_variable_is_data():
    traces = []

    @nnx.jit
    def grad(layer, x):
        traces.append(1)
        return nnx.grad(lambda x: jnp.sum(layer(x)))(x)

    for value in (0.1, 0.2, 0.3):
        assert (grad(jaxgrl.nnx.GradientReversal(value), X) == np.float32(-value)).all()
    assert len(traces) == 3

    traces.clear()
    layer = jaxgrl.nnx.GradientReversal(_variable(0.1))
    for value in (0.1, 0.2, 0.3):
        layer.scale[...] = jnp.array(value, jnp.float32)
        assert (grad(layer, X) == np.float32(-value)).all()
    assert len(traces) == 1


def test_nnx_variable_survives_a_checkpoint_and_gets_no_gradient(tmp_path):
    model = NNXModel(_variable(0.25), nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", state)
    other = NNXModel(_variable(1.0), nnx.Rngs(1))
    target = nnx.state(other)
    nnx.replace_by_pure_dict(target, restored)
    nnx.update(other, target)
    assert other.reversal.scale[...] == 0.25
    np.testing.assert_array_equal(other(X), model(X))
    grads = nnx.grad(_loss, argnums=nnx.DiffState(0, nnx.Variable))(other, X)
    assert grads["reversal"]["scale"][...] == 0


NNX_TRANSFORMATIONS = {
    "none": lambda m, x, s: m(x, s),
    "nnx.jit": nnx.jit(lambda m, x, s: m(x, s)),
    "nnx.remat": nnx.remat(lambda m, x, s: m(x, s)),
    "nnx.vmap": nnx.vmap(lambda m, x, s: m(x, s), in_axes=(None, 0, None)),
    "nnx.vmap over scale": lambda m, x, s: nnx.vmap(
        lambda m, x, s: m(x, s), in_axes=(None, None, 0)
    )(m, x, jnp.stack([s] * 3)).mean(0),
    "nnx.scan": lambda m, x, s: nnx.scan(
        lambda m, row, s: m(row, s), in_axes=(None, 0, None), out_axes=0
    )(m, x, s),
    "split and merge": lambda m, x, s: nnx.merge(*nnx.split(m))(x, s),
    "clone": lambda m, x, s: nnx.clone(m)(x, s),
    "ToLinen": lambda m, x, s: m.discriminator(
        bridge.ToLinen(jaxgrl.nnx.GradientReversal, skip_rng=True).apply(
            {}, jnp.tanh(m.features(x)), s
        )
    ),
    "ToNNX": lambda m, x, s: m.discriminator(
        bridge.ToNNX(jaxgrl.linen.GradientReversal(), rngs=nnx.Rngs(0))(
            jnp.tanh(m.features(x)), s
        )
    ),
}


@pytest.mark.parametrize("name", NNX_TRANSFORMATIONS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "nnx.jit"])
def test_nnx_transformations(plain, name, jit):
    run = NNX_TRANSFORMATIONS[name]

    def grad(model, x, scale):
        return nnx.grad(lambda m: jnp.sum(jnp.sin(run(m, x, scale))))(model)

    model = NNXModel(1.0, nnx.Rngs(0))
    grads = (nnx.jit(grad) if jit else grad)(model, X, jnp.float32(0.7))
    assert_reversed(grads, plain, 0.7)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nnx_evaluation_changes_nothing(plain, mode):
    model = NNXModel(0.5, nnx.Rngs(0))
    before = model(X)
    getattr(model, mode)()
    np.testing.assert_array_equal(model(X), before)
    assert_reversed(nnx.grad(_loss)(model, X), plain, 0.5)


def test_nnx_sequential_and_optimizer():
    model = nnx.Sequential(
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        jaxgrl.nnx.GradientReversal(0.5),
        nnx.Linear(2, 1, rngs=nnx.Rngs(1)),
    )
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    kernels = [model.layers[i].kernel[...] for i in (0, 2)]

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.sum(m(x)))(model)
        optimizer.update(model, grads)
        return grads

    grads = step(model, optimizer, jnp.ones((1, 2), jnp.float32))
    # The discriminator goes down its gradient and the features go up theirs.
    assert (
        jnp.sign(grads["layers"][0]["kernel"][...]) == -jnp.sign(kernels[1].T)
    ).all()
    assert (model.layers[0].kernel[...] != kernels[0]).all()


@pytest.mark.parametrize("call", [None, 2.0, jnp.float32(2.0)], ids=str)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_linen_constructor_and_call(call, jit):
    def loss(scale):
        model = LinenModel(scale)
        params = model.init(jax.random.key(0), X)

        def grad(params, x, call):
            return jax.grad(lambda p: _loss(lambda *a: model.apply(p, *a), x, call))(
                params
            )

        return (jax.jit(grad) if jit else grad)(params, X, call if scale > 0 else None)

    def named(grads):
        grads = grads["params"]
        return {"features": grads["Dense_0"], "discriminator": grads["Dense_1"]}

    assert_reversed(named(loss(0.5)), named(loss(-1.0)), 0.5 if call is None else 2.0)


def _apply(transform):
    def run(x, scale):
        class Model(linen.Module):
            @linen.compact
            def __call__(self, x, scale):
                return transform(jaxgrl.linen.GradientReversal)()(x, scale)

        return Model().apply({}, x, scale)

    return run


class _Rows(linen.Module):
    """Scans and maps the layer over the rows of x."""

    lift: str

    @linen.compact
    def __call__(self, x, scale):
        axes = {"variable_axes": {}, "split_rngs": {}, "in_axes": (0, linen.broadcast)}
        if self.lift == "vmap":
            axes["in_axes"] = (0, None)
            return linen.vmap(jaxgrl.linen.GradientReversal, **axes)()(x, scale)

        def body(layer, carry, row, scale):
            return carry, layer(row, scale)

        layer = jaxgrl.linen.GradientReversal()
        return linen.scan(body, **axes)(layer, None, x, scale)[1]


LINEN_TRANSFORMATIONS = {
    "apply": lambda x, s: jaxgrl.linen.GradientReversal().apply({}, x, s),
    "nn.jit": _apply(linen.jit),
    "nn.remat": _apply(linen.remat),
    "nn.vmap": lambda x, s: _Rows("vmap").apply({}, x, s),
    "nn.scan": lambda x, s: _Rows("scan").apply({}, x, s),
    "Sequential": lambda x, s: linen.Sequential(
        [jaxgrl.linen.GradientReversal(), jnp.sin]
    ).apply({}, x, s),
    "bind": lambda x, s: jaxgrl.linen.GradientReversal().bind({})(x, s),
}


@pytest.mark.parametrize("name", LINEN_TRANSFORMATIONS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_linen_transformations(name, jit):
    run = LINEN_TRANSFORMATIONS[name]
    slope = np.cos(X) if name == "Sequential" else np.ones_like(X)
    grad = jax.grad(lambda x, s: jnp.sum(run(x, s)))
    grad = (jax.jit(grad) if jit else grad)(X, jnp.float32(0.7))
    np.testing.assert_allclose(grad, -0.7 * slope, rtol=1e-6)


class _Lifted(linen.Module):
    """Takes the gradient with respect to x inside the module, by nn.vjp."""

    @linen.compact
    def __call__(self, x, scale):
        layer = jaxgrl.linen.GradientReversal()
        y, pull = linen.vjp(lambda layer, x: jnp.sin(layer(x, scale)), layer, x)
        return pull(jnp.ones_like(y))[1]


def test_linen_lifted_vjp():
    grad = _Lifted().apply({}, X, jnp.float32(0.7))
    np.testing.assert_allclose(grad, -0.7 * np.cos(X), rtol=1e-6)


def test_linen_layer_has_no_variables_and_needs_no_rngs():
    assert jaxgrl.linen.GradientReversal().init({}, X) == {}


def test_nnx_and_linen_agree_bit_for_bit():
    def grad(reverse):
        return jax.grad(lambda x: jnp.sum(jnp.sin(reverse(x) * 3)))(X)

    for scale in (0.3, 2.0, 0.0, -1.0):
        nnx_grad = grad(jaxgrl.nnx.GradientReversal(scale))
        layer = jaxgrl.linen.GradientReversal(scale)
        np.testing.assert_array_equal(nnx_grad, grad(lambda x, m=layer: m.apply({}, x)))


@pytest.mark.parametrize("layer", ["nnx", "linen"])
def test_a_bad_scale_is_refused_by_name(layer):
    module = {"nnx": jaxgrl.nnx, "linen": jaxgrl.linen}[layer].GradientReversal("0.5")
    call = module if layer == "nnx" else (lambda x: module.apply({}, x))
    with pytest.raises(TypeError, match=r"`scale` must be .*'0.5'"):
        call(X)


LAYERS = {
    "nnx": jaxgrl.nnx.GradientReversal,
    "linen": lambda *args, **kwargs: functools.partial(
        jaxgrl.linen.GradientReversal(*args, **kwargs).apply, {}
    ),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_without_a_scale_the_gradient_is_reversed_at_strength_one(make):
    assert jax.grad(make())(1.0) == -1
    assert jax.grad(make(0.5))(1.0) == -0.5


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_forward_mode_on_request(make, jit):
    def tangent(layer, *call):
        def jvp(x):
            return jax.jvp(lambda x: layer(x, *call), (x,), (2 * x,))[1]

        return (jax.jit(jvp) if jit else jvp)(jnp.asarray(X))

    np.testing.assert_array_equal(tangent(make(0.5, forward_mode=True)), -X)
    np.testing.assert_array_equal(tangent(make(forward_mode=True), 1.5), -3 * X)
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        tangent(make(0.5))
    with pytest.raises(TypeError, match="positional"):
        make(0.5, True)


def test_forward_mode_is_kept_by_a_split_and_a_clone():
    layer = jaxgrl.nnx.GradientReversal(0.5, forward_mode=True)
    for other in (nnx.merge(*nnx.split(layer)), nnx.clone(layer)):
        assert jax.jacfwd(other)(1.0) == -0.5
    other = jaxgrl.linen.GradientReversal(0.5, forward_mode=True).clone()
    assert jax.jacfwd(lambda x: other.apply({}, x))(1.0) == -0.5


def test_a_network_takes_another_layer_in_nnx():
    model = jaxgrl.nnx.DANN(jnp.sin, jnp.cos, jnp.sin)
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jacfwd(lambda x: model(x).domain_logits)(1.0)
    model.gradient_reversal = jaxgrl.nnx.GradientReversal(forward_mode=True)
    found = jax.jacfwd(lambda x: model(x).domain_logits)(1.0)
    np.testing.assert_allclose(found, -np.cos(np.sin(1.0)) * np.cos(1.0), rtol=1e-6)
