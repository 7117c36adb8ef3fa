"""Is it really reversed? Which parameter gets which gradient, and what is wrong."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import check_floating


class LeafReport(NamedTuple):
    """What one parameter receives.

    Attributes:
      path: Its place in ``params``, as ``jax.tree_util.keystr`` writes it.
      domain: Its domain gradient: ``"reversed"``, ``"plain"``, ``"none"``; or, where a
        loss of one number cannot tell the last two apart, ``"not reversed"``.
      label_norm: The norm of the gradient of the label loss; nan if it is unknown.
      domain_norm: The norm of the gradient of the domain loss, for scale 1.
      cosine: Of the angle between the two, the domain gradient as it is before the
        reversal. Above 0, what helps the label classifier helps the discriminator.
    """

    path: str
    domain: str
    label_norm: float
    domain_norm: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class ReversalReport:
    """What ``reversal_report`` found; ``print`` it.

    Attributes:
      leaves: A ``LeafReport`` for each floating leaf of the parameters.
      reversed: The same for all that are reversed, taken together.
      strength: By how much the gradient is reversed, over ``scale``: 1 as it should be.
        Measured by finite differences, so about; a ``stop_gradient`` in the domain loss
        moves it. nan if nothing is reversed, or it cannot be told.
      logit_spread: The standard deviation of the domain logits over the batch, the
        largest of the K; nan if the loss does not return them.
      problems: What is wrong, in words; empty if nothing was found.
    """

    leaves: tuple[LeafReport, ...]
    reversed: LeafReport
    strength: float
    logit_spread: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("parameter", "domain gradient", "|label|", "|domain|", "cosine")]
        for leaf in (*self.leaves, self.reversed):
            numbers = ("" if math.isnan(v) else f"{v:.3g}" for v in leaf[2:])
            rows.append((leaf.path, leaf.domain, *numbers))  # pyright: ignore
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pads = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
        lines = [
            "  ".join(
                p(t, w) for p, t, w in zip(pads, row, widths, strict=True)
            ).rstrip()
            for row in rows
        ]
        if not math.isnan(self.strength):
            lines.append(
                f"strength, by finite differences: {self.strength:.2f} x scale"
            )
        if not math.isnan(self.logit_spread):
            lines.append(f"spread of the domain logits: {self.logit_spread:.3g}")
        fine = "reversed once, by `scale`: nothing to mend"
        if math.isnan(self.logit_spread):
            fine += ", as far as the sum of the losses tells"
        verdict = self.problems or (fine,)
        return "\n".join([*lines, *(f"verdict: {line}" for line in verdict)])


def reversal_report(loss: Callable[[Any, Any], Any], params: Any) -> ReversalReport:
    """Returns which parameters receive the reversed gradient, and what is wrong.

    The gradient of a DANN is affine in the scale: the label gradient, minus scale times
    the domain gradient where it is reversed. Gradients at scales 0, 1, -1 and 2 tell
    what is reversed once, twice or in the loss too; a scale of nan marks whatever the
    layer touches; a finite difference, which no reversal can turn round, measures
    how strongly. Nothing of ``params`` is changed.

    Named are: a layer that is missing, behind the discriminator or inside it, passed by
    or passed twice; a scale that is not passed on, that weights the loss too, or in the
    layer's place; detached features; a domain loss that is subtracted; a discriminator
    whose output is constant (by construction, or dead), or is probabilities.

    Args:
      loss: A function of ``(params, scale)``, with a batch of every domain in it, that
        returns ``(label_loss, domain_loss, domain_logits)``: the two terms as they are
        added, and the logits ``[batch]``, ``[batch, 1]`` or ``[batch, K]``. Or their
        sum alone: then the report knows less, and cannot look at the discriminator. It
        runs under ``jit``, with a traced scale.
      params: A pytree of parameters (Linen, plain JAX), or an ``nnx.Module``. Its
        floating leaves are looked at.

    Returns:
      A ``ReversalReport``: a table and a verdict when printed, and the same as data.

    Raises:
      TypeError: If ``loss`` returns something else, or not floating.
      ValueError: If a loss is no scalar, or ``params`` has no floating leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgrl import domain_loss, gradient_reversal, reversal_report
      >>> x, y = jnp.array([1.0, 2.0, 3.0, 5.0]), jnp.array([0.0, 1.0])
      >>> def loss(params, scale):
      ...     features = params["features"] * x
      ...     label_loss = jnp.mean((features[:2] - y) ** 2)
      ...     logits = params["discriminator"] * gradient_reversal(features, scale)
      ...     return label_loss, domain_loss(logits, jnp.array([0, 0, 1, 1])), logits
      >>> report = reversal_report(loss, {"features": 1.0, "discriminator": 1.0})
      >>> for leaf in report.leaves:
      ...     print(leaf.path, leaf.domain)
      discriminator plain
      features reversed
      >>> report.problems
      ()
    """
    probe = _Probe(loss, params)
    # In 0 to 1: a loss may clip the scale to where it expects it.
    scales = np.array([0, 1 / 3, 2 / 3, 1])
    grads = [probe.gradients(float(s)) for s in scales]
    full = grads[-1]
    label, domain, logits = probe.values(1.0)
    spread = _spread(logits) if logits is not None else math.nan
    problems = []
    finite = all(np.all(np.isfinite(g)) for point in grads for g in point)
    if not (math.isfinite(label) and math.isfinite(domain) and finite):
        what = "a gradient"
        if not math.isfinite(label + domain):
            what = "the loss" if probe.whole else "the domain loss"
            what = what if math.isfinite(label) else "the label loss"
        problems = [
            f"{what} is not finite, so that no more can be told: are the inputs? Is a "
            "domain out of range for the logits?"
        ]
        leaves = tuple(LeafReport(p, "none", *[math.nan] * 3) for p in probe.paths)
        return _report(leaves, math.nan, spread, problems)

    zero = grads[0]
    powers, once, twice, thrice = _powers(scales, grads, probe.point)
    in_loss = not math.isfinite(sum(probe.values(math.nan)[:2]))
    if in_loss:
        # Then nan is everywhere: what is reversed shows in the powers of scale alone.
        size = 1e-3 * max(map(_norm, once + twice))
        reversed_ = [
            power == 2 and _norm(t) > size
            for power, t in zip(powers, twice, strict=True)
        ]
    else:
        reversed_ = probe.touched_by_scale()
    arriving = [
        parts[power - 1]
        for power, *parts in zip(powers, once, twice, thrice, strict=True)
    ]
    if probe.whole:
        trained = [bool(_norm(g)) for g in zero]
        labels, reached = zero, [False] * len(zero)
    else:
        labels = probe.gradients(0.0, label=1.0, domain=0.0)
        trained = probe.touched(label=math.nan, domain=0.0)
        reached = probe.touched(label=0.0, domain=math.nan)

    leaves = []
    rows = zip(probe.paths, labels, arriving, zero, reversed_, reached, strict=True)
    for path, y, back, plain, is_reversed, is_reached in rows:
        if is_reversed:
            sign = 1 if powers[len(leaves)] == 2 and not in_loss else -1
            leaves.append(_leaf(path, "reversed", y, sign * back))
        elif probe.whole:
            kind = "not reversed" if _norm(y) else "none"
            leaves.append(LeafReport(path, kind, *[math.nan] * 3))
        elif is_reached:
            leaves.append(_leaf(path, "plain", y, full[len(leaves)]))
        else:
            leaves.append(_leaf(path, "none", y, np.zeros_like(plain)))

    strength = math.nan
    indices = [i for i, r in enumerate(reversed_) if r]
    flow = math.hypot(*(_norm(arriving[i]) for i in indices))
    ground = math.hypot(*map(_norm, full))
    if in_loss:
        if indices:
            problems.append(
                "the strength is applied twice: layer and loss. The features see "
                "scale squared, and the discriminator starves while scale is small: "
                "take it out of the loss"
            )
        else:
            problems.append(
                "`scale` weights the loss, and no layer applies it: the discriminator "
                "starves while it is small. Pass it to the layer instead"
            )
    elif not indices:
        problems.append(_why_not_reversed(probe, full, trained, reached))
    elif flow <= 1e-6 * ground:
        problems.append(
            "nothing comes back through the layer: the discriminator's output is "
            "constant, or does not depend on the features"
        )
    else:
        several = {powers[i] for i in indices} - {1}
        for power in sorted(several):
            names = [probe.paths[i] for i in indices if powers[i] == power]
            word = {2: "twice", 3: "three times or more"}[power]
            problems.append(f"reversed {word}: {_list(names)}. One layer is enough")
        if not several:
            direction = [a * r for a, r in zip(arriving, reversed_, strict=True)]
            pushed = sum(_dot(a, a) for a in direction)
            slope = probe.slope(direction, excess=zero if probe.whole else None)
            strength = -pushed / slope if slope else math.nan
            # In a sum, a small domain gradient is lost in the label gradient.
            lost = [abs(_dot(z, d)) for z, d in zip(zero, direction, strict=True)]
            if sum(lost) > 10 * pushed:
                strength = math.nan
            if strength <= 0.5 or strength >= 2:
                problems.append(
                    f"the reversal is about {strength:.2g} times as strong as `scale` "
                    "(or a stop_gradient changes the domain gradient): does anything "
                    "multiply the scale, such as a schedule that ends too low?"
                )
        problems += _where(probe, reversed_, trained, reached, zero, arriving)
    problems += _discriminator(probe, label, domain, logits, spread, reversed_, reached)
    return _report(tuple(leaves), strength, spread, problems)


class _Probe:
    """Evaluates the loss and its gradients, on copies of the parameters."""

    def __init__(self, loss: Callable[[Any, Any], Any], params: Any):
        flat, structure = jax.tree.flatten_with_path(params)
        arrays = [value for _, value in flat]
        moving = [
            i for i, a in enumerate(arrays) if jnp.issubdtype(_dtype(a), jnp.inexact)
        ]
        if not moving:
            raise ValueError(
                "`params` must have a floating leaf to differentiate, got "
                f"{len(arrays)} leaves of other kinds."
            )
        names = (
            jax.tree_util.keystr(flat[i][0], simple=True, separator=".") for i in moving
        )
        # Of an nnx.Variable, the path ends in the value that it holds.
        self.paths = [name.removesuffix(".value") for name in names]
        self.point = [jnp.asarray(arrays[i]) for i in moving]
        self.whole = False

        def weighted(point, scale, label_weight, domain_weight):
            filled = list(arrays)
            for i, value in zip(moving, point, strict=True):
                filled[i] = value
            label, domain, logits = self._terms(
                loss(jax.tree.unflatten(structure, filled), scale)
            )
            total = domain_weight * domain
            if not self.whole:
                total = total + (label_weight * label).astype(total.dtype)
            return total, (label, domain, logits)

        self.evaluate = jax.jit(jax.value_and_grad(weighted, has_aux=True))

    def _terms(self, returned: Any) -> tuple[Any, Any, Any]:
        """Returns label loss, domain loss and logits; a sum counts as the second."""
        if isinstance(returned, tuple | list):
            if len(returned) != 3:
                raise TypeError(
                    "`loss` must return a scalar or (label_loss, domain_loss, "
                    f"domain_logits), got a tuple of {len(returned)}."
                )
            label, domain, logits = map(jnp.asarray, returned)
            check_floating("domain_logits", logits)
        else:
            self.whole = True
            label, domain, logits = jnp.zeros(()), jnp.asarray(returned), None
        for name, value in {"label_loss": label, "domain_loss": domain}.items():
            name = "loss" if self.whole else name
            check_floating(name, value)
            if value.shape:
                raise ValueError(f"`{name}` must be a scalar, got shape {value.shape}.")
        return label, domain, logits

    def _call(
        self, scale: float, label: float, domain: float, point: Any = None
    ) -> Any:
        # The nan that marks what the layer touches is meant.
        with jax.debug_nans(False), jax.debug_infs(False):
            point = self.point if point is None else point
            return self.evaluate(point, scale, label, domain)

    def gradients(
        self, scale: float, label: float = 0.0, domain: float = 1.0
    ) -> list[np.ndarray]:
        """Returns the gradients of a weighted sum of the two losses."""
        return [_wide(g) for g in self._call(scale, label, domain)[1]]

    def touched(self, label: float, domain: float, scale: float = 1.0) -> list[bool]:
        """Returns which leaves a nan in one of the three arrives at."""
        return [bool(np.isnan(g).any()) for g in self.gradients(scale, label, domain)]

    def touched_by_scale(self) -> list[bool]:
        """Returns which leaves the layer touches, zero gradients included."""
        return self.touched(0.0, 1.0, scale=math.nan)

    def values(self, scale: float, point: Any = None) -> tuple[float, float, Any]:
        """Returns label loss, domain loss (or the sum) and the logits, if given."""
        label, domain, logits = self._call(scale, 0.0, 1.0, point)[0][1]
        return float(label), float(domain), None if logits is None else _wide(logits)

    def moved(self, direction: list[np.ndarray], step: float) -> list[jax.Array]:
        """Returns the parameters, a step along the direction away."""
        pairs = zip(self.point, direction, strict=True)
        return [jnp.asarray(_wide(p) + step * np.conj(d), p.dtype) for p, d in pairs]

    def slope(self, direction: list[np.ndarray], excess: Any = None) -> float:
        """Returns the true derivative of the domain loss along the direction.

        Of a loss that is the sum, ``excess`` holds the label gradient to take off.
        """
        length = math.hypot(*map(_norm, direction))
        size = math.hypot(*(_norm(_wide(p)) for p in self.point)) or 1.0
        # About 1 % of the loss, but in reach of the linear, and above rounding.
        step = min(0.01 * max(abs(self.values(1.0)[1]), 0.1) / length, 0.01 * size)
        step /= length
        up, down = (
            self.values(1.0, self.moved(direction, s))[1] for s in (step, -step)
        )
        slope = (up - down) / (2 * step)
        if excess is not None:
            slope -= sum(_dot(e, d) for e, d in zip(excess, direction, strict=True))
        return slope


def _powers(
    scales: np.ndarray, grads: list[list[np.ndarray]], point: list[jax.Array]
) -> tuple[list[int], list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Returns how often each leaf is reversed, and its gradient's powers of scale."""
    fit = np.linalg.inv(np.vander(scales, increasing=True))[1:]
    leaves = [np.stack(leaf) for leaf in zip(*grads, strict=True)]
    parts = [[np.tensordot(row, leaf, 1) for leaf in leaves] for row in fit]
    powers = []
    ground = math.hypot(*map(_norm, grads[-1]))
    for value, leaf, *own in zip(point, leaves, *parts, strict=True):
        norms = [_norm(part) for part in own]
        # What rounding leaves of a small gradient in a large one is no power.
        least = min(1e4 * float(jnp.finfo(value.dtype).eps), 0.5) * _norm(leaf[-1])
        least = max(least, 1e-5 * ground)
        powers.append(1 + int(np.argmax(norms)) if max(norms) > least else 1)
    once, twice, thrice = parts
    return powers, once, twice, thrice


