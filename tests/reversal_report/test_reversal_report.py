"""The numbers of the report against ordinary gradients; what is printed and refused."""

import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from report_models import DOMAINS, X, dann, label_loss, make_params, of_a_tree, total

import jaxgrl
import jaxgrl.nnx
from jaxgrl import domain_loss, gradient_reversal, reversal_report

KINDS = {
    "features": "reversed",
    "classifier": "none",
    "hidden": "plain",
    "out": "plain",
}


def gradients():
    """Returns the two gradients, the second one before the reversal."""
    params, without = make_params(), dann(layer=lambda x, s: x)
    label = jax.grad(lambda p: without(p, 1.0)[0])(params)
    domain = jax.grad(lambda p: without(p, 1.0)[1])(params)
    return label, domain


def numbers(a, b):
    """Returns the norms of two gradients and the cosine of the angle between them."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (a, b))
    norms = np.linalg.norm(a), np.linalg.norm(b)
    cosine = np.dot(a, b) / (norms[0] * norms[1]) if min(norms) else np.nan
    return *norms, cosine


def test_kinds_norms_and_cosines_are_those_of_the_two_gradients():
    report = reversal_report(dann(), make_params())
    label, domain = gradients()
    for leaf in report.leaves:
        part, name = leaf.path.split(".")
        assert leaf.domain == KINDS[part]
        expected = numbers(label[part][name], domain[part][name])
        np.testing.assert_allclose(leaf[2:], expected, rtol=1e-5)
    assert len(report.leaves) == 8
    expected = numbers(label["features"], domain["features"])
    np.testing.assert_allclose(report.reversed[2:], expected, rtol=1e-5)
    assert report.reversed[:2] == ("together: 2 of 8", "reversed")
    spread = np.std(dann()(make_params(), 1.0)[2])
    np.testing.assert_allclose(report.logit_spread, spread, rtol=1e-6)


def test_the_sum_shows_what_is_reversed_and_no_more():
    report = reversal_report(total(dann()), make_params())
    label, domain = gradients()
    for leaf in report.leaves:
        part, name = leaf.path.split(".")
        if part == "features":
            expected = numbers(label[part][name], domain[part][name])
            assert leaf.domain == "reversed"
            np.testing.assert_allclose(leaf[2:], expected, rtol=1e-4)
        else:
            assert leaf.domain == "not reversed" and leaf.domain_norm == 0
    assert np.isnan(report.logit_spread)
    assert str(report).endswith("no problem found, as far as the losses alone show")


@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("form", ["triple", "sum"])
def test_the_strength_is_what_multiplies_the_scale(strength, form):
    loss = dann(layer=lambda x, s: gradient_reversal(x, strength * s))
    loss = loss if form == "triple" else total(loss)
    report = reversal_report(loss, make_params())
    np.testing.assert_allclose(report.strength, strength, rtol=1e-5)
    assert report.problems == ()
    assert [note.kind for note in report.notes] == ["strength"] * (strength != 1)


def test_the_strength_of_two_heads_lies_between_those_of_the_heads():
    def loss(params, scale):
        features = jnp.tanh(X @ params["features"])
        first = gradient_reversal(features, 0.1 * scale) @ params["first"]
        second = gradient_reversal(features, 0.3 * scale) @ params["second"]
        domain = domain_loss(first, DOMAINS) + domain_loss(second, 1 - DOMAINS)
        return jnp.mean((features[:, 0] - X[:, 0]) ** 2), domain, first

    key = jax.random.key(0)
    shapes = {"features": (5, 8), "first": (8, 1), "second": (8, 1)}
    params = {k: jax.random.normal(key, s, jnp.float32) for k, s in shapes.items()}
    report = reversal_report(loss, params)
    assert report.problems == () and [n.kind for n in report.notes] == ["strength"]

    # By the definition of the strength, with two ordinary gradients.
    part = lambda p, one, two: (  # noqa: E731
        one * domain_loss(jnp.tanh(X @ p) @ params["first"], DOMAINS)
        + two * domain_loss(jnp.tanh(X @ p) @ params["second"], 1 - DOMAINS)
    )
    through, arrived = (
        jax.grad(part)(params["features"], *weights) for weights in ((1, 1), (0.1, 0.3))
    )
    expected = jnp.sum(arrived * through) / jnp.sum(through**2)
    np.testing.assert_allclose(report.strength, expected, rtol=1e-5)


def test_a_chance_zero_is_not_taken_for_an_absent_gradient():
    params = make_params(outputs=2)
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    report = reversal_report(dann(), params)
    assert {leaf.path: leaf.domain for leaf in report.leaves} == {
        f"{part}.{name}": kind
        for part, kind in KINDS.items()
        for name in ("bias", "kernel")
    }
    gradient = jax.grad(lambda p: dann()(p, 1.0)[1])(params)
    # Zero here but for rounding, and trained all the same.
    np.testing.assert_allclose(gradient["out"]["bias"], 0, atol=1e-7)


@pytest.mark.parametrize(
    "layer, kinds",
    [
        (gradient_reversal, []),
        (lambda x, s: jax.lax.stop_gradient(x), ["detached"]),
        (lambda x, s: x, ["missing"]),
    ],
)
def test_without_logits_the_rest_is_still_judged(layer, kinds):
    loss = dann(layer=layer)
    for none in ([], jnp.zeros((0, 2), jnp.float32)):
        report = reversal_report(lambda p, s: (*loss(p, s)[:2], none), make_params())  # noqa: B023
        assert [problem.kind for problem in report.problems] == kinds
        assert report.notes == () and np.isnan(report.logit_spread)


first_alone = jax.custom_vjp(lambda x, scale: x)
first_alone.defvjp(
    lambda x, scale: (x, scale), lambda scale, ct: ([-scale * ct[0], *ct[1:]], None)
)
SEVERAL = {
    "by hand": of_a_tree,
    "optax": lambda x, s: optax.scale_gradient(x, -s),
    "jit": jax.jit(lambda x, s: gradient_reversal(x, s)),
    "each": lambda x, s: [gradient_reversal(part, s) for part in x],
    "scan": lambda x, s: jax.lax.scan(
        lambda x, _: (of_a_tree(x, s), None), x, None, length=1
    )[0],
}


def _of_several(layer, count, around=False):
    """Returns the report on features of equal shapes that pass one layer together."""
    rng = np.random.default_rng(0)
    shapes = {"features": (5, 4), "head": (4,), "label": (4,)}
    params = {
        name: [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]
        for name, shape in shapes.items()
    }

    def loss(params, scale):
        features = [jnp.tanh(X @ kernel) for kernel in params["features"]]
        seen = layer(features, scale)
        logits = sum(f @ w for f, w in zip(seen, params["head"], strict=True))
        logits += features[0][:, 0] if around else 0
        label = sum(f @ w for f, w in zip(features, params["label"], strict=True))
        return jnp.mean(label**2), domain_loss(logits, DOMAINS), logits

    return reversal_report(loss, params)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SEVERAL)
def test_a_layer_of_several_outputs_is_read_as_a_layer_of_each(name, count):
    report, each = (_of_several(SEVERAL[n], count) for n in (name, "each"))
    assert report.problems == () and report.notes == ()
    np.testing.assert_allclose(report.strength, 1, rtol=1e-5)
    assert [leaf.domain for leaf in report.leaves] == [
        *["reversed"] * count,
        *["plain"] * count,
        *["none"] * count,
    ]
    numbers = [[leaf[2:] for leaf in r.leaves] for r in (report, each)]
    np.testing.assert_allclose(*numbers, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(report.logit_spread, each.logit_spread, rtol=1e-6)


def test_mistakes_in_one_of_several_outputs_are_named():
    def kinds(layer, **options):
        return [problem.kind for problem in _of_several(layer, 2, **options).problems]

    assert kinds(lambda x, s: of_a_tree([gradient_reversal(x[0], s), x[1]], s)) == [
        "twice"
    ]
    assert kinds(of_a_tree, around=True) == ["bypassed"]
    report = _of_several(first_alone, 2)
    assert [leaf.domain for leaf in report.leaves[:2]] == ["reversed", "plain"]


def test_two_outputs_of_one_input_have_the_strength_of_one():
    both = jax.jit(lambda x, s: (gradient_reversal(x, s), gradient_reversal(x, s)))
    layer = lambda x, s: [sum(both(x[0], s))]  # noqa: E731
    report = _of_several(layer, 1)
    assert report.problems == () and report.notes == ()
    np.testing.assert_allclose(report.strength, 1, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_that_is_not_finite_is_named_though_its_gradient_is(bad, which):
    def loss(params, scale):
        terms = list(dann()(params, scale))
        terms[which] += bad
        return terms

    (problem,) = reversal_report(loss, make_params()).problems
    assert problem.kind == "not_finite"


def test_gradients_whose_squares_vanish():
    loss = dann(domain_loss=lambda z, s: 1e-25 * domain_loss(z, DOMAINS))
    report = reversal_report(loss, make_params())
    assert report.problems == () and report.notes == ()
    np.testing.assert_allclose(report.strength, 1, rtol=1e-5)
    expected = numbers(*(g["features"] for g in gradients()))
    norms = expected[0], 1e-25 * expected[1]
    np.testing.assert_allclose(report.reversed[2:], (*norms, expected[2]), rtol=1e-5)


def test_a_target_only_parameter_is_a_note():
    def encode(params, scale):
        return jnp.tanh(X @ params["features"]["kernel"])

    def layer_of(params):
        shift = jnp.where(DOMAINS[:, None] == 1, params["target"], 0)
        return lambda x, s: gradient_reversal(x + shift, s)

    def loss(params, scale):
        return dann(encode=encode, layer=layer_of(params))(params, scale)

    params = make_params() | {"target": jnp.zeros((1, 8), jnp.float32)}
    report = reversal_report(loss, params)
    assert report.problems == ()
    (note,) = report.notes
    assert note.kind == "only_reversed" and "label loss: target. Is" in note.text


def test_a_table_is_printed():
    def loss(params, scale):
        features = params["encoder"] * X[:, 0]
        logits = params["d"] * gradient_reversal(features, 0.5 * scale)
        return (params["encoder"] - 3) ** 2, domain_loss(logits, DOMAINS), logits

    params = {"encoder": jnp.float32(1), "d": jnp.float32(0.5), "steps": jnp.int32(3)}
    report = reversal_report(loss, params)
    plain, reversed_ = report.leaves
    domains = [f"{leaf.domain_norm:.3g}" for leaf in (plain, reversed_)]
    assert str(report).splitlines() == [
        "parameter         domain gradient  |label|  |domain|  cosine",
        f"d                 plain                  0  {domains[0]:>8}",
        f"encoder           reversed               4  {domains[1]:>8}  {-1:>6}",
        f"together: 1 of 2  reversed               4  {domains[1]:>8}  {-1:>6}",
        "strength of the reversal: 0.5 x scale",
        f"spread of the domain logits: {report.logit_spread:.3g}",
        f"note (strength): {report.notes[0].text}",
        "no problem found",
    ]
    assert "The strength of the reversal is 0.5 x `scale`." in report.notes[0].text


def test_names_of_parameters_change_nothing_that_is_printed():
    def loss(params, scale):
        features = params["nanodet"]["value"] * X[:, 0]
        twice = gradient_reversal(gradient_reversal(features, scale), scale)
        logits = params["head"]["key"] * twice
        return (params["nanodet"]["value"] - 3) ** 2, domain_loss(logits, DOMAINS), []

    params = {"nanodet": {"value": jnp.float32(1)}, "head": {"key": jnp.float32(0.5)}}
    report = reversal_report(loss, params)
    assert [leaf.path for leaf in report.leaves] == ["head.key", "nanodet.value"]
    (problem,) = report.problems
    assert problem.kind == "twice" and ": nanodet.value. " in problem.text
    printed = str(report).splitlines()
    assert f"problem (twice): {problem.text}" in printed
    assert not any(line.startswith("spread") for line in printed)


@pytest.mark.parametrize(
    "count, shown",
    [(3, "d0, d1, d2. "), (4, "d0, d1, d2 and 1 more. "), (7, "d2 and 4 more. ")],
)
def test_many_names_are_shortened(count, shown):
    heads = {f"d{i}": jnp.float32(1 + i) for i in range(count)}

    def loss(params, scale):
        features = params["features"] * jnp.array([1.0, 2.0, 3.0, 5.0], jnp.float32)
        product = functools.reduce(jnp.multiply, (params[name] for name in heads))
        logits = gradient_reversal(product * features / 1000, scale)  # behind
        label_loss = jnp.mean(features[:2] ** 2)
        return label_loss, domain_loss(logits, jnp.array([0, 0, 1, 1])), logits

    (problem,) = reversal_report(loss, heads | {"features": jnp.float32(1)}).problems
    assert problem.kind == "behind" and shown in problem.text


def test_logits_of_any_shape_are_looked_at():
    def loss(params, scale):
        label, domain, logits = dann()(params, scale)
        return label, domain, jnp.broadcast_to(logits[..., None, None], (48, 1, 3, 2))

    report = reversal_report(loss, make_params())
    assert report.problems == () and report.logit_spread > 0
    empty = lambda p, s: (*dann()(p, s)[:2], jnp.zeros((0, 1), jnp.float32))  # noqa: E731
    report = reversal_report(empty, make_params())
    assert report.problems == () and np.isnan(report.logit_spread)


def test_the_model_is_not_changed():
    rngs = nnx.Rngs(0)
    model = jaxgrl.nnx.DANN(
        nnx.Sequential(
            nnx.Linear(5, 8, rngs=rngs),
            nnx.BatchNorm(8, rngs=rngs),
            nnx.Dropout(0.5, rngs=rngs),
        ),
        nnx.Linear(8, 3, rngs=rngs),
        nnx.Linear(8, 1, rngs=rngs),
    )

    def loss(model, scale):
        label_logits, logits = model(X, scale)
        return label_loss(label_logits[:24]), domain_loss(logits, DOMAINS), logits

    def state():
        leaves = jax.tree.leaves(model)
        return [np.asarray(jax.random.key_data(x) if _is_key(x) else x) for x in leaves]

    before = state()
    report = reversal_report(loss, model)
    assert all(map(np.array_equal, before, state()))
    kinds = {leaf.path: leaf.domain for leaf in report.leaves}
    assert kinds["feature_extractor.layers.0.kernel"] == "reversed"
    assert kinds["feature_extractor.layers.1.mean"] == "none"
    assert kinds["domain_discriminator.kernel"] == "plain"
    assert kinds["label_classifier.kernel"] == "none"


def _is_key(value):
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def test_the_loss_is_traced_once():
    calls = []

    def loss(params, scale):
        calls.append(scale)
        return dann()(params, scale)

    reversal_report(loss, make_params())
    assert len(calls) == 1


@pytest.mark.parametrize(
    "layer",
    [
        lambda x, s: gradient_reversal(x, s) if s > 0 else x,
        lambda x, s: gradient_reversal(x, float(s)),
        lambda x, s: gradient_reversal(x, np.clip(np.asarray(s, np.float32), 0, 1)),
    ],
    ids=["if", "float", "numpy"],
)
def test_a_scale_that_cannot_be_traced_is_a_constant(layer):
    report = reversal_report(dann(layer=layer), make_params())
    assert report.problems == () and report.notes == ()
    np.testing.assert_allclose(report.strength, 1, rtol=1e-5)


SPANNING = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxgrl import domain_loss, gradient_reversal, reversal_report

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

def spread(array, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

x = np.linspace(-1, 2, 40, dtype=np.float32).reshape(8, 5)
domains = np.repeat(np.array([0, 1], np.int32), 4)
params = {"f": spread(np.cos(x[:4]).T, None, "data"), "h": np.ones((4, 1), np.float32)}

def loss(params, scale, x, domains):
    features = jnp.tanh(x @ params["f"])
    logits = gradient_reversal(features, scale) @ params["h"]
    label = jnp.mean((features[:, 0] - x[:, 0]) ** 2)
    return label, domain_loss(logits, domains), logits

report = reversal_report(loss, params, spread(x, "data"), spread(domains, "data"))
assert not params["f"].is_fully_addressable
assert report.problems == () and abs(report.strength - 1) < 1e-5
assert [leaf.domain for leaf in report.leaves] == ["reversed", "plain"]
"""


