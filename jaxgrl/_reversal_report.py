"""Is it really reversed? Which parameter gets which gradient, and what is wrong."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.core import jaxpr_as_fun

from ._checks import check_floating
from ._dtypes import at_least_float32
from ._program import ALONE, AXIS, GIVEN, OPEN, SHUT, layer_lines, with_switches

_PROBLEMS = {
    "not_finite": "A loss or a gradient is not finite: nothing more can be checked. Are "
    "the inputs finite? Is a domain out of range for the logits?",
    "missing": "The domain gradient is not reversed. Does the input of the discriminator "
    "pass through gradient_reversal?",
    "silent": "No gradient comes back through the layer. Are the features detached, or "
    "is the output of the discriminator constant? Return the losses and logits to see.",
    "detached": "The domain gradient reaches no parameter that the label loss trains. "
    "Are the features detached (stop_gradient)?",
    "no_domain_gradient": "The domain loss has no gradient, here and nearby. Is the output "
    "of the discriminator a softmax of one logit?",
    "scale_unused": "The strength of the reversal is {strength:.3g} at every `scale`. "
    "Pass `scale` to the layer.",
    "scale_in_loss": "`scale` weights the loss: the discriminator does not learn while "
    "it is small. Pass it to the layer alone.",
    "twice": "The gradient passes two layers or more: {names}. Keep one. jaxgrl's DANN "
    "contains one.",
    "wrong_sign": "The gradient is not reversed: its strength is {strength:.3g} x "
    "`scale`. Is the scale negative?",
    "label_reversed": "The label gradient is reversed too: {names}. Put the layer in "
    "front of the discriminator alone.",
    "behind": "The layer reverses the discriminator too: {names}. Put it in front of the "
    "discriminator, not behind it.",
    "untrained": "The domain loss trains no discriminator. Are its parameters detached, "
    "or not in `params`?",
    "bypassed": "Part of what the discriminator sees does not pass through the layer: "
    "{names} receive a plain domain gradient too. Pass all of it through the layer.",
    "probabilities": "The domain logits stay between 0 and 1. Are they probabilities? "
    "Remove the sigmoid or softmax: domain_loss applies its own.",
}
_NOTES = {
    "unreadable": "No layer was found, but the gradient changes with `scale`. Is the "
    "reversal written with stop_gradient? Use gradient_reversal, which can be read.",
    "strength": "The strength of the reversal is {strength:.3g} x `scale`. Does "
    "something multiply the scale, such as a schedule that ends too low?",
    "only_reversed": "Reversed, and not trained by the label loss: {names}. Is the layer "
    "behind the discriminator or inside it? It may be right for one domain's parameters.",
    "negative_loss": "The loss is negative, which a cross entropy cannot be. Is the "
    "domain loss subtracted? Add it: the layer does the subtraction.",
    "constant_output": "The output of the discriminator is the same for all examples. It "
    "may start at 0, or the features may be equal. Otherwise it has died.",
}

# The weights of the label loss, the domain loss and the domain logits.
_LABEL, _DOMAIN, _LOGITS = np.eye(3).tolist()
# How far parameters are moved to see whether a gradient is 0 by chance.
_NEARBY = 0.1
# Of the rows of each leaf: with the layers open, with the layers shut, what passes
# through, what arrives of it, the domain gradient, the difference from it, the leaf.
_OPEN, _SHUT, _THROUGH, _ARRIVED, _OTHER, _CHANGE, _VALUE, _EACH = range(8)


class Finding(NamedTuple):
    """One thing that the report found.

    Attributes:
      kind: Its name, for code to compare. It does not change between versions.
      text: What was found, and what to do.
    """

    kind: str
    text: str


class LeafReport(NamedTuple):
    """What one parameter receives.

    Attributes:
      path: Its place in ``params``, as ``jax.tree_util.keystr`` writes it.
      domain: Its domain gradient: ``"reversed"``, ``"plain"`` or ``"none"``. From the
        sum of the losses the last two cannot be told apart: ``"not reversed"``.
      label_norm: The norm of the label gradient.
      domain_norm: The norm of the domain gradient, before the reversal.
      cosine: Of the angle between the two. Above 0, what helps the label classifier
        helps the discriminator.
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
      strength: The strength of the reversal at scale 1: 1 if all is right, nan if
        nothing is reversed.
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
        table = [("parameter", "domain gradient", "|label|", "|domain|", "cosine")]
        for path, kind, *numbers in (*self.leaves, self.reversed):
            shown = ("" if math.isnan(v) else f"{v:.3g}" for v in numbers)
            table.append((path, kind, *shown))  # pyright: ignore
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        columns = list(zip("<<>>>", widths, strict=True))
        lines = [
            "  ".join(f"{t:{a}{w}}" for t, (a, w) in zip(row, columns, strict=True))
            for row in table
        ]
        if not math.isnan(self.strength):
            lines.append(f"strength of the reversal: {self.strength:.4g} x scale")
        if not math.isnan(self.logit_spread):
            lines.append(f"spread of the domain logits: {self.logit_spread:.3g}")
        for grade, found in {"problem": self.problems, "note": self.notes}.items():
            lines += [f"{grade} ({kind}): {text}" for kind, text in found]
        if not self.problems:
            coarse = ", as far as the sum of the losses shows"
            lines.append(f"no problem found{coarse * math.isnan(self.logit_spread)}")
        return "\n".join(map(str.rstrip, lines))