def _why_not_reversed(
    probe: _Probe, grads: list[np.ndarray], trained: list[bool], reached: list[bool]
) -> str:
    """Returns the verdict where no gradient depends on the scale."""
    missing = "does the discriminator's input pass through the layer?"
    unused = "is `scale` passed on to the layer?"
    detached = "are the features detached (stop_gradient)?"
    if probe.whole:
        return (
            f"no parameter is reversed by `scale`: {missing} Or {unused} Or {detached} "
            "A loss that returns the two losses and the domain logits tells which"
        )
    shared = [t and r for t, r in zip(trained, reached, strict=True)]
    flow = [g * s for g, s in zip(grads, shared, strict=True)]
    if not any(map(_norm, flow)):
        return f"no parameter is reversed: {detached} Nothing comes back to them"
    slope = probe.slope(flow)
    if slope > 0:
        return f"no parameter is reversed: {missing} The gradient arrives as it is"
    strength = -sum(_dot(g, g) for g in flow) / slope if slope else math.nan
    return (
        f"no parameter is reversed by `scale`: {unused} It has a strength of its own, "
        f"about {strength:.2g}"
    )


def _where(
    probe: _Probe,
    reversed_: list[bool],
    trained: list[bool],
    reached: list[bool],
    zero: list[np.ndarray],
    arriving: list[np.ndarray],
) -> list[str]:
    """Returns what is wrong with the place of the layer."""
    problems = []
    rows = list(zip(probe.paths, reversed_, trained, reached, strict=True))
    behind = [path for path, r, t, _ in rows if r and not t]
    if behind and any(r and t for _, r, t, _ in rows):
        problems.append(
            f"reversed without a label gradient: {_list(behind)}. Is the layer behind "
            "the discriminator, or inside it, instead of in front of it?"
        )
    around = [path for path, r, t, d in rows if t and d and not r]
    if not probe.whole:
        around += [
            path
            for (path, r, *_), z, a in zip(rows, zero, arriving, strict=True)
            if r and _norm(z) > 0.01 * _norm(a)
        ]
    if around:
        problems.append(
            f"a plain domain gradient passes the layer by: {_list(around)}. Does "
            "everything that the discriminator sees pass through the layer?"
        )
    return problems


