"""Two numbers that judge features without target labels, after training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._checks import check_floating, check_rows
from ._dtypes import at_least_float32


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
      ImportError: If scikit-learn is missing.
      ValueError: If an argument breaks its rule.

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
            "jaxgrl.proxy_a_distance needs scikit-learn: pip install scikit-learn"
        ) from error
    arrays = []
    given = {"source_features": source_features, "target_features": target_features}
    for name, value in given.items():
        array = np.asarray(value).astype(np.float64)
        if array.ndim < 2 or not np.isfinite(array).all():
            raise ValueError(
                f"`{name}` must be [examples, ...] and finite, got shape {array.shape}"
                f" with {np.sum(~np.isfinite(array))} values that are not."
            )
        arrays.append(array.reshape(len(array), -1))
    source, target = arrays
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            "`target_features` must have as many features as `source_features`, got "
            f"{target.shape[1]} and {source.shape[1]}."
        )
    fewest = min(len(source), len(target))
    if not 2 <= folds <= fewest:
        raise ValueError(
            f"`folds` must be from 2 to the number of examples of a domain, {fewest}, "
            f"got {folds}."
        )
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


def centroid_agreement(
    source_features: ArrayLike,
    source_labels: ArrayLike,
    target_features: ArrayLike,
    target_logits: ArrayLike,
) -> jax.Array:
    """Returns how often the classifier agrees with the nearest class centroid.

    The share of target examples whose predicted class is the class of the nearest mean
    of the source features, by cosine after the features are centred on the mean of
    those means. A criterion to choose the scale by, without a target label: where the
    target's classes lie on those of the source, both rules give the same answer.

    Args:
      source_features: ``[n, F]``, floating.
      source_labels: ``[n]``, integer, from 0 to C - 1.
      target_features: ``[m, F]``, floating.
      target_logits: ``[m, C]``, floating: the label logits of the target examples.

    Returns:
      A scalar between 0 and 1, float32 or wider; nan if a feature or a logit is not
      finite, so that a diverged run is never chosen. Classes without a source example
      have no centroid.

    Raises:
      TypeError: If a dtype does not fit.
      ValueError: If the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgrl import centroid_agreement
      >>> source = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> target = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])  # class 0, twice
      >>> print(centroid_agreement(source, jnp.array([0, 1]), target, logits))
      0.5

    References:
      Liang et al., Do We Really Need to Access the Source Data? ICML 2020, for nearest
      centroids as pseudo-labels, https://arxiv.org/abs/2002.08546
    """
    source, target, logits = map(
        jnp.asarray, (source_features, target_features, target_logits)
    )
    shapes = {
        "source_features": (source, "[n, F]"),
        "target_features": (target, "[m, F]"),
        "target_logits": (logits, "[m, C]"),
    }
    for name, (value, shape) in shapes.items():
        check_floating(name, value)
        if value.ndim != 2:
            raise ValueError(f"`{name}` must be {shape}, got shape {value.shape}.")
    check_rows(
        "source_labels", source_labels, len(source), (jnp.integer,), "an integer"
    )
    if target.shape[1] != source.shape[1] or len(target) != len(logits):
        raise ValueError(
            "`target_features` must be [m, F], with F that of `source_features` and m "
            f"that of `target_logits`, got shape {target.shape} beside {source.shape} "
            f"and {logits.shape}."
        )
    dtype = at_least_float32(source.dtype, target.dtype)
    source, target = source.astype(dtype), target.astype(dtype)
    member = jax.nn.one_hot(source_labels, logits.shape[1], dtype=dtype)
    counts = jnp.sum(member, axis=0)
    centroids = member.T @ source / jnp.maximum(counts, 1)[:, None]
    present = (counts > 0)[:, None]
    mean = jnp.sum(jnp.where(present, centroids, 0), axis=0) / jnp.sum(present)
    offsets = centroids - mean[None]
    norms = jnp.linalg.norm(offsets, axis=1, keepdims=True)
    # Cosines with a target row: its own length is the same for every class.
    cosines = (target - mean[None]) @ (offsets / jnp.maximum(norms, 1e-12)).T
    nearest = jnp.argmax(jnp.where(present.T, cosines, -jnp.inf), axis=1)
    agreement = jnp.mean((nearest == jnp.argmax(logits, axis=1)).astype(dtype))
    finite = [jnp.all(jnp.isfinite(value)) for value in (source, target, logits)]
    return jnp.where(finite[0] & finite[1] & finite[2], agreement, jnp.nan)
