"""Is it really reversed? Which parameter gets which gradient, and what is wrong."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from ._checks import as_floating
from ._program import AXIS, GIVEN, OPEN, SHUT, with_switches

_PROBLEMS = {
    "not_finite": "A loss or a gradient is not finite, so nothing more can be checked. "
    "Are the inputs finite? Is a domain out of range for the logits?",
    "missing": "No gradient is reversed. Does what the discriminator sees pass through "
    "gradient_reversal, with a positive scale, and without a stop_gradient?",
    "detached": "The domain gradient reaches no parameter that the label loss trains. "
    "Are the features detached (stop_gradient)?",
    "no_domain_gradient": "No domain gradient. Is the output a softmax of one logit?",
    "scale_unused": "The strength of the reversal is {strength:.3g} at every `scale`. "
    "Pass `scale` to the layer.",
    "scale_in_loss": "`scale` weights the loss: the discriminator does not learn while "
    "it is small. Pass `scale` to the layer alone.",
    "twice": "The gradient passes two layers, which cancel: {names}. Keep one of them. "
    "jaxgrl's DANN contains one.",
    "label_reversed": "The label gradient is reversed too: {names}. Put the layer in "
    "front of the discriminator alone.",
    "behind": "The discriminator is reversed too: {names}. Put the layer in front of "
    "the discriminator, not behind it.",
    "untrained": "The domain loss trains no discriminator. Are its parameters "
    "detached, or not in `params`?",
    "bypassed": "Part of what the discriminator sees does not pass through the layer: "
    "{names} receive a plain domain gradient too. Pass all of it through the layer.",
    "probabilities": "The domain logits stay between 0 and 1. Are they probabilities? "
    "Remove the sigmoid or softmax: domain_loss applies its own.",
}
_NOTES = {
    "unreadable": "No layer was found, but the gradient changes with `scale`. Is the "
    "reversal written with stop_gradient? Use gradient_reversal to have it checked.",
    "strength": "The strength of the reversal is {strength:.3g} x `scale`. Does "
    "something multiply the scale, such as a schedule that ends too low?",
    "only_reversed": "Reversed, but not trained by the label loss: {names}. Is the "
    "layer inside the discriminator? Parameters of one domain alone may be right.",
    "negative_loss": "The loss is negative, which a cross entropy cannot be. Is the "
    "domain loss subtracted? Add it: the layer does the subtraction.",
    "constant_output": "The output of the discriminator is the same for all examples. "
    "It may start at 0, or the features may be equal. Otherwise it has died.",
}

# The weights of the label loss, the domain loss and the domain logits.
_LABEL, _DOMAIN, _LOGITS = np.eye(3).tolist()
# How far parameters are moved to see whether a gradient is 0 by chance.
_NEARBY = 0.1
# Of a leaf: the gradient with the layers open, with the layers shut, what passes
# through, what arrives of it; the domain gradient, and the change from it.
_OPEN, _SHUT, _THROUGH, _ARRIVED, _OTHER, _CHANGE = range(6)


class Finding(NamedTuple):
    """A finding: its ``kind``, for code to compare, and a ``text`` with advice."""

    kind: str
    text: str


class LeafReport(NamedTuple):
    """What one parameter receives.

    Attributes:
      path: Its place in ``params``, as ``jax.tree_util.keystr`` writes it.
      domain: Its domain gradient: ``"reversed"``, ``"plain"`` or ``"none"``. From the
        sum of the losses it is ``"not reversed"`` in place of ``"plain"``.
      label_norm: The norm of the label gradient.
      domain_norm: The norm of the domain gradient, before the reversal.
      cosine: Between the two, before the reversal. Above 0, the losses agree.
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
      leaves: A ``LeafReport`` for each floating array of the parameters.
      reversed: The same for all that are reversed, taken together.
      strength: What multiplies ``scale``; 1 if all is right, nan if none is reversed.
      logit_spread: The largest standard deviation of a domain logit over the batch;
        nan if the loss does not return them.
      problems: A ``Finding`` for each sure mistake; empty for a correct model.
      notes: A ``Finding`` for each thing that is worth a look.
    """

    leaves: tuple[LeafReport, ...]
    reversed: LeafReport
    strength: float
    logit_spread: float
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    def __str__(self) -> str:
        rows = [["parameter", "domain gradient", "|label|", "|domain|", "cosine"]]
        for path, kind, *numbers in (*self.leaves, self.reversed):
            rows += [[path, kind, *(f"{n:.3g}".replace("nan", "") for n in numbers)]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "{:<{}}  {:<{}}  {:>{}}  {:>{}}  {:>{}}".format
        lines = [form(*sum(zip(row, widths, strict=True), ())) for row in rows]
        lines += [
            f"strength of the reversal: {self.strength:.4g} x scale",
            f"spread of the domain logits: {self.logit_spread:.3g}",
        ]
        lines = [line.rstrip() for line in lines if ": nan" not in line]
        lines += [f"problem ({kind}): {text}" for kind, text in self.problems]
        lines += [f"note ({kind}): {text}" for kind, text in self.notes]
        if not self.problems:
            coarse = ", as far as the losses alone show"
            lines.append(f"no problem found{coarse * math.isnan(self.logit_spread)}")
        return "\n".join(lines)


def reversal_report(
    loss: Callable[..., Any], params: Any, *args: Any
) -> ReversalReport:
    """Returns which parameters receive the reversed gradient, and what is wrong.

    It reads the program of the loss (its jaxpr). A layer is an identity with its own
    derivative rule that changes the sign: this library's, five lines by hand,
    ``optax.scale_gradient``; not one inside another function with its own rule. The
    loss is differentiated with the layers as they are (given), with each a plain copy
    (open), and with each a ``stop_gradient`` (shut):

        through  = gradient(open)  - gradient(shut)
        arrived  = gradient(given) - gradient(shut)
        strength = -<arrived, through> / |through|**2

    The kinds of a problem are missing, detached, no_domain_gradient, scale_unused,
    scale_in_loss, twice, label_reversed, behind (the discriminator), untrained (the
    discriminator), bypassed, probabilities (for logits) and not_finite. Those of a note
    are strength, only_reversed, negative_loss, constant_output and unreadable.

    Args:
      loss: A function of ``(params, scale, *args)``, with a batch of every domain, that
        returns ``(label_loss, domain_loss, domain_logits)``: the two terms as they are
        added, and the logits ``[batch, ...]``. Or the sum alone, which shows less.
      params: A pytree of parameters (Linen, Haiku, plain JAX), an ``nnx.Module`` or an
        Equinox module. Its floating arrays are looked at, and nothing is changed.
      *args: What else the loss takes, such as the batch. Arrays that span processes
        must be passed here: JAX lets no function close over them.

    Returns:
      A ``ReversalReport``: a table and a verdict when printed, and the same as data.

    Raises:
      TypeError: If ``loss`` returns something else, or not floating.
      ValueError: If a loss is no scalar, or ``params`` has no floating array.
    """
    if not callable(loss):
        raise TypeError(f"`loss` must be a function, got {loss!r}.")
    try:
        return _report(_Loss(loss, params, args, traced=True))
    # The loss has an `if` on the scale, converts it, or has a rule that closes over it.
    except jax.errors.JAXTypeError:
        return _report(_Loss(loss, params, args, traced=False))


class _Result(NamedTuple):
    """Both losses, the logits, and the inner products of the rows of each leaf."""

    losses: list[np.ndarray]
    logits: np.ndarray
    products: np.ndarray

    def dot(self, a: int, b: int) -> np.ndarray:
        return self.products[:, a, b]

    def norm(self, row: int) -> np.ndarray:
        return np.sqrt(self.dot(row, row))

    def arrived(self) -> np.ndarray:
        """Returns <arrived, through>, 0 for leaves whose through may be rounding."""
        total = math.sqrt(self.dot(_OPEN, _OPEN).sum())
        return self.dot(_ARRIVED, _THROUGH) * (self.norm(_THROUGH) > 1e-3 * total)

    def varies(self) -> bool:
        """Whether a logit varies by more than rounding; True if there are no logits."""
        z = self.logits
        return not (z.size and (np.ptp(z, axis=0) <= 1e-6 * np.abs(z).max()).all())


class _Loss:
    """The loss as a program, and its gradients with the layers given, open and shut."""

    def __init__(self, loss: Callable[..., Any], params: Any, args: Any, traced: bool):
        flat, structure = jax.tree.flatten_with_path((params, args))
        count, kinds = len(jax.tree.leaves(params)), jax.Array | np.ndarray | np.generic
        arrays = {i: v for i, (_, v) in enumerate(flat) if isinstance(v, kinds)}
        inexact = (i for i, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.inexact))
        self.moving = {i: arrays[i] for i in inexact if i < count}
        if not self.moving:
            raise ValueError(f"`params` must hold a float array, got {count} others.")
        # Of an nnx.Variable, the path ends in the value that it holds.
        keys = ([k for k in flat[i][0][1:] if str(k) != ".value"] for i in self.moving)
        self.paths = [keystr(tuple(path), simple=True, separator=".") for path in keys]
        self.arrays, self.results, self.other = arrays, {}, None

        def terms(arrays: Any, scale: Any) -> Any:
            filled = [arrays.get(i, leaf) for i, (_, leaf) in enumerate(flat)]
            params, args = jax.tree.unflatten(structure, filled)
            return self._terms(loss(params, scale, *args))

        one = self._program(terms, 1.0, traced)
        self.programs = {1.0: one, 0.5: one if traced else self._program(terms, 0.5)}

    def _terms(self, returned: Any) -> list[Any]:
        """Returns label loss, domain loss and logits; a sum counts as the second."""
        self.sum_only = not isinstance(returned, tuple | list)
        terms = (0.0, returned, []) if self.sum_only else returned
        kinds = jax.Array | np.ndarray | int | float | list
        if len(terms) != 3 or not all(isinstance(term, kinds) for term in terms):
            raise TypeError(
                "`loss` must return a scalar or (label_loss, domain_loss, "
                f"domain_logits), each an array, got {returned!r}."
            )
        losses = "label_loss", "loss" if self.sum_only else "domain_loss"
        terms = list(map(as_floating, (*losses, "domain_logits"), terms))
        for name, term in zip(losses, terms, strict=False):
            if term.shape:
                raise ValueError(f"`{name}` must be a scalar, got shape {term.shape}.")
        return [term.astype(float) for term in terms]

    def _program(self, terms: Any, scale: float, traced: bool = False) -> Any:
        """Returns a function that differentiates a weighted sum of the terms."""
        from jax.extend.core import jaxpr_as_fun  # It takes 30 ms to import.

        read = jax.make_jaxpr(terms, () if traced else 1)(self.arrays, scale)
        switched = with_switches(read)
        self.layers = switched is not read

        def total(moving: Any, arrays: Any, scale: Any, weights: Any):
            leaves = jax.tree.leaves(arrays | moving) + [scale] * traced
            terms = jaxpr_as_fun(switched)(*leaves)
            weighted = (w * jnp.sum(t) for w, t in zip(weights, terms, strict=True))
            return sum(weighted), terms

        gradients = jax.grad(total, has_aux=True)
        return jax.jit(jax.vmap(gradients, None, axis_size=3, axis_name=AXIS))

    def run(self, weights: Any, scale: float = 1.0, nudge: float = 0.0) -> _Result:
        """Returns the result for a weighted sum of the terms, at parameters nearby."""
        key = *weights, scale, nudge
        if key not in self.results:
            with jax.debug_nans(False), jax.debug_infs(False):  # Nearby it may be nan.
                given = _nudged(self.moving, nudge), self.arrays, scale, weights
                grads, terms = jax.tree.map(_on_host, self.programs[scale](*given))
            self.other = self.other or [g[OPEN] for g in grads.values()]
            products = np.stack(list(map(_products, grads.values(), self.other)))
            *losses, logits = (np.atleast_1d(term[0]) for term in terms)
            self.results[key] = _Result(losses, logits, products)
        return self.results[key]

    def anywhere(self, weights: Any, row: int, sure: np.ndarray) -> np.ndarray:
        """Returns where the row is not 0: here, or nearby for leaves not ``sure``."""
        # It may be 0 here by chance, such as behind a layer that starts at 0.
        here = self.run(weights).norm(row) > 0
        if not here.any() or not (here | sure).all():
            here |= self.run(weights, nudge=_NEARBY).norm(row) > 0
        return here

    def strength(self, scale: float) -> float:
        """Returns the strength of the reversal; nan if nothing comes back."""
        for nudge in (0.0, _NEARBY):
            result = self.run(_DOMAIN, scale, nudge)
            if square := result.dot(_THROUGH, _THROUGH).sum():
                return float(-result.dot(_ARRIVED, _THROUGH).sum() / square)
        return math.nan


@jax.jit
def _nudged(moving: Any, nudge: Any) -> Any:
    """Returns values of the same sign nearby, and small ones for 0."""
    moved = {}
    for i, v in moving.items():
        shape = v.shape or (1,)
        ramp = 1 + jax.lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1)
        step = (nudge * ramp / shape[-1]).astype(v.dtype).reshape(v.shape)
        moved[i] = v * (1 + step) + jnp.where(v == 0, step / v.size**0.5, 0)
    return moved


def _on_host(array: Any) -> np.ndarray:
    if not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array, np.result_type(array.dtype, np.float32))


@np.errstate(invalid="ignore", over="ignore")
def _products(g: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the inner products of the rows of one leaf."""
    through, arrived = g[OPEN] - g[SHUT], g[GIVEN] - g[SHUT]
    rows = np.stack([g[OPEN], g[SHUT], through, arrived, other, g[OPEN] - other])
    flat = rows.reshape(len(rows), -1)
    # Over the largest value, so that squares of small gradients do not vanish.
    top = np.abs(flat).max(axis=1, initial=0).astype(float)
    flat /= np.where(top, top, 1)[:, None].astype(flat.dtype)
    return np.real(flat @ flat.conj().T) * np.outer(top, top)