def _discriminator(
    probe: _Probe,
    label: float,
    domain: float,
    logits: np.ndarray | None,
    spread: float,
    reversed_: list[bool],
    reached: list[bool],
) -> list[str]:
    """Returns what is wrong with the domain loss and the domain logits."""
    problems = []
    if label + domain < 0 if probe.whole else domain < 0:
        name = "loss" if probe.whole else "domain loss"
        problems.append(
            f"the {name} is negative ({domain:.3g}), which a cross entropy cannot be: "
            "is the domain loss subtracted? Add it; the layer does the subtracting"
        )
    if logits is None or not logits.size:
        return problems
    if spread <= 1e-5 * max(1.0, float(np.max(np.abs(logits)))):
        problems.append(
            "the discriminator's output is constant: by construction, or it has died. "
            "Look at its activations, and fit a fresh classifier of domains to the "
            "features (jaxgrl.proxy_a_distance)"
        )
        return problems
    # Logits grow with the last layer; probabilities stay where they are.
    grown = [
        p * (1000 if d and not r else 1)
        for p, d, r in zip(probe.point, reached, reversed_, strict=True)
    ]
    grown_logits = probe.values(1.0, grown)[2]
    if all(np.all((z >= 0) & (z <= 1)) for z in (logits, grown_logits)):
        problems.append(
            "the domain logits stay between 0 and 1: are they probabilities? Take the "
            "sigmoid or softmax out; domain_loss applies its own"
        )
    return problems


