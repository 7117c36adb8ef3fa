"""Where the gradient of the domain loss goes, leaf by leaf."""

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


class Probe:
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
        return [wide(g) for g in self._call(scale, label, domain)[1]]

    def touched(self, label: float, domain: float, scale: float = 1.0) -> list[bool]:
        """Returns which leaves a nan in one of the three arrives at."""
        return [bool(np.isnan(g).any()) for g in self.gradients(scale, label, domain)]

    def values(self, scale: float, point: Any = None) -> tuple[float, float, Any]:
        """Returns label loss, domain loss (or the sum) and the logits, if given."""
        label, domain, logits = self._call(scale, 0.0, 1.0, point)[0][1]
        return float(label), float(domain), None if logits is None else wide(logits)

    def moved(self, direction: list[np.ndarray], step: float) -> list[jax.Array]:
        """Returns the parameters, a step along the direction away."""
        pairs = zip(self.point, direction, strict=True)
        return [jnp.asarray(wide(p) + step * np.conj(d), p.dtype) for p, d in pairs]

    def slope(self, direction: list[np.ndarray], excess: Any = None) -> float:
        """Returns the true derivative of the domain loss along the direction.

        Of a loss that is the sum, ``excess`` holds the label gradient to take off. It
        is nan where steps of two sizes disagree.
        """
        length = math.hypot(*map(norm, direction))
        size = math.hypot(*(norm(wide(p)) for p in self.point)) or 1.0
        # About 1 % of the loss, but in reach of the linear, and above rounding.
        step = min(0.01 * abs(self.values(1.0)[1]) / length, 0.01 * size) / length
        if not step:
            return math.nan
        slopes = []
        for s in (step, step / 2):
            up, down = (self.values(1.0, self.moved(direction, t))[1] for t in (s, -s))
            slopes.append((up - down) / (2 * s))
        if excess is not None:
            own = sum(dot(e, d) for e, d in zip(excess, direction, strict=True))
            slopes = [slope - own for slope in slopes]
        agree = abs(slopes[0] - slopes[1]) <= 0.2 * abs(slopes[1])
        return slopes[1] if agree else math.nan


class Flow:
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

    def __init__(self, probe: Probe, scales: np.ndarray, grads: list[list[np.ndarray]]):
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
        ground = math.hypot(*map(norm, self.full))
        self.silent = math.hypot(*map(norm, self.direction)) <= 1e-6 * ground
        none = [False] * len(self.zero)
        if probe.whole:
            self.labels, self.reached, self.label_reversed = self.zero, none, none
            self.trained = [bool(norm(g)) for g in self.zero]
            return
        self.labels = probe.gradients(0.0, label=1.0, domain=0.0)
        again = probe.gradients(1.0, label=1.0, domain=0.0)
        self.label_reversed = [
            norm(a - b) > 1e-3 * norm(a)
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
        return [mark and not is_penalty(g, wide(p)) for mark, g, p in rows]

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
                kind = "not reversed" if norm(label) else "none"
                rows.append(LeafReport(path, kind, *[math.nan] * 3))
            elif self.reached[i]:
                rows.append(_leaf(path, "plain", label, self.full[i]))
            else:
                rows.append(_leaf(path, "none", label, np.zeros_like(label)))
        return tuple(rows)

    def strength(self) -> float:
        """Returns the strength of the reversal over the scale; nan if none can tell."""
        pushed = sum(norm(d) ** 2 for d in self.direction)
        excess = self.zero if self.probe.whole else None
        # In a sum, a small domain gradient is lost in the label gradient.
        pairs = zip(self.zero, self.direction, strict=True)
        if self.probe.whole and sum(abs(dot(z, d)) for z, d in pairs) > 10 * pushed:
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
            problems.append(f"reversed {word}: {listed(names)}. One layer is enough")
        return problems

    def _is_power(self, i: int, power: int) -> bool:
        norms = [norm(part[i]) for part in self.parts]
        rest = sum(norms) - norms[power - 1]
        return self.powers[i] == power and rest < 0.1 * norms[power - 1]


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
    ground = math.hypot(*map(norm, grads[-1]))
    for value, leaf, *own in zip(point, leaves, *parts, strict=True):
        norms = [norm(part) for part in own]
        # What rounding leaves of a small gradient in a large one is no power.
        least = min(1e4 * float(jnp.finfo(value.dtype).eps), 0.5) * norm(leaf[-1])
        least = max(least, 1e-5 * ground)
        powers.append(1 + int(np.argmax(norms)) if max(norms) > least else 0)
    return powers, parts


def listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _dtype(value: Any) -> Any:
    return getattr(value, "dtype", None) or np.asarray(value).dtype


def wide(value: Any) -> np.ndarray:
    double = complex if jnp.iscomplexobj(value) else float
    return np.asarray(value).astype(double)


def _minus(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    return [x - y for x, y in zip(a, b, strict=True)]


def norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(value.ravel()))


def dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.real(np.sum(a * np.conj(b))))


def is_penalty(grad: np.ndarray, value: np.ndarray) -> bool:
    """Whether a gradient is a multiple of the parameter, as that of an L2 penalty."""
    product = norm(grad) * norm(value)
    return value.size > 1 and abs(dot(grad, value)) > (1 - 1e-6) * product


def _leaf(path: str, kind: str, label: np.ndarray, domain: np.ndarray) -> LeafReport:
    norms = norm(label), norm(domain)
    product = norms[0] * norms[1]
    cosine = dot(label, domain) / product if product else math.nan
    return LeafReport(path, kind, *norms, cosine)
