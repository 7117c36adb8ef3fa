"""Calls of the public API that a type checker must accept, and others it must refuse.

``test_typing.py`` checks this file with pyright and runs every call. A call in
``INCORRECT`` that pyright accepts makes its comment unnecessary, which is an error too.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax.typing import ArrayLike

import jaxgrl
import jaxgrl.linen
import jaxgrl.nnx
from jaxgrl import (
    dann_learning_rate,
    dann_schedule,
    domain_accuracy,
    domain_loss,
    domain_weights,
    entropy_weights,
    gradient_reversal,
    information_maximization,
    multilinear_map,
    proxy_a_distance,
    reversal_report,
)

X = jnp.ones((4, 3), jnp.float32)
DOMAINS = jnp.array([0, 0, 1, 1])


class StandsForAnArray:
    def __jax_array__(self) -> jax.Array:
        return jnp.ones(())


def reverse_by(scale: jaxgrl.ScaleLike, per_device: ArrayLike) -> jax.Array:
    """A function of a user that passes scales on, in both ways to annotate them."""
    return gradient_reversal(gradient_reversal(X, scale), per_device)


def scales() -> None:
    assert_type(gradient_reversal(X), jax.Array)
    assert_type(gradient_reversal(1.5, forward_mode=True), float)
    assert_type(gradient_reversal({"a": [X]}, 0.5), dict[str, list[jax.Array]])
    assert_type(gradient_reversal((X, X), 1), tuple[jax.Array, jax.Array])
    for number in (0.5, 1, True, np.float32(0.5), np.float64(0.5), np.bool_(True)):
        gradient_reversal(X, number)
    for array in (X, X[:, 0], np.ones(4), np.ones((4, 1), np.float16), jnp.float32(1)):
        reverse_by(array, array)
    for wrapped in (StandsForAnArray(), nnx.Variable(jnp.ones(())), nnx.Param(X)):
        gradient_reversal(X, wrapped)
    # Prefixes, also those with None where x has none, and of a class of their own.
    gradient_reversal({"a": X, "b": (X, X)}, {"a": 0.5, "b": (X[:, 0], 1)})
    gradient_reversal([X, None], [0.5, None])
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert_type(gradient_reversal(state, jax.tree.map(jnp.sum, state)), nnx.State)
    listed: list[float] = [0.5]
    by_name: dict[str, np.ndarray] = {"a": np.ones(4)}
    gradient_reversal([X], listed)
    gradient_reversal({"a": X}, by_name)
    # What any schedule returns.
    gradient_reversal(X, dann_schedule(100)(3))
    gradient_reversal(X, optax.linear_schedule(0.0, 1.0, 100)(3))


def layers() -> None:
    layer = jaxgrl.nnx.GradientReversal(0.5, forward_mode=True)
    assert_type(layer(X), jax.Array)
    assert_type(layer([X], [X[:, 0]]), list[jax.Array])
    layer(X, None)
    jaxgrl.nnx.GradientReversal(nnx.Variable(jnp.ones(())))(X, scale=X)
    jaxgrl.linen.GradientReversal(scale=0.5, forward_mode=True).apply({}, X, None)
    rngs = nnx.Rngs(0)
    trunk, labels = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
    model = jaxgrl.nnx.DANN(trunk, labels, nnx.Linear(3, 1, rngs=rngs))
    label_logits, domain_logits = model(X, dann_schedule(9)(3))
    assert label_logits.shape == (4, 2) and domain_logits.shape == (4, 1)
    assert_type(model(X, None), jaxgrl.DANNOutput)
    domains = nnx.Linear(6, 1, rngs=rngs)
    cdan = jaxgrl.nnx.DANN(
        trunk, labels, domains, condition=multilinear_map, activation=jax.nn.sigmoid
    )
    assert_type(cdan(X), jaxgrl.DANNOutput)
    linen_model = jaxgrl.linen.DANN(nn.Dense(3), nn.Dense(2), nn.Dense(1))
    linen_model.init(jax.random.key(0), X, dann_schedule(9)(3))


def schedules() -> None:
    assert_type(dann_schedule(100), optax.Schedule)
    assert_type(dann_learning_rate(0.1, transition_steps=100), optax.Schedule)
    dann_schedule(100, init_value=jnp.float32(0), end_value=np.float32(2), gamma=5)
    optax.sgd(dann_learning_rate(jnp.float32(0.1), transition_steps=100, alpha=1))
    optax.join_schedules([dann_schedule(9, transition_begin=2)], [])


def measures() -> None:
    logits = jnp.ones(4)
    assert_type(domain_loss(logits, DOMAINS), jax.Array)
    assert_type(domain_loss(logits, DOMAINS, where=DOMAINS < 1), jax.Array)
    assert_type(domain_accuracy(np.ones(4), DOMAINS), jax.Array)
    weights = domain_weights(DOMAINS, num_domains=3, where=DOMAINS < 1)
    assert_type(weights, jax.Array)
    domain_loss(
        jnp.ones((4, 2, 3)), DOMAINS[:, None], num_domains=3, weights=weights[:, None]
    )
    jax.vmap(lambda x, d: domain_loss(x, d, axis_name="i"), axis_name="i")(
        X.T, np.eye(3, 4, dtype=int)
    )
    assert_type(entropy_weights(X, DOMAINS, activation=jax.nn.sigmoid), jax.Array)
    assert_type(multilinear_map(X, X), jax.Array)
    infomax = information_maximization(X, where=DOMAINS < 1, activation=jax.nn.sigmoid)
    assert_type(infomax, jax.Array)
    found = proxy_a_distance(X, 5 + np.ones((4, 3)), folds=2, seed=1)
    assert_type(found, jaxgrl.ProxyADistance)
    assert_type(found.distance, float)
    distance, standard_error = found
    assert_type((distance, standard_error), tuple[float, float])


def reports() -> None:
    def loss(w: jax.Array, scale: ArrayLike, x: jax.Array) -> jax.Array:
        features = x @ w
        reversed_features = gradient_reversal(features, scale)
        return jnp.sum(features**2) + domain_loss(reversed_features, DOMAINS)

    report = reversal_report(loss, X[0], X)
    assert_type(report, jaxgrl.ReversalReport)
    assert_type(report.leaves, tuple[jaxgrl.LeafReport, ...])
    assert_type(report.problems, tuple[jaxgrl.Finding, ...])
    assert_type([note.kind for note in report.notes], list[str])
    assert_type(report.strength, float)


CORRECT: list[Callable[[], None]] = [scales, layers, schedules, measures, reports]


INCORRECT: list[Callable[[], Any]] = [
    lambda: gradient_reversal(X, None),  # pyright: ignore[reportArgumentType]
    lambda: gradient_reversal(X, "0.5"),  # pyright: ignore[reportArgumentType]
    lambda: gradient_reversal(X, b"0.5"),  # pyright: ignore[reportArgumentType]
    lambda: gradient_reversal(X, object()),  # pyright: ignore[reportArgumentType]
    lambda: gradient_reversal(X, {0.5}),  # pyright: ignore[reportArgumentType]
    lambda: gradient_reversal(X, range(4)),  # pyright: ignore[reportArgumentType]
    lambda: gradient_reversal(X, jnp.float32),  # pyright: ignore[reportArgumentType]
    lambda: gradient_reversal(X, dann_schedule(9)),  # pyright: ignore[reportArgumentType]
    lambda: gradient_reversal(X, 0.5, True),  # pyright: ignore[reportCallIssue]
    lambda: gradient_reversal(X, lam=0.5),  # pyright: ignore[reportCallIssue]
    lambda: gradient_reversal(),  # pyright: ignore[reportCallIssue]
    lambda: reverse_by("0.5", 1),  # pyright: ignore[reportArgumentType]
    lambda: jaxgrl.nnx.GradientReversal("0.5")(X),  # pyright: ignore[reportArgumentType]
    lambda: jaxgrl.nnx.GradientReversal(0.5)(X, "0.5"),  # pyright: ignore[reportArgumentType]
    lambda: jaxgrl.nnx.GradientReversal(0.5, True),  # pyright: ignore[reportCallIssue]
    lambda: jaxgrl.nnx.DANN(nnx.relu, nnx.relu),  # pyright: ignore[reportCallIssue]
    lambda: jaxgrl.nnx.DANN(nnx.relu, nnx.relu, nnx.relu, multilinear_map),  # pyright: ignore[reportCallIssue]
    lambda: dann_schedule(1000, 0.3),  # pyright: ignore[reportCallIssue]
    lambda: dann_schedule(),  # pyright: ignore[reportCallIssue]
    lambda: dann_schedule("9"),  # pyright: ignore[reportArgumentType]
    lambda: dann_schedule(9, end_value=None),  # pyright: ignore[reportArgumentType]
    lambda: dann_learning_rate(0.01, 1000),  # pyright: ignore[reportCallIssue]
    lambda: dann_learning_rate(0.01),  # pyright: ignore[reportCallIssue]
    lambda: dann_learning_rate(None, transition_steps=9),  # pyright: ignore[reportArgumentType]
    lambda: proxy_a_distance(X, X, 2),  # pyright: ignore[reportCallIssue]
    lambda: proxy_a_distance(X, X, folds="2"),  # pyright: ignore[reportArgumentType]
    lambda: domain_loss("logits", DOMAINS),  # pyright: ignore[reportArgumentType]
    lambda: domain_loss(jnp.ones(4)),  # pyright: ignore[reportCallIssue]
    lambda: domain_accuracy(X[:, 0], DOMAINS, DOMAINS < 1),  # pyright: ignore[reportCallIssue]
    lambda: domain_loss(jnp.ones(4), DOMAINS, 2),  # pyright: ignore[reportCallIssue]
    lambda: domain_weights(DOMAINS, 2),  # pyright: ignore[reportCallIssue]
    lambda: domain_weights(DOMAINS, num_domains="2"),  # pyright: ignore[reportArgumentType]
    lambda: entropy_weights(None, DOMAINS),  # pyright: ignore[reportArgumentType]
    lambda: entropy_weights(X, DOMAINS, 2),  # pyright: ignore[reportCallIssue]
    lambda: reversal_report(X, X),  # pyright: ignore[reportArgumentType]
    lambda: reversal_report(jnp.sum),  # pyright: ignore[reportCallIssue]
    lambda: information_maximization(None),  # pyright: ignore[reportArgumentType]
    lambda: information_maximization(X, X > 0),  # pyright: ignore[reportCallIssue]
    lambda: proxy_a_distance(X, X + 5, folds=2).error,  # pyright: ignore[reportAttributeAccessIssue]
]