@pytest.mark.slow
def test_parameters_and_a_batch_that_span_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", SPANNING, port, str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in pair:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


def test_it_runs_where_nan_is_an_error():
    def loss(params, scale):
        label, domain, logits = dann()(params, scale)
        # Not defined a little further, where the report looks for chance zeros.
        return label + jnp.log(1.01 - params["one"]), domain, logits

    params = make_params() | {"one": jnp.float32(1)}
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    with jax.debug_nans(True), jax.debug_infs(True):
        assert reversal_report(loss, params).problems == ()


def test_it_runs_without_jit():
    params = make_params()  # whose gradients are 0 here, so that it looks nearby
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    with jax.disable_jit():
        report = reversal_report(dann(), params)
    assert report.problems == ()
    assert [kind for kind, _ in report.notes] == ["constant_output"]


def test_the_types_are_public():
    report = reversal_report(dann(layer=lambda x, s: x), make_params())
    assert type(report) is jaxgrl.ReversalReport
    assert all(type(leaf) is jaxgrl.LeafReport for leaf in report.leaves)
    assert all(type(found) is jaxgrl.Finding for found in report.problems)


ONE = jnp.float32(1)


@pytest.mark.parametrize(
    "loss, params, error, message",
    [
        (lambda p, s: (p, p), ONE, TypeError, "`loss` must return a scalar or"),
        (lambda p, s: (p, p, None), ONE, TypeError, "each an array, got "),
        (lambda p, s: {"loss": p}, ONE, TypeError, "each an array, got {'loss'"),
        (lambda p, s: 1, ONE, TypeError, "`loss` must be floating, got int"),
        (
            lambda p, s: (p, p, DOMAINS),
            ONE,
            TypeError,
            "`domain_logits` must be floating, got int",
        ),
        (
            lambda p, s: p,
            jnp.ones(2, jnp.float32),
            ValueError,
            r"`loss` must be a scalar, got shape \(2,\)",
        ),
        (
            lambda p, s: (p, jnp.ones(2, jnp.float32), p),
            ONE,
            ValueError,
            r"`domain_loss` must be a scalar, got shape \(2,\)",
        ),
        (
            lambda p, s: (jnp.ones(2, jnp.float32), p, p),
            ONE,
            ValueError,
            r"`label_loss` must be a scalar, got shape \(2,\)",
        ),
        (
            lambda p, s: p,
            {"n": 3, "x": 1.0},
            ValueError,
            "`params` must hold a float array, got 2 others",
        ),
    ],
)
def test_what_is_refused(loss, params, error, message):
    with pytest.raises(error, match=message):
        reversal_report(loss, params)


def test_logits_of_masked_rows_may_be_nan():
    inner = dann()

    def loss(params, scale):
        label, domain, logits = inner(params, scale)
        return label, domain, logits.at[-1].set(jnp.nan)

    report = reversal_report(loss, make_params())
    assert report.problems == report.notes == ()
    assert np.isnan(report.logit_spread) and report.strength == pytest.approx(1)
