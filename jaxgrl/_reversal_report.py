"""Is it really reversed? Which parameter gets which gradient, and what is wrong."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ._gradient_flow import Flow, LeafReport, Probe, is_penalty, listed, norm, wide


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
        fine = "reversed once, by `scale`: nothing to mend in the reversal"
        if math.isnan(self.logit_spread):
            fine += ", as far as the sum of the losses tells"
        verdict = self.problems or (fine,)
        return "\n".join([*lines, *(f"verdict: {line}" for line in verdict)])


def reversal_report(loss: Callable[[Any, Any], Any], params: Any) -> ReversalReport:
    """Returns which parameters receive the reversed gradient, and what is wrong.

    The gradient of a DANN is affine in the scale: the label gradient, minus scale times
    the domain gradient where it is reversed. Gradients at four scales from 0 to 1 tell
    what is reversed once, twice or in the loss too; a scale of nan marks whatever the
    layer touches; a finite difference, which no reversal can turn round, measures
    how strongly. Nothing of ``params`` is changed.

    Named are: a layer that is missing, in front of both heads, behind the discriminator
    or inside it, passed by or passed twice; a scale that is not passed on, that weights
    the loss too, or in the layer's place; detached features, or a discriminator that is
    not trained; a domain loss that is subtracted; a discriminator whose output is
    constant (by construction, or dead), or is probabilities. A batch without one of the
    domains does not show.

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
    probe = Probe(loss, params)
    label, domain, logits = probe.values(1.0)
    spread = _spread(logits) if logits is not None else math.nan
    # In 0 to 1: a loss may clip the scale to where it expects it.
    scales = np.array([0, 1 / 3, 2 / 3, 1])
    grads = [probe.gradients(float(s)) for s in scales]
    if not_finite := _not_finite(probe, label, domain, grads):
        leaves = tuple(LeafReport(p, "none", *[math.nan] * 3) for p in probe.paths)
        return _report(leaves, math.nan, spread, [not_finite])

    flow = Flow(probe, scales, grads)
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
        if strength < 0:
            problems.append(
                f"the gradient is not reversed: its strength is about {strength:.2g} x "
                "`scale`. Is there a second layer (a DANN brings its own), or is the "
                "scale negative?"
            )
        elif strength <= 0.5 or strength >= 2:
            problems.append(
                f"the reversal is about {strength:.2g} times as strong as `scale` (or "
                "a stop_gradient changes the domain gradient): does anything multiply "
                "the scale, such as a schedule that ends too low?"
            )
        problems += _where(flow)
    problems += _discriminator(flow, label, domain, logits, spread)
    return _report(flow.leaves(), strength, spread, problems)


def _not_finite(
    probe: Probe, label: float, domain: float, grads: list[list[np.ndarray]]
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


def _strength_in_loss(flow: Flow) -> str:
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


def _why_not_reversed(probe: Probe, flow: Flow) -> str:
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
    if not any(map(norm, shared)):
        return f"no parameter is reversed: {detached} Nothing comes back to them"
    slope = probe.slope(shared)
    if not slope < 0:
        return f"no parameter is reversed: {missing} The gradient arrives as it is"
    strength = -sum(norm(g) ** 2 for g in shared) / slope
    return (
        f"no parameter is reversed by `scale`: {unused} It has a strength of its own, "
        f"about {strength:.2g}"
    )


def _where(flow: Flow) -> list[str]:
    """Returns what is wrong with the place of the layer."""
    problems = []
    probe = flow.probe
    rows = list(
        zip(probe.paths, flow.reversed, flow.trained, flow.reached, strict=True)
    )
    both = [path for path, r in zip(probe.paths, flow.label_reversed, strict=True) if r]
    if both:
        problems.append(
            f"the label gradient is reversed too: {listed(both)}. The layer belongs in "
            "front of the discriminator alone"
        )
    behind = [path for path, r, t, _ in rows if r and not t]
    if behind and any(r and t for _, r, t, _ in rows):
        problems.append(
            f"reversed without a label gradient: {listed(behind)}. Is the layer behind "
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
            if r and norm(z) > 0.01 * norm(c) and not is_penalty(z, wide(p))
        ]
    if around:
        problems.append(
            f"a plain domain gradient passes the layer by: {listed(around)}. Does "
            "everything that the discriminator sees pass through the layer?"
        )
    return problems


def _discriminator(
    flow: Flow, label: float, domain: float, logits: np.ndarray | None, spread: float
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


def _spread(logits: np.ndarray) -> float:
    """Returns the largest standard deviation of a logit over the batch."""
    if not logits.ndim or not logits.size:
        return math.nan
    rows = logits.reshape(len(logits), -1)
    return float(np.max(np.std(rows, axis=0)))
