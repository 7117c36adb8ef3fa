"""The loop round a train step: chunks of steps, every seed and every method."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .run import CHUNK


def by_vmap(chunk: Callable[..., Any]) -> Callable[..., Any]:
    """Runs every seed at once; state, data and key have an axis of seeds."""
    return jax.vmap(chunk, in_axes=(0, 0, 0, None, None))


def by_map(chunk: Callable[..., Any]) -> Callable[..., Any]:
    """Runs one seed after another on shared data: faster for a CNN on two cores."""

    def chunks(state: Any, data: Any, keys: Any, *rest: Any) -> Any:
        return jax.lax.map(
            lambda own: chunk(own[0], data, own[1], *rest), (state, keys)
        )

    return chunks


def train(
    init: Callable[[Any], Any],
    train_step: Callable[..., Any],
    evaluate: Callable[..., Any],
    methods: Mapping[str, Any],
    keys: Any,
    steps: int,
    over_seeds: Callable[..., Any] = by_vmap,
) -> Iterator[Any]:
    """Yields (method, step, seconds, metrics, state) after every chunk of steps.

    A chunk is one lax.scan over the steps, compiled once for all methods: the scale is
    data.

    Args:
      init: Returns the state of one seed from its key.
      train_step: Maps ``(state, step, data, key, scale)`` to the next state and a
        dictionary of scalars.
      evaluate: Maps ``(state, data)`` to a dictionary of arrays.
      methods: The data and the scale of each method.
      keys: A key for each seed.
      steps: Of a run, a multiple of ``CHUNK``.
      over_seeds: ``by_vmap`` or ``by_map``.
    """

    def chunk(state: Any, data: Any, key: Any, scale: Any, start: Any) -> Any:
        def step(state: Any, index: Any) -> Any:
            return train_step(state, index, data, key, scale)

        state, metrics = jax.lax.scan(step, state, start + jnp.arange(CHUNK))
        return state, jax.tree.map(jnp.mean, metrics) | evaluate(state, data)

    initial = jax.vmap(init)(keys)
    start = time.perf_counter()
    data, _ = next(iter(methods.values()))
    compiled = jax.jit(over_seeds(chunk)).lower(initial, data, keys, 0.0, 0).compile()
    seconds = {"compile": time.perf_counter() - start}
    for method, (data, scale) in methods.items():
        state, start = initial, time.perf_counter()
        for step in range(0, steps, CHUNK):
            state, metrics = compiled(state, data, keys, float(scale), step)
            metrics = jax.tree.map(np.asarray, metrics)
            seconds[method] = time.perf_counter() - start
            yield method, step + CHUNK, seconds, metrics, state