def reversal_report(
    loss: Callable[..., Any], params: Any, *args: Any
) -> ReversalReport:
    """Returns which parameters receive the reversed gradient, and what is wrong.

    It reads the program of the loss (its jaxpr). A layer is an identity with its own
    derivative rule: this library's, five lines by hand, ``optax.scale_gradient``. The
    loss is differentiated with the layers as they are (given), with each a plain copy
    (open), and with each a ``stop_gradient`` (shut):

        through  = gradient(open)  - gradient(shut)
        arrived  = gradient(given) - gradient(shut)
        strength = -<arrived, through> / |through|**2

    An identity that does not reverse, such as one that clips gradients, is left as it
    is. Nothing of ``params`` is changed.

    Args:
      loss: A function of ``(params, scale, *args)``, with a batch of every domain, that
        returns ``(label_loss, domain_loss, domain_logits)``: the two terms as they are
        added, and the logits ``[batch]``, ``[batch, 1]`` or ``[batch, K]``. Or the sum
        of the losses alone, which shows less. It is traced, with a traced scale.
      params: A pytree of parameters (Linen, Haiku, plain JAX), an ``nnx.Module`` or an
        Equinox module. The report looks at its floating arrays.
      *args: What else the loss takes, such as the batch. Arrays that span processes
        must be passed here: JAX lets no function close over them.

    Returns:
      A ``ReversalReport``: a table and a verdict when printed, and the same as data.

    Raises:
      TypeError: If ``loss`` returns something else, or not floating.
      ValueError: If a loss is no scalar, or ``params`` has no floating array.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgrl import domain_loss, gradient_reversal, reversal_report
      >>> def loss(params, scale, x, y):
      ...     features = params["features"] * x
      ...     label_loss = jnp.mean((features[:2] - y) ** 2)
      ...     logits = params["discriminator"] * gradient_reversal(features, scale)
      ...     return label_loss, domain_loss(logits, jnp.array([0, 0, 1, 1])), logits
      >>> params = {"features": jnp.array(1.0), "discriminator": jnp.array(1.0)}
      >>> x, y = jnp.array([1.0, 2.0, 3.0, 5.0]), jnp.array([0.0, 1.0])
      >>> report = reversal_report(loss, params, x, y)
      >>> for leaf in report.leaves:
      ...     print(leaf.path, leaf.domain)
      discriminator plain
      features reversed
      >>> report.problems
      ()
    """
    program = _Loss(loss, params, args)
    program.keep_reversals()
    domain = program.run(_DOMAIN)
    label = domain if program.sum_only else program.run(_LABEL)
    busy = domain.norm(_OPEN) + label.norm(_OPEN) > 0
    through = program.anywhere(_DOMAIN, _THROUGH, busy)
    found = list(_verdicts(program, domain, label, through, busy))
    # Of a sum, what does not pass through the layers counts as the label gradient.
    rows = (_SHUT, _THROUGH, _THROUGH) if program.sum_only else (_OPEN, _OPEN, _OTHER)
    squares = label.dot(rows[0], rows[0]), domain.dot(rows[1], rows[1])
    dots = label.dot(rows[0], rows[2])
    plain = "not reversed" if program.sum_only else "plain"
    kinds = np.where(program.anywhere(_DOMAIN, _SHUT, busy), plain, "none")
    kinds = np.where(through, "reversed", kinds)
    judged = not program.sum_only and domain.logits.size

    def row(path: str, kind: str, chosen: Any) -> LeafReport:
        a, b = (math.sqrt(square[chosen].sum()) for square in squares)
        cosine = dots[chosen].sum() / (a * b) if a * b else math.nan
        return LeafReport(path, kind, a, b, float(cosine))

    return ReversalReport(
        tuple(row(p, str(kinds[i]), [i]) for i, p in enumerate(program.paths)),
        row(f"together: {through.sum()} of {len(through)}", "reversed", through),
        -program.factor(_DOMAIN, 1.0),
        float(domain.rows().std(axis=0).max()) if judged else math.nan,
        tuple(f for f in found if f.kind in _PROBLEMS),
        tuple(f for f in found if f.kind in _NOTES),
    )


