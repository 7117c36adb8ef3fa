"""Is it really reversed? Which parameter gets which gradient, and what is wrong."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import check_floating
from ._program import ARRIVED, CHANGE, DOMAIN, OPEN, SHUT, THROUGH, VALUE, Program

# The weights of label loss, domain loss and domain logits.
_LABEL, _DOMAIN, _LOGITS = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
# A gradient may be 0 here by chance, such as that of a layer that starts at 0.
_ELSEWHERE = 0.1
# Grade, kind and text of a finding.
_Found = tuple[str, str, str]


class Finding(NamedTuple):
    """One thing that the report found.

    Attributes:
      kind: A name for code to compare. It does not change between versions.
      text: What was found, and what to do.
    """

    kind: str
    text: str


class LeafReport(NamedTuple):
    """What one parameter receives.

    Attributes:
      path: Its place in ``params``, as ``jax.tree_util.keystr`` writes it.
      domain: Its domain gradient: ``"reversed"``, ``"plain"`` or ``"none"``. A loss
        that returns the sum alone shows ``"not reversed"`` for the last two.
      label_norm: The norm of the gradient of the label loss.
      domain_norm: The norm of the gradient of the domain loss, before the reversal.
      cosine: The cosine of the angle between the two. Above 0, what helps the label
        classifier helps the discriminator.
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
      strength: The strength of the reversal at scale 1: 1 as it should be. nan if
        nothing is reversed.
      logit_spread: The standard deviation of the domain logits over the batch, the
        largest of the K; nan if the loss does not return them.
      problems: A ``Finding`` for each mistake; empty for a correct model.
      notes: A ``Finding`` for each thing that is worth a look, and may be right.
    """

    leaves: tuple[LeafReport, ...]
    reversed: LeafReport
    strength: float
    logit_spread: float
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]

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
            lines.append(f"strength of the reversal: {self.strength:.4g} x scale")
        if not math.isnan(self.logit_spread):
            lines.append(f"spread of the domain logits: {self.logit_spread:.3g}")
        for grade, found in {"problem": self.problems, "note": self.notes}.items():
            lines += [f"{grade} ({kind}): {text}" for kind, text in found]
        if not self.problems:
            coarse = (
                ""
                if not math.isnan(self.logit_spread)
                else (", as far as the sum of the losses shows")
            )
            lines.append(f"no problem found{coarse}")
        return "\n".join(lines)


def reversal_report(
    loss: Callable[..., Any], params: Any, *args: Any
) -> ReversalReport:
    """Returns which parameters receive the reversed gradient, and what is wrong.

    It reads the program of the loss (its jaxpr). A reversal layer is an identity with
    its own derivative rule: this library's, five lines by hand, or
    ``optax.scale_gradient``. The loss is differentiated with the layers as they are
    given, with each a plain copy (open), and with each a ``stop_gradient`` (shut):

        through  = gradient(open)  - gradient(shut)
        arrived  = gradient(given) - gradient(shut)
        strength = -<arrived, through> / |through|**2

    An identity with a rule that does not reverse, such as one that clips gradients,
    counts as part of the model. Nothing of ``params`` is changed.

    The problems, by kind: ...

    Args:
      loss: A function of ``(params, scale, *args)``, with a batch of every domain in
        it, that returns ``(label_loss, domain_loss, domain_logits)``: the two terms as
        they are added, and the logits ``[batch]``, ``[batch, 1]`` or ``[batch, K]``. Or
        their sum alone: then the report knows less. It runs under ``jit``, with a
        traced scale.
      params: A pytree of parameters: an ``nnx.Module``, an Equinox module, Linen
        variables, Haiku or plain JAX parameters. Its floating arrays are looked at.
      *args: What else the loss takes, such as the batch. Pass arrays that span
        processes here: JAX does not let a function close over them.

    Returns:
      A ``ReversalReport``: a table and a verdict when printed, and the same as data.

    Raises:
      TypeError: If ``loss`` returns something else, or not floating.
      ValueError: If a loss is no scalar, or ``params`` has no floating array.

    Example:
      >>> import jax, jax.numpy as jnp
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
    return _Reader(loss, params, args).report()


