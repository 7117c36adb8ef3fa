"""The network that ``jaxgrl.nnx.DANN`` and ``jaxgrl.linen.DANN`` have in common."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._dtypes import at_least_float32
from ._entropy import check_classes, is_activation


class DANNOutput(NamedTuple):
    """The label logits and the domain logits that a ``DANN`` returns."""

    label_logits: Any
    domain_logits: Any


def apply_dann(model: Any, x: Any, scale: Any, kwargs: dict[str, Any]) -> DANNOutput:
    """Returns both logits; each keyword goes to every module whose call names it."""
    modules = ("feature_extractor", "label_classifier", "domain_discriminator")
    named = {module: _named(getattr(model, module)) for module in modules}
    for key in kwargs:
        if not any(key in keys for keys in named.values()):
            calls = ", ".join(f"{m}({', '.join(keys)})" for m, keys in named.items())
            raise TypeError(
                f"`{key}` must be a keyword that the call of a module names, got "
                f"{calls}. Write a module whose `__call__` names it: the `**kwargs` of "
                "a Sequential name nothing. In NNX use `model.train()` and "
                "`model.eval()` for Dropout and BatchNorm."
            )

    def call(module: str, inputs: Any) -> Any:
        own = {key: kwargs[key] for key in named[module] if key in kwargs}
        return getattr(model, module)(inputs, **own)

    seen = features = call("feature_extractor", x)
    label_logits = call("label_classifier", features)
    if model.condition is not None:
        predictions = _predictions(features, label_logits, model.activation)
        seen = model.condition(features, predictions)
    seen = model.gradient_reversal(seen, scale)
    return DANNOutput(label_logits, call("domain_discriminator", seen))


def _named(module: Any) -> list[str]:
    """Returns the keywords that the call of a module names, its input left out."""
    try:
        parameters = inspect.signature(module).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    return [
        p.name
        for i, p in enumerate(parameters)
        if p.kind is p.KEYWORD_ONLY or (i and p.kind is p.POSITIONAL_OR_KEYWORD)
    ]


def _predictions(features: Any, label_logits: Any, activation: Any) -> Any:
    """Returns what ``condition`` is given beside the features; no gradient passes."""
    if is_activation(activation):
        otherwise = (
            "Use `activation=lambda y: y` for a regression, and "
            "`activation=lambda y: jax.nn.softmax(y['label'])` for a dict."
        )
        # [batch] has no axis of classes. A row under vmap is [C] beside features [F].
        least_ndim = 1 if getattr(features, "ndim", 2) == 1 else 2
        check_classes("label_logits", label_logits, activation, otherwise, least_ndim)
        if label_logits.shape[-1] == 1:  # the two classes of a binary head
            label_logits = jnp.concatenate([-label_logits, label_logits], axis=-1)
    wide = jax.tree.map(lambda y: y.astype(at_least_float32(y.dtype)), label_logits)
    return jax.lax.stop_gradient(activation(wide))