class _Result(NamedTuple):
    """The terms of the loss, and the inner products of the rows of each leaf."""

    label: float
    domain: float
    logits: np.ndarray
    products: np.ndarray

    def dot(self, a: int, b: int) -> np.ndarray:
        return self.products[:, a, b]

    def norm(self, row: int) -> np.ndarray:
        return np.sqrt(self.dot(row, row))

    def rows(self) -> np.ndarray:
        return self.logits.reshape(len(self.logits) if self.logits.ndim else 1, -1)

    def varies(self) -> bool:
        """Whether a logit varies over the batch by more than rounding."""
        return bool((np.ptp(self.rows(), 0) > 1e-6 * np.abs(self.logits).max()).any())


class _Loss:
    """The loss, traced once, and its gradients with all settings of the switches."""

    def __init__(self, loss: Callable[..., Any], params: Any, args: tuple[Any, ...]):
        flat, structure = jax.tree.flatten_with_path((params, args))
        leaves = [leaf for _, leaf in flat]
        count = len(jax.tree.leaves(params))
        kinds = jax.Array | np.ndarray | np.generic
        arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]
        inexact = [i for i in arrays if jnp.issubdtype(leaves[i].dtype, jnp.inexact)]
        moving = [i for i in inexact if i < count]
        if not moving:
            raise ValueError(
                "`params` must have a floating array to differentiate, got "
                f"{count} leaves of other kinds."
            )
        order = moving + [i for i in arrays if i not in moving]
        names = (
            jax.tree_util.keystr(flat[i][0][1:], simple=True, separator=".")
            for i in moving
        )
        # Of an nnx.Variable, the path ends in the value that it holds.
        self.paths = [name.removesuffix(".value") for name in names]
        self.arrays = [leaves[i] for i in order]
        self.sum_only = False

        def terms(arrays: Any, scale: Any) -> Any:
            filled = list(leaves)
            for i, value in zip(order, arrays, strict=True):
                filled[i] = value
            params, args = jax.tree.unflatten(structure, filled)
            return self._terms(loss(params, scale, *args))

        self.program = jax.make_jaxpr(terms)(self.arrays, 1.0)
        lines = layer_lines(self.program)
        # Each switch costs two backward passes: one for a line, and no more than four.
        rank = list(dict.fromkeys(lines))
        self.switch([min(rank.index(line), 3) for line in lines])

    def _terms(self, returned: Any) -> tuple[Any, Any, Any]:
        """Returns label loss, domain loss and logits; a sum counts as the second."""
        self.sum_only = not isinstance(returned, tuple | list)
        terms = (0.0, returned, 0.0) if self.sum_only else tuple(returned)
        kinds = jax.Array | np.ndarray | int | float | list
        if len(terms) != 3 or not all(isinstance(term, kinds) for term in terms):
            raise TypeError(
                "`loss` must return a scalar or (label_loss, domain_loss, "
                f"domain_logits), each an array, got {returned!r}."
            )
        label, domain, logits = map(jnp.asarray, terms)
        losses = {
            "label_loss": label,
            "loss" if self.sum_only else "domain_loss": domain,
        }
        for name, value in {**losses, "domain_logits": logits}.items():
            check_floating(name, value)
            if name in losses and value.shape:
                raise ValueError(f"`{name}` must be a scalar, got shape {value.shape}.")
        return label, domain, logits

    def switch(self, numbers: list[int | None]) -> None:
        """Puts each layer on the switch of its number; None leaves it as it is."""
        self.numbers, self.results, self.other = numbers, {}, None
        self.switches = len(set(numbers) - {None})
        loss, count = (
            jaxpr_as_fun(with_switches(self.program, numbers)),
            len(self.paths),
        )

        def gradients(arrays: Any, scale: Any, weights: Any, nudge: Any) -> Any:
            def total(point: Any) -> Any:
                moved = [_nudged(value, nudge) for value in point]
                terms = map(jnp.asarray, loss(*moved, *arrays[count:], scale))
                terms = [t.astype(at_least_float32(t.dtype)) for t in terms]
                values = zip(weights, terms, strict=True)
                return sum(w * jnp.sum(t) for w, t in values), terms

            return jax.grad(total, has_aux=True)(arrays[:count])

        size = ALONE + 2 * self.switches * (self.switches > 1)
        axes = {"in_axes": None, "axis_size": size, "axis_name": AXIS}
        self.gradients = jax.jit(jax.vmap(gradients, **axes))

    def run(
        self, weights: list[float], scale: float = 1.0, nudge: float = 0.0
    ) -> _Result:
        """Returns the result for a weighted sum of the terms, at parameters nearby."""
        key = *weights, scale, nudge
        if key not in self.results:
            # The loss may not be defined nearby.
            with jax.debug_nans(False), jax.debug_infs(False):
                pair = self.gradients(self.arrays, scale, weights, nudge)
            grads, terms = jax.tree.map(_on_host, pair)
            self.other = self.other or [g[OPEN] for g in grads]
            values = map(_on_host, self.arrays)
            products = list(map(_products, grads, self.other, values))
            self.results[key] = _Result(*(t[0] for t in terms), np.stack(products))
        return self.results[key]

    def anywhere(self, weights: list[float], row: int, sure: np.ndarray) -> np.ndarray:
        """Returns for which leaves the row is not 0, here or nearby.

        It may be 0 here by chance, such as behind a layer that starts at 0. What is
        sure needs no second look.
        """
        here = self.run(weights).norm(row) > 0
        if here.any() and (here | sure).all():
            return here
        return here | (self.run(weights, nudge=_NEARBY).norm(row) > 0)

    def factor(
        self, weights: list[float], scale: float, number: int | None = None
    ) -> float:
        """Returns what the layers multiply the gradient by; nan if none comes."""
        alone = number is not None and self.switches > 1
        row = _EACH + 2 * number if alone else _THROUGH
        for nudge in (0.0, _NEARBY):
            result = self.run(weights, scale, nudge)
            if square := result.dot(row, row).sum():
                return float(result.dot(row, row + 1).sum() / square)
        return math.nan

    def keep_reversals(self) -> None:
        """Leaves the layers that reverse nothing as they are."""
        kept = [i for i in range(self.switches) if self._reverses(i)]
        if len(kept) < self.switches:
            self.switch([kept.index(i) if i in kept else None for i in self.numbers])

    def _reverses(self, number: int) -> bool:
        """Whether a layer changes the sign, or depends on the scale, or is not used."""
        factors = []
        for weights in (_DOMAIN, _LABEL):
            factor = self.factor(weights, 1.0, number)
            if factor < 0:
                return True
            half = self.factor(weights, 0.5, number)
            if factor > 0 and not math.isclose(factor, half, rel_tol=1e-3):
                return True
            factors.append(factor)
        return all(map(math.isnan, factors))

    def penalty(self, weights: list[float], row: int) -> np.ndarray:
        """Returns for which leaves the row is a multiple of the leaf itself."""
        result, sizes = self.run(weights), [a.size for a in self.arrays]
        least = (1 - 1e-5) * result.norm(row) * result.norm(_VALUE)
        is_multiple = np.abs(result.dot(row, _VALUE)) > least
        return is_multiple & (np.array(sizes[: len(self.paths)]) > 1)

    def in_series(self) -> np.ndarray:
        """Returns for which leaves the gradient passes one switch after another."""
        found = np.zeros(len(self.paths), bool)
        for nudge in (0.0, _NEARBY) if self.switches > 1 else ():
            result = self.run(_DOMAIN, nudge=nudge)
            rows = range(_EACH, _EACH + 2 * self.switches, 2)
            passed = sum(result.dot(row, _THROUGH) for row in rows)
            found |= passed > 1.01 * result.dot(_THROUGH, _THROUGH)
        return found