class _Reader:
    def __init__(self, loss: Callable[..., Any], params: Any, args: tuple[Any, ...]):
        flat, structure = jax.tree.flatten_with_path((params, args))
        leaves = [leaf for _, leaf in flat]
        count = len(jax.tree.leaves(params))
        arrays = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, jax.Array | np.ndarray | np.generic)
        ]
        moving = [
            i
            for i in arrays
            if i < count and jnp.issubdtype(leaves[i].dtype, jnp.inexact)
        ]
        if not moving:
            raise ValueError(
                "`params` must have a floating array to differentiate, got "
                f"{count} leaves of other kinds."
            )
        fixed = [i for i in arrays if i not in moving]
        keystr = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
        # Of an nnx.Variable, the path ends in the value that it holds.
        self.paths = [keystr(flat[i][0][1:]).removesuffix(".value") for i in moving]
        self.sizes = np.array([leaves[i].size for i in moving])
        self.sum_only = self.no_logits = False

        def terms(point: Any, fixed_arrays: Any, scale: Any) -> Any:
            filled = list(leaves)
            for i, value in zip(moving + fixed, point + fixed_arrays, strict=True):
                filled[i] = value
            params, args = jax.tree.unflatten(structure, filled)
            return self.terms(loss(params, scale, *args))

        point, rest = ([leaves[i] for i in chosen] for chosen in (moving, fixed))
        self.program = Program(terms, point, rest)
        self.problems: list[Finding] = []
        self.notes: list[Finding] = []

    def terms(self, returned: Any) -> tuple[Any, Any, Any]:
        """Returns label loss, domain loss and logits; a sum counts as the second."""
        self.sum_only = not isinstance(returned, tuple | list)
        values = (0.0, returned, 0.0) if self.sum_only else tuple(returned)
        kinds = jax.Array | np.ndarray | int | float | list
        if len(values) != 3 or not all(isinstance(v, kinds) for v in values):
            raise TypeError(
                "`loss` must return a scalar or (label_loss, domain_loss, "
                f"domain_logits), each an array, got {returned!r}."
            )
        names = ("label_loss", "loss" if self.sum_only else "domain_loss")
        values = [jnp.asarray(v) for v in values]
        for name, value in zip((*names, "domain_logits"), values, strict=True):
            check_floating(name, value)
            if name != "domain_logits" and value.shape:
                raise ValueError(f"`{name}` must be a scalar, got shape {value.shape}.")
        self.no_logits = self.sum_only or not values[2].size
        return tuple(values)

    def anywhere(self, weights: Any, row: int) -> np.ndarray:
        """Returns for which leaves the row is not 0, here or elsewhere."""
        here = self.program.run(weights).norm(row) > 0
        elsewhere = self.program.run(weights, nudge=_ELSEWHERE).norm(row) > 0
        return here | elsewhere

    def factor(self, weights: Any, scale: float, layer: int | None = None) -> float:
        """Returns what the layers multiply the gradient by; nan if nothing passes."""
        rows = (THROUGH, ARRIVED) if layer is None else self.program.each(layer)
        for nudge in (0.0, _ELSEWHERE):
            result = self.program.run(weights, scale, nudge)
            if square := result.dot(rows[0], rows[0]).sum():
                return result.dot(*rows).sum() / square
        return math.nan

    def is_reversal(self, layer: int) -> bool:
        """Whether the layer reverses a gradient, or depends on the scale."""
        factors = [self.factor(w, 1.0, layer) for w in (_DOMAIN, _LABEL)]
        if any(f < 0 for f in factors) or all(map(math.isnan, factors)):
            return True
        halves = [self.factor(w, 0.5, layer) for w in (_DOMAIN, _LABEL)]
        return not np.allclose(factors, halves, rtol=1e-3, equal_nan=True)

    def penalty(self, weights: Any, row: int) -> np.ndarray:
        """Returns for which leaves the row is a multiple of the parameter itself."""
        result = self.program.run(weights)
        product = result.norm(row) * result.norm(VALUE)
        dot = np.abs(result.dot(row, VALUE))
        return (self.sizes > 1) & (dot > (1 - 1e-5) * product)

    def listed(self, chosen: np.ndarray) -> str:
        names = [path for path, c in zip(self.paths, chosen, strict=True) if c]
        return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)

    def report(self) -> ReversalReport:
        program = self.program
        program.drop({i for i in range(program.layers) if not self.is_reversal(i)})
        here, reversed_ = program.run(_DOMAIN), self.anywhere(_DOMAIN, THROUGH)
        label = here if self.sum_only else program.run(_LABEL)
        if what := self.not_finite(here, label):
            text = f"{what} is not finite, so the reversal cannot be checked. "
            text += "Are the inputs finite? Is a domain out of range for the logits?"
            found, strength = [("problem", "not_finite", text)], math.nan
            reversed_ = np.zeros_like(reversed_)
        else:
            strength = -self.factor(_DOMAIN, 1.0)
            found = [*self.verdicts(reversed_, strength), *self.discriminator(here)]
        # Of a sum, what does not pass through the layers counts as the label gradient.
        rows = (SHUT, THROUGH, THROUGH) if self.sum_only else (OPEN, OPEN, DOMAIN)
        squares = label.dot(rows[0], rows[0]), here.dot(rows[1], rows[1])
        dots = label.dot(rows[0], rows[2])
        plain = self.anywhere(_DOMAIN, SHUT)
        kinds = np.where(plain, "not reversed" if self.sum_only else "plain", "none")
        kinds = np.where(reversed_, "reversed", kinds)

        def row(path: str, kind: str, at: Any) -> LeafReport:
            a, b = (math.sqrt(s[at].sum()) for s in squares)
            cosine = dots[at].sum() / (a * b) if a * b else math.nan
            return LeafReport(path, kind, a, b, float(cosine))

        count = f"together: {reversed_.sum()} of {len(self.paths)}"
        return ReversalReport(
            tuple(row(p, str(kinds[i]), [i]) for i, p in enumerate(self.paths)),
            row(count, "reversed", reversed_),
            strength,
            math.nan if self.no_logits else here.spread,
            *(
                tuple(Finding(kind, text) for g, kind, text in found if g == grade)
                for grade in ("problem", "note")
            ),
        )

    def not_finite(self, here: Any, label: Any) -> str:
        if not math.isfinite(here.label):
            return "The label loss"
        if not math.isfinite(here.domain):
            return "The loss" if self.sum_only else "The domain loss"
        finite = np.isfinite(here.products).all() and np.isfinite(label.products).all()
        return "" if finite else "A gradient"

    def verdicts(self, reversed_: np.ndarray, strength: float) -> Iterator[_Found]:
        """Yields what is wrong with the layer: its place, its number, its scale."""
        full, half = (self.program.run(_DOMAIN, s) for s in (1.0, 0.5))
        at_half = -self.factor(_DOMAIN, 0.5)
        if any(
            abs(a - b) > 1e-5 * max(abs(a), abs(b))
            for a, b in zip(full[:2], half[:2], strict=True)
        ):
            if reversed_.any() and not math.isclose(strength, at_half, rel_tol=1e-3):
                text = (
                    "`scale` is applied twice, by the layer and as a weight of the loss. "
                    "Take it out of the loss: the discriminator does not learn while it "
                    "is small"
                )
            else:
                text = (
                    "`scale` weights the loss, and no layer applies it. Pass it to the "
                    "layer instead: the discriminator does not learn while it is small"
                )
            yield "problem", "scale_in_loss", text
        elif not reversed_.any():
            yield self.nothing_reversed(half)
            return
        else:
            yield from self.strengths(reversed_, strength, at_half)
        yield from self.places(reversed_)

    def nothing_reversed(self, half: Any) -> _Found:
        moves = half.norm(CHANGE).sum() > 1e-3 * half.norm(OPEN).sum()
        found = self.program.layers
        if moves and not found:
            return (
                "note",
                "unreadable",
                (
                    "No reversal layer was found, but the gradient changes with `scale`. Is "
                    "the reversal written with stop_gradient? The report cannot read that. "
                    "Use gradient_reversal"
                ),
            )
        if self.sum_only and found:
            return (
                "problem",
                "silent",
                (
                    "A reversal layer was found, but no gradient comes back through it. Are "
                    "the features detached, or is the output of the discriminator constant? "
                    "A loss that returns the two losses and the domain logits shows which"
                ),
            )
        elsewhere = self.program.run(_DOMAIN, nudge=_ELSEWHERE)
        shared = self.anywhere(_LABEL, OPEN) & self.anywhere(_LOGITS, SHUT)
        if self.sum_only or shared.any():
            where = (
                "" if self.sum_only else f" It reaches {self.listed(shared)} as it is."
            )
            return (
                "problem",
                "missing",
                (
                    f"No gradient is reversed.{where} Does the input of the discriminator "
                    "pass through gradient_reversal?"
                ),
            )
        if elsewhere.varies:
            return (
                "problem",
                "detached",
                (
                    "No domain gradient reaches a parameter that the label loss trains. Are "
                    "the features detached (stop_gradient)?"
                ),
            )
        dead = not elsewhere.norm(OPEN).any()
        return (
            "problem" if dead else "note",
            "constant_output",
            (
                "The output of the discriminator does not depend on its input, here and at "
                "other parameters. Is it a softmax over one logit, or has it died? Look at "
                "its activations"
            ),
        )

    def strengths(
        self, reversed_: np.ndarray, strength: float, at_half: float
    ) -> Iterator[_Found]:
        names, several = self.listed(reversed_), self.series(reversed_)
        ratio = at_half / strength
        if several.any() or (strength < 0 and math.isclose(ratio, 0.25, rel_tol=1e-3)):
            names = self.listed(several) or names
            yield (
                "problem",
                "twice",
                (
                    f"The gradient passes more than one reversal layer on its way to {names}. "
                    "Keep one. (jaxgrl's DANN contains one.)"
                ),
            )
        elif math.isclose(ratio, 1, rel_tol=1e-3):
            yield (
                "problem",
                "scale_unused",
                (
                    f"The strength of the reversal does not change with `scale`: it is "
                    f"{strength:.3g}. Pass `scale` to the layer"
                ),
            )
        elif strength < 0:
            yield (
                "problem",
                "wrong_sign",
                (
                    "The gradient is not reversed: its strength is "
                    f"{strength:.3g} x `scale`. Is the scale negative?"
                ),
            )
        elif abs(strength - 1) > 0.01:
            each = [-self.factor(_DOMAIN, 1.0, i) for i in range(self.program.layers)]
            layers = ", ".join(f"{s:.3g}" for s in each)
            of_each = f" (that of the layers: {layers})" if len(each) > 1 else ""
            yield (
                "note",
                "strength",
                (
                    f"The strength of the reversal is {strength:.3g} x `scale`{of_each}. Does "
                    "anything multiply the scale, such as a schedule that ends too low?"
                ),
            )

    def series(self, reversed_: np.ndarray) -> np.ndarray:
        """Returns for which leaves the gradient passes one layer after another."""
        rows = [self.program.each(i)[0] for i in range(self.program.layers)]
        found = np.zeros_like(reversed_)
        for nudge in (0.0, _ELSEWHERE):
            result = self.program.run(_DOMAIN, nudge=nudge)
            passed = sum(result.dot(row, THROUGH) for row in rows)
            found |= passed > 1.01 * result.dot(THROUGH, THROUGH)
        return found & reversed_

    def places(self, reversed_: np.ndarray) -> Iterator[_Found]:
        """Yields what is wrong with the place of the layer."""
        label = self.program.run(_LABEL)
        turned = label.dot(ARRIVED, THROUGH) < 0
        if turned.any() and not self.sum_only:
            yield (
                "problem",
                "label_reversed",
                (
                    f"The label gradient is reversed too: {self.listed(turned)}. Put the "
                    "layer in front of the discriminator alone"
                ),
            )
        weights, row = (_DOMAIN, SHUT) if self.sum_only else (_LABEL, OPEN)
        trained = self.anywhere(weights, row) & ~self.penalty(weights, row)
        alone = reversed_ & ~trained
        plain = self.anywhere(_DOMAIN, SHUT) & ~self.penalty(_DOMAIN, SHUT)
        if self.sum_only or (plain & ~reversed_).any():
            if alone.any():
                yield (
                    "note",
                    "only_reversed",
                    (
                        f"Reversed, and not trained by the label loss: {self.listed(alone)}. "
                        "Is the layer behind the discriminator or inside it? Parameters that "
                        "the target domain alone uses show here too, and may be right"
                    ),
                )
        elif alone.any():
            yield (
                "problem",
                "behind_discriminator",
                (
                    f"The discriminator is reversed too: {self.listed(alone)}. Put the layer "
                    "in front of it, not behind it"
                ),
            )
        else:
            yield (
                "problem",
                "untrained_discriminator",
                (
                    "The domain loss trains no discriminator: no parameter receives its "
                    "gradient as it is. Are the parameters of the discriminator detached, or "
                    "not in `params`?"
                ),
            )
        # The logits tell a part that goes round the layer from a penalty in the loss.
        if not self.sum_only and (plain & reversed_).any():
            around = plain & reversed_ & self.anywhere(_LOGITS, SHUT)
            if around.any():
                yield (
                    "problem",
                    "bypassed",
                    (
                        "A part of what the discriminator sees does not pass through the "
                        f"layer: {self.listed(around)} receive a plain domain gradient too. "
                        "Pass all of it through the layer"
                    ),
                )

    def discriminator(self, here: Any) -> Iterator[_Found]:
        """Yields what is wrong with the domain loss and the domain logits."""
        total = here.label + here.domain
        if min(here.domain, total if self.sum_only else 0) < 0:
            yield (
                "note",
                "negative_loss",
                (
                    f"The {'loss' if self.sum_only else 'domain loss'} is negative "
                    f"({here.domain:.3g}), which a cross entropy cannot be. Is the domain "
                    "loss subtracted? Add it: the layer does the subtraction"
                ),
            )
        if self.no_logits:
            return
        if not here.varies:
            yield (
                "note",
                "constant_output",
                (
                    "The output of the discriminator is the same for every example. That is "
                    "right if its last layer starts at 0, or if all features are equal. "
                    "Otherwise it has died: look at its activations, and fit a fresh "
                    "classifier of domains to the features (jaxgrl.proxy_a_distance)"
                ),
            )
        # Logits grow with the parameters; probabilities stay where they are.
        elif here.low >= 0 and here.high <= 1:
            grown = self.program.run(_DOMAIN, nudge=1000.0)
            if grown.low >= 0 and grown.high <= 1:
                yield (
                    "problem",
                    "probabilities",
                    (
                        "The domain logits stay between 0 and 1. Are they probabilities? "
                        "Remove the sigmoid or softmax: domain_loss applies its own"
                    ),
                )