def _report(
    leaves: tuple[LeafReport, ...], strength: float, spread: float, problems: list[str]
) -> ReversalReport:
    chosen = [leaf for leaf in leaves if leaf.domain == "reversed"]
    label = math.hypot(*(leaf.label_norm for leaf in chosen))
    domain = math.hypot(*(leaf.domain_norm for leaf in chosen))
    dots = (
        leaf.cosine * leaf.label_norm * leaf.domain_norm
        for leaf in chosen
        if not math.isnan(leaf.cosine)
    )
    cosine = sum(dots) / (label * domain) if label * domain else math.nan
    name = f"together: {len(chosen)} of {len(leaves)}"
    together = LeafReport(name, "reversed", label, domain, cosine)
    return ReversalReport(leaves, together, strength, spread, tuple(problems))


def _leaf(path: str, kind: str, label: np.ndarray, domain: np.ndarray) -> LeafReport:
    norms = _norm(label), _norm(domain)
    product = norms[0] * norms[1]
    cosine = _dot(np.conj(label), domain) / product if product else math.nan
    return LeafReport(path, kind, *norms, cosine)


def _spread(logits: np.ndarray) -> float:
    """Returns the largest standard deviation of a logit over the batch."""
    rows = logits.reshape(len(logits), -1) if logits.size else np.zeros((1, 1))
    return float(np.max(np.std(rows, axis=0)))


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _dtype(value: Any) -> Any:
    return getattr(value, "dtype", None) or np.asarray(value).dtype


def _wide(value: Any) -> np.ndarray:
    double = complex if jnp.iscomplexobj(value) else float
    return np.asarray(value).astype(double)


def _minus(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(value.ravel()))


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.real(np.sum(a * b)))