def _nudged(value: Any, nudge: Any) -> Any:
    """Returns a value of the same sign nearby, or a small one for 0."""
    shape = value.shape
    ramp = (
        jax.lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1) if shape else 0.0
    )
    step = jnp.asarray(nudge * (1 + ramp) / (shape or (1,))[-1], value.dtype)
    return value * (1 + step) + jnp.where(value == 0, step / value.size**0.5, 0)


def _on_host(array: Any) -> np.ndarray:
    if (
        not getattr(array, "is_fully_replicated", True)
        and not array.is_fully_addressable
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


@np.errstate(invalid="ignore", over="ignore")
def _products(g: np.ndarray, other: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Returns the inner products of the rows of one leaf."""
    through, arrived = g[OPEN] - g[SHUT], g[GIVEN] - g[SHUT]
    rows = [g[OPEN], g[SHUT], through, arrived, other, g[OPEN] - other, value.conj()]
    for shut, given in zip(g[ALONE::2], g[ALONE + 1 :: 2], strict=True):
        rows += [g[OPEN] - shut, given - shut]
    flat = np.stack(rows).reshape(len(rows), -1)
    # Over the largest value, so that squares of small gradients do not vanish.
    top = np.abs(flat).max(axis=1, initial=0).astype(float)
    flat = flat / np.where(top, top, 1)[:, None].astype(flat.dtype)
    return (flat @ flat.conj().T).real * np.outer(top, top)


def _verdicts(
    loss: _Loss, domain: _Result, label: _Result, through: np.ndarray, busy: np.ndarray
) -> Iterator[Finding]:
    strength, at_half = (-loss.factor(_DOMAIN, scale) for scale in (1.0, 0.5))

    def found(kind: str, chosen: np.ndarray = through) -> Finding:
        paths = [path for path, c in zip(loss.paths, chosen, strict=True) if c]
        more = f" and {len(paths) - 3} more" * (len(paths) > 3)
        names = ", ".join(paths[:3]) + more
        text = (_PROBLEMS | _NOTES)[kind]
        return Finding(kind, text.format(names=names, strength=strength))

    if not all(np.isfinite(r.products).all() for r in (domain, label)):
        yield found("not_finite")
        return
    half = loss.run(_DOMAIN, 0.5)
    around = loss.anywhere(_DOMAIN, _SHUT, busy) & ~loss.penalty(_DOMAIN, _SHUT)
    if not np.allclose(domain[:2], half[:2], rtol=1e-5, atol=0):
        yield found("scale_in_loss")
    elif not through.any():
        yield from map(found, _not_reversed(loss, half, around))
    elif (several := loss.in_series()).any():
        yield found("twice", several)
    elif strength < 0 and math.isclose(at_half, strength / 4, rel_tol=1e-3):
        yield found("twice")
    elif math.isclose(at_half, strength, rel_tol=1e-3):
        yield found("scale_unused")
    elif strength < 0:
        yield found("wrong_sign")
    elif abs(strength - 1) > 0.01:
        yield found("strength")

    if (turned := label.dot(_ARRIVED, _THROUGH) < 0).any() and not loss.sum_only:
        yield found("label_reversed", turned)
    weights, row = (_DOMAIN, _SHUT) if loss.sum_only else (_LABEL, _OPEN)
    trained = loss.anywhere(weights, row, ~through) & ~loss.penalty(weights, row)
    alone, plain = through & ~trained, around & ~through
    if alone.any():
        is_note = plain.any() or loss.sum_only
        yield found("only_reversed" if is_note else "behind", alone)
    elif through.any() and not plain.any():
        yield found("untrained")
    # The logits tell a part that goes round the layer from a penalty in the loss.
    if (around := around & through).any() and not loss.sum_only:
        if (around := around & loss.anywhere(_LOGITS, _SHUT, ~around)).any():
            yield found("bypassed", around)

    if domain.domain < 0:
        yield found("negative_loss")
    if loss.sum_only or not domain.logits.size:
        return
    if not domain.varies():
        yield found("constant_output")
    # Logits grow with the parameters; probabilities stay where they are.
    elif all(
        ((logits >= 0) & (logits <= 1)).all()
        for logits in (loss.run(_DOMAIN, nudge=n).logits for n in (0.0, 1000.0))
    ):
        yield found("probabilities")


def _not_reversed(loss: _Loss, half: _Result, around: np.ndarray) -> Iterator[str]:
    """Yields the kind of the finding if nothing is reversed."""
    nearby = loss.run(_DOMAIN, nudge=_NEARBY)
    if half.norm(_CHANGE).sum() > 1e-3 * half.norm(_OPEN).sum() and not loss.switches:
        yield "unreadable"
    elif loss.sum_only:
        yield "silent" if loss.switches else "missing"
    elif not nearby.norm(_OPEN).any():
        yield "no_domain_gradient"
    elif (around & loss.anywhere(_LABEL, _OPEN, ~around)).any():
        yield "missing"
    elif nearby.varies():
        yield "detached"