def _report(loss: _Loss) -> ReversalReport:
    domain = loss.run(_DOMAIN)
    label = domain if loss.sum_only else loss.run(_LABEL)
    busy = domain.norm(_OPEN) + label.norm(_OPEN) > 0
    through = loss.anywhere(_DOMAIN, _THROUGH, busy)
    plain = loss.anywhere(_DOMAIN, _SHUT, busy)
    found = list(_findings(loss, domain, label, through, plain))
    kinds = np.where(plain, "not reversed" if loss.sum_only else "plain", "none")
    kinds = np.where(through, "reversed", kinds)
    # Of a sum, what does not pass through the layers counts as the label gradient.
    a, b = (_SHUT, _THROUGH) if loss.sum_only else (_OPEN, _OTHER)

    def row(path: str, kind: str, chosen: Any) -> LeafReport:
        dots = label.products[chosen].sum(axis=0)
        norm, other = math.sqrt(dots[a, a]), math.sqrt(dots[b, b])
        cosine = dots[a, b] / (norm * other) if norm * other else math.nan
        return LeafReport(path, kind, norm, other, float(cosine))

    return ReversalReport(
        tuple(row(path, str(kinds[i]), [i]) for i, path in enumerate(loss.paths)),
        row(f"together: {through.sum()} of {len(through)}", "reversed", through),
        loss.strength(1.0),
        float(domain.logits.std(axis=0).max()) if domain.logits.size else math.nan,
        tuple(finding for finding in found if finding.kind in _PROBLEMS),
        tuple(finding for finding in found if finding.kind in _NOTES),
    )


