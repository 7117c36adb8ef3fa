"""Two numbers that judge a trained network without target labels."""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._checks import check_floating
from ._dtypes import at_least_float32, is_real


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

    ``2 * (1 - 2 * error)``, with the held-out error of a logistic regression on
    standardised features, fitted anew: about 0 if the domains are confused, 2 if they
    are apart. Unlike the discriminator of the training it cannot have died. The error
    is the mean of the errors on the two domains, so unequal numbers do not tilt it;
    every example is held out once.

    Args:
      source_features: ``[n, ...]``, real and finite; trailing axes are flattened.
      target_features: ``[m, ...]``, with the same trailing axes.
      folds: The number of folds, from 2 to the number of examples of a domain.
      seed: Of the split into folds.

    Returns:
      The named tuple ``(distance, standard_error)`` of floats. The standard error is
      binomial, as if the held-out predictions were independent.

    Raises:
      ImportError: If scikit-learn is missing (the extra ``evaluation`` installs it).
      TypeError: If features are complex, strings or objects.
      ValueError: If features have fewer than two axes, no column, other trailing axes
        than those of the other domain, or a value that is not finite and below 1e150;
        or if ``folds`` is not a whole number in its range.

    Example:
      >>> import numpy as np
      >>> from jaxgrl import proxy_a_distance
      >>> source, target = np.random.default_rng(0).normal(size=(2, 200, 3))
      >>> same = proxy_a_distance(source, target)
      >>> abs(same.distance) < 3 * same.standard_error
      True
      >>> proxy_a_distance(source, target + 5).distance > 1.9
      True

    References:
      Ben-David et al., Analysis of Representations for Domain Adaptation, NeurIPS 2006,
      https://papers.nips.cc/paper/2983-analysis-of-representations-for-domain-adaptation
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "`jaxgrl.proxy_a_distance` needs scikit-learn. Install it with: "
            "pip install 'scikit-learn>=1.5.2'"
        ) from error
    source, target = (
        _checked_features(name, value)
        for name, value in {
            "source_features": source_features,
            "target_features": target_features,
        }.items()
    )
    if source.shape[1:] != target.shape[1:]:
        raise ValueError(
            "`target_features` must have the trailing axes of `source_features`, got "
            f"shape {target.shape} beside {source.shape}."
        )
    fewest = min(len(source), len(target))
    if not isinstance(folds, numbers.Integral) or not 2 <= folds <= fewest:
        raise ValueError(
            f"`folds` must be a whole number from 2 to the number of examples of a "
            f"domain, {fewest}, got {folds!r}."
        )
    source, target = (a.reshape(len(a), -1) for a in (source, target))
    x = np.concatenate([source, target])
    domains = np.repeat([0, 1], [len(source), len(target)])
    model = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    wrong = np.asarray(cross_val_predict(model, x, domains, cv=split)) != domains
    errors = [float(np.mean(wrong[domains == d])) for d in (0, 1)]
    variance = sum(
        e * (1 - e) / n for e, n in zip(errors, (len(source), len(target)), strict=True)
    )
    return ProxyADistance(2 * (1 - sum(errors)), 2 * variance**0.5)


def _checked_features(name: str, value: ArrayLike) -> np.ndarray:
    """Returns features as float64, checked."""
    array = np.asarray(value)
    if not is_real(array.dtype):
        raise TypeError(f"`{name}` must have a real dtype, got {array.dtype}.")
    array = array.astype(np.float64)
    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ValueError(
            f"`{name}` must be [examples, ...] with one column or more, got shape "
            f"{array.shape}."
        )
    # Squares of what is larger are not finite.
    bad = ~(np.abs(array) < 1e150)
    if bad.any():
        raise ValueError(
            f"`{name}` must be finite, and below 1e150, got {bad.sum()} values of "
            f"{array.size} that are not."
        )
    return array


def information_maximization(target_logits: ArrayLike) -> jax.Array:
    """Returns the mutual information of target inputs and predicted labels (InfoMax).

    The entropy of the mean prediction minus the mean entropy of the predictions, in
    nats: from 0 to log C. It is large if each prediction is certain and all classes are
    predicted. To choose the scale of a DANN without a target label, train with each
    scale and take the largest mean over a few seeds: of the criteria compared in
    ``benchmarks/adaptation.py`` it lost least. It trusts that the classes are about as
    frequent in the target as a certain classifier makes them.

    Args:
      target_logits: The label logits of target examples, ``[batch, C]``, floating.

    Returns:
      A scalar, float32 or wider; nan if a logit is not finite, so that a diverged run
      is never chosen (``max`` must not see nan: compare with ``jnp.nanargmax``).

    Raises:
      TypeError: If ``target_logits`` is not floating.
      ValueError: If it is not ``[batch, C]`` with 2 classes or more, or empty.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgrl import information_maximization
      >>> certain = jnp.array([[50.0, 0.0], [0.0, 50.0]])
      >>> print(f"{information_maximization(certain):.4f}")  # log 2
      0.6931
      >>> print(f"{information_maximization(certain[:1]):.4f}")  # one class only
      0.0000

    References:
      Bridle, Heading and MacKay, Unsupervised Classifiers, Mutual Information and
      'Phantom Targets', NIPS 1991; Shi and Sha, Information-Theoretical Learning of
      Discriminative Clusters for Unsupervised Domain Adaptation, ICML 2012,
      https://arxiv.org/abs/1206.6438
    """
    logits = jnp.asarray(target_logits)
    check_floating("target_logits", logits)
    if logits.ndim != 2 or not len(logits) or logits.shape[1] < 2:
        raise ValueError(
            "`target_logits` must be [batch, C] with C 2 or more, and not empty, got "
            f"shape {logits.shape}."
        )
    logits = logits.astype(at_least_float32(logits.dtype))
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    # Not entr(p), whose gradient at a probability of exactly 0 is nan.
    log_p = jnp.where(p == 0, 0, log_p)
    mean_p = jnp.mean(p, axis=0)
    log_mean = jnp.log(jnp.where(mean_p == 0, 1, mean_p))
    mutual = jnp.mean(jnp.sum(p * log_p, axis=1)) - jnp.sum(mean_p * log_mean)
    return jnp.where(jnp.all(jnp.isfinite(logits)), mutual, jnp.nan)
