"""The network that ``jaxgrl.nnx.DANN`` and ``jaxgrl.linen.DANN`` have in common."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._checks import check_floating
from ._dtypes import at_least_float32
from ._gradient_reversal import ScaleLike

_MODULES = ("feature_extractor", "label_classifier", "domain_discriminator")


class DANNOutput(NamedTuple):
    """The label logits and the domain logits that a ``DANN`` returns."""

    label_logits: Any
    domain_logits: Any


def apply_dann(
    model: Any, x: Any, scale: ScaleLike | None, kwargs: dict[str, Any]
) -> DANNOutput:
    """Returns both logits, each keyword given to every module whose call names it."""
    to_features, to_labels, to_domains = _routed(model, kwargs)
    features = model.feature_extractor(x, **to_features)
    label_logits = model.label_classifier(features, **to_labels)
    seen = features
    if model.condition is not None:
        predictions = _predictions(features, label_logits, model.activation)
        seen = model.condition(features, predictions)
    seen = model.gradient_reversal(seen, scale)
    return DANNOutput(label_logits, model.domain_discriminator(seen, **to_domains))


def _routed(model: Any, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    accepted = [_keywords(getattr(model, module)) for module in _MODULES]
    for name in kwargs:
        if not any(name in names for names in accepted):
            calls = [
                f"{module}({', '.join(names)})"
                for module, names in zip(_MODULES, accepted, strict=True)
            ]
            raise TypeError(
                f"`{name}` must be a keyword that the call of a module names, got "
                f"{', '.join(calls)}. Write a module whose `__call__` names it: the "
                "`**kwargs` of a Sequential name nothing. In NNX use `model.train()` "
                "and `model.eval()` for Dropout and BatchNorm."
            )
    return [{k: v for k, v in kwargs.items() if k in names} for names in accepted]


def _keywords(module: Callable[..., Any]) -> list[str]:
    """Returns the names that the call of a module has beside that of its input."""
    try:
        parameters = list(inspect.signature(module).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if parameters and parameters[0].kind is either:
        del parameters[0]
    kinds = (either, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds]


def _predictions(
    features: Any, label_logits: Any, activation: Callable[[Any], Any]
) -> Any:
    """Returns what ``condition`` is given beside the features; no gradient passes."""
    least = 2 if activation is jax.nn.softmax else 1
    if least == 2 or activation is jax.nn.sigmoid:
        shape = getattr(label_logits, "shape", None)
        # [batch] has no axis of classes. A row under vmap is [C] beside features [F].
        least_ndim = 1 if getattr(features, "ndim", 2) == 1 else 2
        if shape is None or len(shape) < least_ndim or shape[-1] < least:
            got = type(label_logits).__name__ if shape is None else f"shape {shape}"
            raise ValueError(
                f"`label_logits` must be [batch, ..., C] with C {least} or more where "
                f"`condition` is given, got {got}. Use "
                "`activation=jax.nn.sigmoid` for a binary head [batch, 1] and for "
                "independent labels, `activation=lambda y: y` for a regression, and "
                "`activation=lambda y: jax.nn.softmax(y['label'])` for a dict."
            )
        check_floating("label_logits", label_logits)
        if least == 1 == shape[-1]:
            # The two classes of a binary head.
            label_logits = jnp.concatenate([-label_logits, label_logits], axis=-1)
    wide = jax.tree.map(_widened, label_logits)
    return jax.lax.stop_gradient(activation(wide))


def _widened(y: Any) -> Any:
    floating = jnp.issubdtype(y.dtype, jnp.floating)
    return y.astype(at_least_float32(y.dtype)) if floating else y
