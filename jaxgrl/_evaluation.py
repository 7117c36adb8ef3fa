"""Two numbers that judge a trained network without target labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._checks import as_array, as_floating, as_mask, check_size
from ._dtypes import at_least_float32, is_real
from ._entropy import check_classes, entropy, log_probabilities


class ProxyADistance(NamedTuple):
    """A proxy A-distance and its standard error."""

    distance: float
    standard_error: float


def proxy_a_distance(
    source_features: ArrayLike,
    target_features: ArrayLike,
    *,
    folds: int = 5,
    seed: int = 0,
) -> ProxyADistance:
    """Returns how well a linear classifier tells two domains apart by their features.

    The proxy A-distance ``2 * (1 - 2 * error)``, with the held-out error of a fresh
    logistic regression on standardised features, averaged over the two domains. It is
    about 0 if the domains are confused, 2 if they are apart.
    Source: Ben-David et al., NeurIPS 2006,
    https://papers.nips.cc/paper/2983-analysis-of-representations-for-domain-adaptation

    Args:
      source_features: ``[n, ...]``, real and finite; trailing axes are flattened.
      target_features: ``[m, ...]``, with the same trailing axes.
      folds: Number of folds, from 2 to the number of examples of a domain.
      seed: Seed of the split into folds.

    Returns:
      The named tuple ``(distance, standard_error)`` of floats; the latter is binomial.

    Raises:
      ImportError: If scikit-learn is missing (the extra ``evaluation`` installs it).
      TypeError: If features are complex, strings, objects or masked arrays.
      ValueError: If ``folds``, a shape or a value (1e150 and more too) does not fit.
    """
    try:
        from sklearn import linear_model, model_selection, pipeline, preprocessing
    except ImportError as error:
        what = "`jaxgrl.proxy_a_distance` needs scikit-learn. Install it with: "
        raise ImportError(f"{what}pip install 'scikit-learn>=1.5.2'") from error
    source = _checked_features("source_features", source_features)
    target = _checked_features("target_features", target_features)
    if source.shape[1:] != target.shape[1:]:
        raise ValueError(
            "`target_features` must have the trailing axes of `source_features`, got "
            f"shape {target.shape} beside {source.shape}."
        )
    fewest = min(len(source), len(target))
    check_size("folds", folds, 2, fewest + 1, f"the size of a domain, {fewest}")
    check_size("seed", seed, 0, 2**32, "2**32 - 1")
    x = np.concatenate([source, target]).reshape(len(source) + len(target), -1)
    domains = np.repeat([0, 1], [len(source), len(target)])
    logistic = linear_model.LogisticRegression(class_weight="balanced", max_iter=1000)
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), logistic)
    split = model_selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    guesses = model_selection.cross_val_predict(model, x, domains, cv=split)
    parts = np.split(np.asarray(guesses) != domains, [len(source)])
    error = sum(float(np.mean(part)) for part in parts)
    variance = sum(float(np.var(part)) / len(part) for part in parts)
    return ProxyADistance(2 * (1 - error), 2 * variance**0.5)


def _checked_features(name: str, value: ArrayLike) -> np.ndarray:
    """Returns features as float64, checked."""
    array = as_array(name, value, np.asarray)
    got = f"{array.dtype}" + " with a mask" * isinstance(value, np.ma.MaskedArray)
    if "mask" in got or not is_real(array.dtype):
        raise TypeError(f"`{name}` must have a real dtype and no mask, got {got}.")
    array = array.astype(np.float64)
    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ValueError(
            f"`{name}` must be [examples, ...] with a column, got shape {array.shape}."
        )
    # Squares of what is larger are not finite.
    bad = ~(np.abs(array) < 1e150)
    if bad.any():
        raise ValueError(f"`{name}` must be finite, below 1e150, got {array[bad][0]}.")
    return array


def information_maximization(
    target_logits: ArrayLike,
    *,
    where: ArrayLike | None = None,
    activation: Callable[..., Any] = jax.nn.softmax,
) -> jax.Array:
    """Returns the mutual information of target inputs and predicted labels (InfoMax).

    The entropy of the mean prediction minus the mean entropy of the predictions, in
    nats: from 0 to log C. It is large if each prediction is certain and all classes are
    predicted. To choose the scale of a DANN without a target label, train with each
    scale and a few seeds. Of the scales that are not clearly worse than the best, take
    the one nearest to 1. It takes the classes of the target for about equally frequent.
    Source: Bridle et al., NIPS 1991; Shi and Sha, 2012, https://arxiv.org/abs/1206.6438

    Args:
      target_logits: ``[batch, C]`` or, per pixel, ``[batch, H, W, C]``; floating.
      where: Which rows count, ``[batch]`` or ``[batch, H, W]``, as in ``domain_loss``.
      activation: As in ``entropy_weights``. For independent labels, their sum.

    Returns:
      A scalar, float32 or wider. It is nan if no row counts, or a counted logit is not
      finite. Compare with ``jnp.nanargmax``: no diverged run is then chosen.

    Raises:
      TypeError, ValueError: If a dtype, a shape or ``activation`` does not fit.
    """
    logits = as_floating("target_logits", target_logits)
    otherwise = (
        "A regression head has no classes: compare the error on held-out source "
        "examples and `proxy_a_distance` of the features. Small values of both are "
        "needed, but do not prove a small error on the target."
    )
    check_classes("target_logits", logits, activation, otherwise)
    mask = as_mask(where, logits.shape[:-1])
    logits = jnp.where(mask[..., None], logits, 0)
    logits = logits.astype(at_least_float32(logits.dtype))
    log_p = log_probabilities(logits, activation)
    axes, count = tuple(range(mask.ndim)), jnp.sum(mask, dtype=logits.dtype)
    counted = mask[..., None, None]
    log_mean = jax.nn.logsumexp(log_p, axis=axes, where=counted) - jnp.log(count)
    mutual = entropy(log_mean) - jnp.sum(jnp.where(mask, entropy(log_p), 0)) / count
    return jnp.where(jnp.all(jnp.isfinite(logits)), mutual, jnp.nan)