def _findings(loss: _Loss, domain: Any, label: Any, through: Any, plain: Any) -> Any:
    strength = loss.strength(1.0)

    def found(kind: str, chosen: np.ndarray = through) -> Finding:
        paths = [path for path, c in zip(loss.paths, chosen, strict=True) if c]
        names = ", ".join(paths[:3]) + f" and {len(paths) - 3} more" * (len(paths) > 3)
        text = (_PROBLEMS | _NOTES)[kind]
        return Finding(kind, text.format(names=names, strength=strength))

    values = domain.products, label.products, domain.losses
    if not all(np.isfinite(value).all() for value in values):
        yield found("not_finite")
        return
    half = loss.run(_DOMAIN, 0.5)
    nearby = domain if domain.norm(_THROUGH).any() else loss.run(_DOMAIN, 1.0, _NEARBY)
    twice = nearby.arrived() > 0
    if not np.allclose(domain.losses, half.losses, rtol=1e-5, atol=0):
        yield found("scale_in_loss")
    elif not through.any():
        if not loss.layers and half.norm(_CHANGE).sum() > 1e-3 * half.norm(_OPEN).sum():
            yield found("unreadable")
        elif loss.sum_only or (plain & loss.anywhere(_LABEL, _OPEN, ~plain)).any():
            yield found("missing")
        elif not nearby.norm(_OPEN).any():
            yield found("no_domain_gradient")
        elif nearby.varies():
            yield found("detached")
    elif twice.any() or strength < 0:
        yield found("twice", twice if twice.any() else through)
    elif math.isclose(strength, loss.strength(0.5), rel_tol=1e-3):
        yield found("scale_unused")
    elif abs(strength - 1) > 0.01:
        yield found("strength")
    turned = label.arrived() < 0
    if turned.any() and not loss.sum_only:
        yield found("label_reversed", turned)
    weights, row = (_DOMAIN, _SHUT) if loss.sum_only else (_LABEL, _OPEN)
    alone = through & ~loss.anywhere(weights, row, ~through)
    trains = loss.sum_only or (plain & ~through).any()
    if alone.any():
        yield found("only_reversed" if trains else "behind", alone)
    elif through.any() and not trains:
        yield found("untrained")
    # The logits tell a part that goes round the layer from a penalty in the loss.
    both = through & plain & (not loss.sum_only)
    if both.any() and (both := both & loss.anywhere(_LOGITS, _SHUT, ~both)).any():
        yield found("bypassed", both)
    if domain.losses[1] < 0:
        yield found("negative_loss")
    # Logits grow with the parameters; probabilities stay where they are.
    at = (loss.run(_DOMAIN, nudge=nudge).logits for nudge in (0.0, 1000.0))
    if not domain.varies():
        yield found("constant_output")
    elif domain.logits.size and all(np.array_equal(z, z.clip(0, 1)) for z in at):
        yield found("probabilities")
