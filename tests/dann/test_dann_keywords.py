"""Which module of a DANN gets which keyword, in training and in evaluation."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxgrl.linen
import jaxgrl.nnx

X = jax.random.normal(jax.random.key(0), (6, 3, 4), jnp.float32)  # 3 tokens of 4
CAUSAL = jnp.tril(jnp.ones((1, 1, 3, 3), bool))

# Which of the two outputs a module reaches.
REACHES = {
    "feature_extractor": (True, True),
    "label_classifier": (True, False),
    "domain_discriminator": (False, True),
}


# What users write: NNX's layers are told by train() and eval(), Linen's by `train`.


class NNXNorm(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


class NNXDropout(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.dense(x))


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 4, dropout_rate=0.5, decode=False, rngs=rngs
        )

    def __call__(self, x, mask=None):
        return self.attention(x, mask=mask)


class LinenNorm(nn.Module):
    def setup(self):
        self.dense, self.norm = nn.Dense(4), nn.BatchNorm(momentum=0.99)

    def __call__(self, x, train=False):
        return self.norm(self.dense(x), use_running_average=not train)


class LinenDropout(nn.Module):
    def setup(self):
        self.dense, self.dropout = nn.Dense(4), nn.Dropout(0.5)

    def __call__(self, x, train=False):
        return self.dropout(self.dense(x), deterministic=not train)


class LinenAttention(nn.Module):
    def setup(self):
        self.attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5)

    def __call__(self, x, mask=None, *, train=False):
        return self.attention(x, mask=mask, deterministic=not train)


KINDS = {
    "norm": (NNXNorm, LinenNorm),
    "dropout": (NNXDropout, LinenDropout),
    "attention": (NNXAttention, LinenAttention),
}


def networks(kind, position):
    """Returns the same network in NNX and Linen, with the variables of the latter."""
    rngs = nnx.Rngs(0)
    of_nnx = {name: nnx.Linear(4, 4, rngs=rngs) for name in REACHES}
    of_linen = {name: nn.Dense(4) for name in REACHES}
    of_nnx[position] = KINDS[kind][0](rngs)
    of_linen[position] = KINDS[kind][1]()
    model = jaxgrl.nnx.DANN(**of_nnx)
    variables = {
        "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        "batch_stats": statistics(model),
    }
    return model, jaxgrl.linen.DANN(**of_linen), variables


def statistics(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def apply(model, variables, seed=0, **kwargs):
    """Returns the outputs of a Linen model, and its statistics afterwards."""
    outputs, updates = model.apply(
        variables,
        X,
        0.5,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(seed)},
        **kwargs,
    )
    return outputs, updates["batch_stats"]


def differ(a, b):
    return tuple(bool((x != y).any()) for x, y in zip(a, b, strict=True))


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", REACHES)
def test_batch_norm_updates_its_statistics_in_training_alone(position):
    model, linen, variables = networks("norm", position)
    before = variables["batch_stats"]
    model.eval()
    outputs = model(X, 0.5)
    assert_close(statistics(model), before)
    expected, after = apply(linen, variables, train=False)
    assert_close(outputs, expected)
    assert_close(after, before)
    model.train()
    trained = model(X, 0.5)
    assert differ(trained, outputs) == REACHES[position]
    mean = statistics(model)[position]["norm"]["mean"]
    assert (mean != 0).all()
    expected, after = apply(linen, variables, train=True)
    assert_close(trained, expected)
    assert_close(after, statistics(model))


@pytest.mark.parametrize("position", REACHES)
@pytest.mark.parametrize("kind", ["dropout", "attention"])
def test_dropout_is_random_in_training_alone(kind, position):
    model, linen, variables = networks(kind, position)
    model.eval()
    outputs = model(X, 0.5)
    assert differ(outputs, model(X, 0.5)) == (False, False)
    for seed in (0, 1):
        assert_close(outputs, apply(linen, variables, seed, train=False)[0])
    model.train()
    assert differ(model(X, 0.5), model(X, 0.5)) == REACHES[position]
    random = (apply(linen, variables, seed, train=True)[0] for seed in (0, 1))
    assert differ(*random) == REACHES[position]


@pytest.mark.parametrize("position", REACHES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_mask_reaches_attention(mode, position):
    model, linen, variables = networks("attention", position)
    getattr(model, mode)()
    runs = [nnx.clone(model)(X, 0.5, **kwargs) for kwargs in ({}, {"mask": CAUSAL})]
    assert differ(*runs) == REACHES[position]
    kwargs = {"train": mode == "train"}
    expected = [
        apply(linen, variables, **kwargs, **masked)[0]
        for masked in ({}, {"mask": CAUSAL})
    ]
    assert differ(*expected) == REACHES[position]
    if mode == "eval":
        assert_close(runs, expected)


def test_the_keyword_of_a_layer_of_flax_wins_in_all_three_positions():
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(4, rngs=rngs)
    dropouts = (nnx.Dropout(0.5, rngs=rngs) for _ in range(2))
    model = jaxgrl.nnx.DANN(norm, *dropouts)
    model.train()
    sure = model(X, deterministic=True, use_running_average=True)
    assert differ(sure, model(X, deterministic=True, use_running_average=True)) == (
        False,
        False,
    )
    assert not norm.mean[...].any()
    assert differ(*(model(X) for _ in range(2))) == (True, True)
    assert norm.mean[...].all()
    # `rngs` is a keyword like any other.
    same = [model(X, rngs=nnx.Rngs(dropout=7)) for _ in range(2)]
    assert differ(*same) == (False, False)
    assert differ(same[0], model(X, rngs=nnx.Rngs(dropout=8))) == (True, True)


def test_train_and_eval_reach_into_a_sequential():
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(4, rngs=rngs)
    model = jaxgrl.nnx.DANN(
        nnx.Sequential(norm, nnx.relu),
        nnx.Sequential(nnx.Linear(4, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)),
        nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)),
    )
    model.eval()
    assert differ(model(X), model(X)) == (False, False)
    assert not norm.mean[...].any()
    model.train()
    assert differ(model(X), model(X)) == (True, True)
    assert norm.mean[...].all()


# Who gets what.


def recording(seen, name, signature):
    """Returns a function of this signature that notes the keywords it is given."""

    def module(x, **kwargs):
        seen[name] = kwargs
        return x

    module.__signature__ = signature
    return module


def f_plain(x): ...
def f_mask(x, mask=None): ...
def f_keyword_only(x, *, train): ...
def f_all(inputs, mask=None, /, *args, train=False, mode="a", **rest): ...
def f_only_keywords(*, mask=None): ...


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_each_keyword_goes_to_every_module_that_names_it(framework):
    def run(functions, **kwargs):
        seen = {}
        modules = [
            recording(seen, name, inspect.signature(function))
            for name, function in zip("flc", functions, strict=True)
        ]
        if framework == "nnx":
            jaxgrl.nnx.DANN(*modules)(X, **kwargs)
        else:
            jaxgrl.linen.DANN(*modules).apply({}, X, **kwargs)
        return [seen[name] for name in "flc"]

    train, mask = {"train": True}, {"mask": 1}
    functions = f_mask, f_plain, f_keyword_only
    assert run(functions, **train, **mask) == [mask, {}, train]
    assert run(functions) == [{}, {}, {}]  # the defaults are the modules' own
    assert run((f_all, f_keyword_only, f_all), **train) == [train, train, train]
    assert run((f_mask, f_mask, f_plain), mask=None) == [{"mask": None}] * 2 + [{}]
    assert run((f_plain, f_only_keywords, f_all), **mask, mode=2) == [
        {},
        mask,
        {"mode": 2},
    ]
    for functions, kwargs in (
        ((f_plain, f_plain, f_plain), train),
        ((f_all, f_all, f_plain), mask),  # positional only
        ((f_all, f_all, f_all), {"rest": 1}),
        ((f_all, f_plain, f_plain), {"inputs": 1}),
    ):
        with pytest.raises(TypeError, match="must be a keyword that the call"):
            run(functions, **kwargs)


def test_what_no_module_names_is_refused_before_anything_is_computed():
    def mine(x, mask=None, *, train=False):
        raise AssertionError("was called")

    sequential = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    model = jaxgrl.nnx.DANN(mine, max, lambda x, **kwargs: x)
    with pytest.raises(
        TypeError,
        match=r"`deterministic` must be a keyword that the call of a module names, "
        r"got feature_extractor\(mask, train\), label_classifier\(\), "
        r"domain_discriminator\(\)\. Write a module whose `__call__` names it: .*"
        r"Sequential.* In NNX use `model.train\(\)` and `model.eval\(\)`",
    ):
        model(X, train=True, deterministic=True)
    with pytest.raises(TypeError, match="`train` must be a keyword"):
        jaxgrl.nnx.DANN(sequential, sequential, sequential)(X, train=True)
    linen = jaxgrl.linen.DANN(nn.Sequential([nn.Dense(3)]), nn.Dense(2), nn.Dense(1))
    with pytest.raises(TypeError, match="`train` must be a keyword"):
        linen.init(jax.random.key(0), X, train=True)


def test_a_scale_is_not_passed_on_to_a_module_that_names_it():
    def discriminator(x, scale=3.0):
        return scale * x

    model = jaxgrl.nnx.DANN(lambda x: x, lambda x: x, discriminator)
    np.testing.assert_array_equal(model(X, scale=0.5).domain_logits, 3 * X)


def double(x, factor=1.0, *, twice=False):
    """What the wrapped modules below are made of."""
    return x * factor * (2 if twice else 1)


class NNXDouble(nnx.Module):
    def __call__(self, x, factor=1.0, *, twice=False):
        return double(x, factor, twice=twice)


class LinenDouble(nn.Module):
    @nn.compact
    def __call__(self, x, factor=1.0, *, twice=False):
        return double(x, factor, twice=twice)


WRAPPED = {
    "function": double,
    "partial": functools.partial(double, twice=False),
    "jax.jit": jax.jit(double, static_argnames="twice"),
    "nnx.jit": nnx.jit(double, static_argnames="twice"),
    "nnx.jit of a module": nnx.jit(NNXDouble(), static_argnames="twice"),
    "module": NNXDouble(),
    "method": NNXDouble().__call__,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_callable_names_what_it_wraps(name):
    model = jaxgrl.nnx.DANN(lambda x: x, WRAPPED[name], lambda x: x)
    outputs = model(X, factor=jnp.float32(3), twice=True)
    np.testing.assert_allclose(outputs.label_logits, 6 * X, rtol=1e-6)
    np.testing.assert_array_equal(outputs.domain_logits, X)


LIFTED = {
    "module": LinenDouble(),
    "nn.jit": nn.jit(LinenDouble, static_argnames="twice")(),
    "nn.remat": nn.remat(LinenDouble)(),
}


@pytest.mark.parametrize("name", LIFTED)
def test_a_lifted_module_names_what_it_lifts(name):
    model = jaxgrl.linen.DANN(lambda x: x, lambda x: x, LIFTED[name])
    # nn.remat traces every keyword, so that no static one reaches the module.
    kwargs = {} if name == "nn.remat" else {"twice": True}
    outputs = model.apply({}, X, factor=jnp.float32(3), **kwargs)
    expected = 3 * (2 if kwargs else 1) * X
    np.testing.assert_allclose(outputs.domain_logits, expected, rtol=1e-6)


def test_masks_are_traced_and_bools_are_static_under_jit():
    model, linen, variables = networks("attention", "feature_extractor")
    model.eval()
    expected = model(X, 0.5, mask=CAUSAL)

    @nnx.jit
    def of_nnx(model, mask):
        return model(X, 0.5, mask=mask)

    assert_close(of_nnx(model, CAUSAL), expected)

    @functools.partial(jax.jit, static_argnames="train")
    def of_linen(mask, train):
        return apply(linen, variables, mask=mask, train=train)[0]

    assert_close(of_linen(CAUSAL, train=False), expected)
    lifted = nn.jit(jaxgrl.linen.DANN, static_argnames="train")(
        LinenAttention(), nn.Dense(4), nn.Dense(4)
    )
    assert_close(apply(lifted, variables, mask=CAUSAL, train=False)[0], expected)
    random = (apply(lifted, variables, seed, train=True)[0] for seed in (0, 1))
    assert differ(*random) == (True, True)
