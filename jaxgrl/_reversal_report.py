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
    label, domain, logits = probe.values(1.0)
    spread = _spread(logits) if logits is not None else math.nan
    # In 0 to 1: a loss may clip the scale to where it expects it.
    scales = np.array([0, 1 / 3, 2 / 3, 1])
    grads = [probe.gradients(float(s)) for s in scales]
    if not_finite := _not_finite(probe, label, domain, grads):
        leaves = tuple(LeafReport(p, "none", *[math.nan] * 3) for p in probe.paths)
        return _report(leaves, math.nan, spread, [not_finite])

    flow = _Flow(probe, scales, grads)
    strength = math.nan
    if flow.in_loss:
        problems = [_strength_in_loss(flow)]
    elif not any(flow.reversed):
        problems = [_why_not_reversed(probe, flow)]
    elif flow.silent:
        problems = [
            "nothing comes back through the layer: the discriminator's output is "
            "constant, or does not depend on the features"
        ]
    else:
        problems = flow.reversed_several_times()
        if not problems:
            strength = flow.strength()
        if strength <= 0.5 or strength >= 2:
            problems.append(
                f"the reversal is about {strength:.2g} times as strong as `scale` (or "
                "a stop_gradient changes the domain gradient): does anything multiply "
                "the scale, such as a schedule that ends too low?"
            )
        problems += _where(flow)
    problems += _discriminator(flow, label, domain, logits, spread)
    return _report(flow.leaves(), strength, spread, problems)


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

    def _array(self, value: Any) -> jax.Array:
        if not isinstance(value, jax.Array | np.ndarray | int | float | list):
            raise TypeError(
                "`loss` must return a scalar or (label_loss, domain_loss, "
                f"domain_logits), each an array, got {value!r}."
            )
        return jnp.asarray(value)

    def _terms(self, returned: Any) -> tuple[Any, Any, Any]:
        """Returns label loss, domain loss and logits; a sum counts as the second."""
        if isinstance(returned, tuple | list):
            if len(returned) != 3:
                raise TypeError(
                    "`loss` must return a scalar or (label_loss, domain_loss, "
                    f"domain_logits), got a tuple of {len(returned)}."
                )
            label, domain, logits = map(self._array, returned)
            check_floating("domain_logits", logits)
        else:
            self.whole = True
            label, domain, logits = jnp.zeros(()), self._array(returned), None
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

        Of a loss that is the sum, ``excess`` holds the label gradient to take off. It
        is nan where steps of two sizes disagree.
        """
        length = math.hypot(*map(_norm, direction))
        size = math.hypot(*(_norm(_wide(p)) for p in self.point)) or 1.0
        # About 1 % of the loss, but in reach of the linear, and above rounding.
        step = min(0.01 * abs(self.values(1.0)[1]) / length, 0.01 * size) / length
        if not step:
            return math.nan
        slopes = []
        for s in (step, step / 2):
            up, down = (self.values(1.0, self.moved(direction, t))[1] for t in (s, -s))
            slopes.append((up - down) / (2 * s))
        if excess is not None:
            own = sum(_dot(e, d) for e, d in zip(excess, direction, strict=True))
            slopes = [slope - own for slope in slopes]
        agree = abs(slopes[0] - slopes[1]) <= 0.2 * abs(slopes[1])
        return slopes[1] if agree else math.nan


class _Flow:
    """Where the domain gradient goes, leaf by leaf.

    Attributes:
      in_loss: Whether the value of the loss depends on the scale.
      reversed: Which leaves receive a gradient through the layer.
      label_reversed: Whose label gradient depends on the scale.
      trained: Which leaves the label loss trains, but for a weight penalty.
      reached: Which leaves the domain loss reaches, but for a weight penalty.
      silent: Whether what comes back through the layer is zero.
      zero, full: The domain gradients at scale 0 and 1; of a sum, with the label's.
      labels: The label gradients.
    """

    def __init__(
        self, probe: _Probe, scales: np.ndarray, grads: list[list[np.ndarray]]
    ):
        self.probe = probe
        self.zero, self.full = grads[0], grads[-1]
        self.powers, self.parts = _powers(scales, grads, probe.point)
        self.in_loss = not math.isfinite(sum(probe.values(math.nan)[:2]))
        if self.in_loss:
            # Then nan is everywhere, and the powers of the scale alone tell.
            self.reversed = [power == 2 for power in self.powers]
        else:
            marked = probe.touched(label=0.0, domain=1.0, scale=math.nan)
            pairs = zip(marked, self.powers, strict=True)
            self.reversed = [mark or power > 0 for mark, power in pairs]
        self.change = _minus(self.full, self.zero)
        self.direction = [
            c * r for c, r in zip(self.change, self.reversed, strict=True)
        ]
        ground = math.hypot(*map(_norm, self.full))
        self.silent = math.hypot(*map(_norm, self.direction)) <= 1e-6 * ground
        none = [False] * len(self.zero)
        if probe.whole:
            self.labels, self.reached, self.label_reversed = self.zero, none, none
            self.trained = [bool(_norm(g)) for g in self.zero]
            return
        self.labels = probe.gradients(0.0, label=1.0, domain=0.0)
        again = probe.gradients(1.0, label=1.0, domain=0.0)
        self.label_reversed = [
            _norm(a - b) > 1e-3 * _norm(a)
            for a, b in zip(again, self.labels, strict=True)
        ]
        self.trained = self._but_for_penalties(
            probe.touched(label=math.nan, domain=0.0), self.labels
        )
        self.reached = self._but_for_penalties(
            probe.touched(label=0.0, domain=math.nan), self.full
        )

    def _but_for_penalties(
        self, touched: list[bool], grads: list[np.ndarray]
    ) -> list[bool]:
        """Returns touched, without the leaves whose gradient is a multiple of them."""
        rows = zip(touched, grads, self.probe.point, strict=True)
        return [mark and not _is_penalty(g, _wide(p)) for mark, g, p in rows]

    def leaves(self) -> tuple[LeafReport, ...]:
        """Returns the rows of the table."""
        rows = []
        for i, (path, label) in enumerate(
            zip(self.probe.paths, self.labels, strict=True)
        ):
            if self.reversed[i]:
                twice = self.powers[i] == 2 and not self.in_loss
                back = self.change[i] if twice else -self.change[i]
                rows.append(_leaf(path, "reversed", label, back))
            elif self.probe.whole:
                kind = "not reversed" if _norm(label) else "none"
                rows.append(LeafReport(path, kind, *[math.nan] * 3))
            elif self.reached[i]:
                rows.append(_leaf(path, "plain", label, self.full[i]))
            else:
                rows.append(_leaf(path, "none", label, np.zeros_like(label)))
        return tuple(rows)

    def strength(self) -> float:
        """Returns the strength of the reversal over the scale; nan if none can tell."""
        pushed = sum(_norm(d) ** 2 for d in self.direction)
        excess = self.zero if self.probe.whole else None
        # In a sum, a small domain gradient is lost in the label gradient.
        pairs = zip(self.zero, self.direction, strict=True)
        if self.probe.whole and sum(abs(_dot(z, d)) for z, d in pairs) > 10 * pushed:
            return math.nan
        slope = self.probe.slope(self.direction, excess)
        return -pushed / slope if slope else math.nan

    def reversed_several_times(self) -> list[str]:
        """Returns a problem for each number of layers that is not one."""
        problems = []
        for power, word in {2: "twice", 3: "three times or more"}.items():
            chosen = [
                r and self._is_power(i, power) for i, r in enumerate(self.reversed)
            ]
            if not any(chosen):
                continue
            # A schedule in the loss bends the curve too, but keeps the sign.
            own = [c * d for c, d in zip(chosen, self.direction, strict=True)]
            excess = self.zero if self.probe.whole else None
            if power == 2 and not self.probe.slope(own, excess) > 0:
                continue
            names = [p for p, c in zip(self.probe.paths, chosen, strict=True) if c]
            problems.append(f"reversed {word}: {_list(names)}. One layer is enough")
        return problems

    def _is_power(self, i: int, power: int) -> bool:
        norms = [_norm(part[i]) for part in self.parts]
        rest = sum(norms) - norms[power - 1]
        return self.powers[i] == power and rest < 0.1 * norms[power - 1]


def _not_finite(
    probe: _Probe, label: float, domain: float, grads: list[list[np.ndarray]]
) -> str:
    """Returns the verdict if a loss or a gradient is not finite, else nothing."""
    what = "a gradient"
    if not math.isfinite(label + domain):
        what = "the loss" if probe.whole else "the domain loss"
        what = what if math.isfinite(label) else "the label loss"
    elif all(np.all(np.isfinite(g)) for point in grads for g in point):
        return ""
    return (
        f"{what} is not finite, so that no more can be told: are the inputs? Is a "
        "domain out of range for the logits?"
    )


def _strength_in_loss(flow: _Flow) -> str:
    if any(flow.reversed):
        return (
            "the strength is applied twice: layer and loss. The features see scale "
            "squared, and the discriminator starves while scale is small: take it out "
            "of the loss"
        )
    return (
        "`scale` weights the loss, and no layer applies it: the discriminator starves "
        "while it is small. Pass it to the layer instead"
    )


def _powers(
    scales: np.ndarray, grads: list[list[np.ndarray]], point: list[jax.Array]
) -> tuple[list[int], list[list[np.ndarray]]]:
    """Returns the power of the scale that leads in each leaf, and all three parts.

    The power is 0 where the gradient does not depend on the scale.
    """
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
        powers.append(1 + int(np.argmax(norms)) if max(norms) > least else 0)
    return powers, parts


def _why_not_reversed(probe: _Probe, flow: _Flow) -> str:
    """Returns the verdict where no gradient depends on the scale."""
    missing = "does the discriminator's input pass through the layer?"
    unused = "is `scale` passed on to the layer?"
    detached = "are the features detached (stop_gradient)?"
    if probe.whole:
        return (
            f"no parameter is reversed by `scale`: {missing} Or {unused} Or {detached} "
            "A loss that returns the two losses and the domain logits tells which"
        )
    rows = zip(flow.full, flow.trained, flow.reached, strict=True)
    shared = [g * (t and r) for g, t, r in rows]
    if not any(map(_norm, shared)):
        return f"no parameter is reversed: {detached} Nothing comes back to them"
    slope = probe.slope(shared)
    if not slope < 0:
        return f"no parameter is reversed: {missing} The gradient arrives as it is"
    strength = -sum(_norm(g) ** 2 for g in shared) / slope
    return (
        f"no parameter is reversed by `scale`: {unused} It has a strength of its own, "
        f"about {strength:.2g}"
    )


def _where(flow: _Flow) -> list[str]:
    """Returns what is wrong with the place of the layer."""
    problems = []
    probe = flow.probe
    rows = list(
        zip(probe.paths, flow.reversed, flow.trained, flow.reached, strict=True)
    )
    both = [path for path, r in zip(probe.paths, flow.label_reversed, strict=True) if r]
    if both:
        problems.append(
            f"the label gradient is reversed too: {_list(both)}. The layer belongs in "
            "front of the discriminator alone"
        )
    behind = [path for path, r, t, _ in rows if r and not t]
    if behind and any(r and t for _, r, t, _ in rows):
        problems.append(
            f"reversed without a label gradient: {_list(behind)}. Is the layer behind "
            "the discriminator, or inside it, instead of in front of it? (Parameters "
            "that only the target uses show here too, and may be right.)"
        )
    elif not probe.whole and not any(d and not r for _, r, _, d in rows):
        problems.append(
            "the domain loss trains no discriminator: no parameter receives its "
            "gradient as it is. Are the discriminator's parameters detached, or absent?"
        )
    # Of a single number no gradient can be told from that of a weight penalty.
    around = [
        path
        for (path, r, t, d), p in zip(rows, probe.point, strict=True)
        if t and d and not r and p.size > 1
    ]
    if not probe.whole:
        around += [
            path
            for (path, r, *_), z, c, p in zip(
                rows, flow.zero, flow.change, probe.point, strict=True
            )
            if r and _norm(z) > 0.01 * _norm(c) and not _is_penalty(z, _wide(p))
        ]
    if around:
        problems.append(
            f"a plain domain gradient passes the layer by: {_list(around)}. Does "
            "everything that the discriminator sees pass through the layer?"
        )
    return problems


def _discriminator(
    flow: _Flow, label: float, domain: float, logits: np.ndarray | None, spread: float
) -> list[str]:
    """Returns what is wrong with the domain loss and the domain logits."""
    probe, problems = flow.probe, []
    if label + domain < 0 if probe.whole else domain < 0:
        name = "loss" if probe.whole else "domain loss"
        problems.append(
            f"the {name} is negative ({domain:.3g}), which a cross entropy cannot be: "
            "is the domain loss subtracted? Add it; the layer does the subtracting"
        )
    if logits is None or not logits.size:
        return problems
    if spread <= 1e-6 * max(1.0, float(np.max(np.abs(logits)))):
        problems.append(
            "the discriminator's output is constant: by construction, because its last "
            "layer is 0 still, or because it has died. Look at its activations, and "
            "fit a fresh classifier of domains to the features "
            "(jaxgrl.proxy_a_distance)"
        )
        return problems
    # Logits grow with the last layer; probabilities stay where they are.
    grown = [
        p * (1000 if d and not r else 1)
        for p, d, r in zip(probe.point, flow.reached, flow.reversed, strict=True)
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
    cosine = _dot(label, domain) / product if product else math.nan
    return LeafReport(path, kind, *norms, cosine)


def _spread(logits: np.ndarray) -> float:
    """Returns the largest standard deviation of a logit over the batch."""
    if not logits.ndim or not logits.size:
        return math.nan
    rows = logits.reshape(len(logits), -1)
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
    return float(np.real(np.sum(a * np.conj(b))))


def _is_penalty(grad: np.ndarray, value: np.ndarray) -> bool:
    """Whether a gradient is a multiple of the parameter, as that of an L2 penalty."""
    product = _norm(grad) * _norm(value)
    return value.size > 1 and abs(_dot(grad, value)) > (1 - 1e-6) * product
