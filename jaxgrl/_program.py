"""The program of a loss: its reversal layers, and its gradients with and without them.

A layer is an identity with its own derivative rule. Behind each layer goes a switch
that decides in the backward pass whether the rule is used (given) or replaced by a
plain copy (open) or a stop_gradient (shut). One vmap runs all settings of the switches
at once. Its axis has a name, so a switch inside a scan or a jit can read its setting.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from ._dtypes import at_least_float32

# All layers given, open or shut; then for each layer: it alone shut, it alone given,
# while the others are open.
_GIVEN, _OPEN, _SHUT, _ALONE = range(4)
_AXIS = "jaxgrl_switch_setting"
_LIBRARIES = os.path.dirname(os.path.dirname(jax.__file__)), os.path.dirname(__file__)

# Rows of gradients: with the layers open and shut, what passes through them, what
# arrives of it; then the domain gradient, the difference from it, and the parameter.
# The rest are what passes through each layer alone, and what arrives of it.
OPEN, SHUT, THROUGH, ARRIVED, DOMAIN, CHANGE, VALUE, EACH = range(8)

Replace = Callable[[JaxprEqn, list[int | None]], list[JaxprEqn]]


class Result(NamedTuple):
    """What the loss returned, and the inner products of the rows of each leaf.

    Attributes:
      label: The label loss; 0 if the loss returns the sum alone.
      domain: The domain loss, or the sum.
      low: The smallest domain logit.
      high: The largest domain logit.
      spread: The largest standard deviation of a logit over the batch.
      varies: Whether a logit varies over the batch by more than rounding.
      products: ``[leaves, rows, rows]``, in double precision.
    """

    label: float
    domain: float
    low: float
    high: float
    spread: float
    varies: bool
    products: np.ndarray

    def dot(self, a: int, b: int) -> np.ndarray:
        """Returns the inner product of two rows, for each leaf."""
        return self.products[:, a, b]

    def norm(self, row: int) -> np.ndarray:
        """Returns the norm of a row, for each leaf."""
        return np.sqrt(self.dot(row, row))


class Program:
    """A loss, traced once, and its gradients for all settings of the switches.

    Attributes:
      lines: Where each layer is called.
      layers: How many switches there are.
    """

    def __init__(self, loss: Callable[..., Any], point: Any, fixed: Any):
        self._point, self._fixed = point, fixed
        self._traced = jax.make_jaxpr(loss)(point, fixed, 1.0)
        self.lines = layer_lines(self._traced)
        # Each switch costs two backward passes. Of many layers, those of one line
        # share one.
        few = self.lines if len(set(self.lines)) <= 4 else ["?"] * len(self.lines)
        names = list(dict.fromkeys(few)) if len(few) > 4 else few
        self._switch([i if names is few else names.index(n) for i, n in enumerate(few)])

    def _switch(self, switches: list[int | None]) -> None:
        """Puts layers on switches of these numbers; None leaves a layer as it is."""
        self._switches = switches
        self.layers = len({s for s in switches if s is not None})
        loss = jaxpr_as_fun(with_switches(self._traced, switches))
        settings = _ALONE + 2 * self.layers if self.layers > 1 else _ALONE
        gradients = jax.vmap(
            functools.partial(_gradients, loss),
            in_axes=None,  # pyright: ignore[reportArgumentType]
            axis_size=settings,
            axis_name=_AXIS,
        )

        def first(*args: Any) -> Any:
            grads, aux = gradients(*args)
            return grads, jax.tree.map(lambda a: a[0], aux)

        self._gradients = jax.jit(first)
        self._domain, self._results = None, {}

    def drop(self, layers: set[int]) -> None:
        """Takes the switches of these layers away: their rules stay as they are."""
        kept = [i for i in range(self.layers) if i not in layers]
        self._switch([kept.index(s) if s in kept else None for s in self._switches])

    def run(self, weights: Any, scale: float = 1.0, nudge: float = 0.0) -> Result:
        """Returns the result for a weighted sum of label loss, domain loss and logits.

        ``nudge`` moves every parameter away from where it is, up to that part of it.
        """
        key = weights, scale, nudge
        if key not in self._results:
            args = self._point, self._fixed, scale, weights, nudge
            # The other point may lie where the loss is not defined.
            with jax.debug_nans(False), jax.debug_infs(False):
                grads, aux = self._gradients(*args)
                if self._domain is None:
                    self._domain = grads
                top, products = _products(grads, self._domain, self._point)
            top, products = np.asarray(top, float), np.asarray(products, float)
            products *= top[:, :, None] * top[:, None, :]
            values = [v.item() for v in jax.device_get(aux)]
            self._results[key] = Result(*values, products)
        return self._results[key]

    def each(self, layer: int) -> tuple[int, int]:
        """Returns the rows of one layer: what passes through it, what arrives."""
        first = THROUGH if self.layers == 1 else EACH + 2 * layer
        return first, first + 1


def _gradients(
    loss: Any, point: Any, fixed: Any, scale: Any, weights: Any, nudge: Any
) -> Any:
    def total(point: Any) -> Any:
        moved = [_nudged(p, nudge, i) for i, p in enumerate(point)]
        label, domain, logits = loss(*moved, *jax.tree.leaves(fixed), scale)
        label, domain, logits = (
            jnp.asarray(a, at_least_float32(a.dtype)) for a in (label, domain, logits)
        )
        seen = jnp.sum(logits * _wave(logits.shape, 0).astype(logits.dtype))
        value = sum(w * v for w, v in zip(weights, (label, domain, seen), strict=True))
        rows = logits if logits.ndim else logits[None]
        low, high = jnp.min(rows, axis=0), jnp.max(rows, axis=0)
        rounding = 8 * jnp.finfo(rows.dtype).eps * jnp.max(jnp.abs(rows))
        spread = jnp.max(jnp.std(rows, axis=0))
        varies = jnp.any(high - low > rounding)
        return value, (label, domain, jnp.min(low), jnp.max(high), spread, varies)

    return jax.grad(total, has_aux=True)(point)


def _wave(shape: tuple[int, ...], phase: int) -> jax.Array:
    """Returns numbers from 0 to 1 that are all different, cheap to compile."""
    size = np.prod(shape, dtype=int)
    wave = jnp.sin(jnp.arange(phase, phase + size, dtype=jnp.float32))
    return (1 + wave.reshape(shape)) / 2


def _nudged(value: Any, nudge: Any, phase: int) -> Any:
    """Returns a value nearby of the same sign, or a small one for 0."""
    wave = _wave(value.shape, phase)
    step = (nudge * wave).astype(value.dtype)
    small = step / np.sqrt(value.size).astype(value.dtype)
    return value * (1 + step) + jnp.where(value == 0, small, 0)


@jax.jit
def _products(gradients: Any, domain: Any, point: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the inner products of the rows of each leaf, over their largest values.

    Computed where the gradients are: they may span processes.
    """
    return jax.tree.map(
        lambda *a: jnp.stack(a),
        *[_of_leaf(*leaf) for leaf in zip(gradients, domain, point, strict=True)],
    )


def _of_leaf(g: Any, domain: Any, value: Any) -> tuple[jax.Array, jax.Array]:
    def wide(a: Any) -> jax.Array:
        parts = (a.real, a.imag) if jnp.iscomplexobj(a) else (a,)
        return jnp.stack([p.astype(at_least_float32(a.dtype)) for p in parts], axis=1)

    g, domain, value = wide(g), wide(domain), wide(jnp.conj(value)[None])
    rows = [
        *(g[_OPEN], g[_SHUT], g[_OPEN] - g[_SHUT], g[_GIVEN] - g[_SHUT]),
        *(domain[_OPEN], g[_OPEN] - domain[_OPEN], value[0]),
    ]
    for shut in range(_ALONE, len(g), 2):
        rows += [g[_OPEN] - g[shut], g[shut + 1] - g[shut]]
    rows = jnp.stack(rows)
    axes = tuple(range(1, rows.ndim))
    top = jnp.max(jnp.abs(rows), axis=axes, keepdims=True)
    rows = rows / jnp.where(top == 0, 1, top)
    products = jnp.sum(rows[:, None] * rows[None], axis=[a + 1 for a in axes])
    return top.reshape(-1), products


def layer_lines(program: Any) -> list[str]:
    """Returns the line of code that calls each layer, in the order of the program."""
    lines = []

    def note(eqn: JaxprEqn, _: list[int | None]) -> list[JaxprEqn]:
        frames = getattr(eqn.source_info.traceback, "frames", ())
        names = (f"{f.file_name}:{f.line_num}" for f in frames)
        lines.append(next((n for n in names if not n.startswith(_LIBRARIES)), "?"))
        return [eqn]

    _replace_layers(program, note)
    return lines


def with_switches(program: Any, switches: list[int | None]) -> Any:
    """Returns the program with a switch behind each layer that has a number."""
    numbers = iter(switches)

    def switched(eqn: JaxprEqn, wires: list[int | None]) -> list[JaxprEqn]:
        number = next(numbers)
        return [eqn] if number is None else list(_switched(eqn, wires, number))

    return _replace_layers(program, switched)


def _switched(eqn: JaxprEqn, wires: list[int | None], layer: int) -> Iterator[JaxprEqn]:
    outs = [v if w is None else Var(v.aval) for v, w in zip(eqn.outvars, wires, strict=True)]
    yield eqn.replace(outvars=outs)
    for out, y, wire in zip(eqn.outvars, outs, wires, strict=True):
        if wire is not None:
            (switch,) = jax.make_jaxpr(_switch(layer))(y.aval, y.aval).jaxpr.eqns
            # The context holds the mesh where the layer is inside a shard_map.
            ends = {"invars": [eqn.invars[wire], y], "outvars": [out]}
            yield switch.replace(**ends, ctx=eqn.ctx)


def _switch(layer: int) -> Callable[[Any, Any], Any]:
    """Returns ``(x, y) -> y``, whose gradient goes to y, to x or to neither."""

    @jax.custom_vjp
    def switch(x: Any, y: Any) -> Any:
        del x
        return y

    def backward(_: None, ct: Any) -> Any:
        setting, alone = jax.lax.axis_index(_AXIS), _ALONE + 2 * layer
        given = (setting == _GIVEN) | (setting == alone + 1)
        shut = (setting == _SHUT) | (setting == alone)
        return jnp.where(given | shut, 0, ct), jnp.where(given, ct, 0)

    switch.defvjp(lambda x, y: (y, None), backward)
    return switch


def _replace_layers(program: Any, replace: Replace) -> Any:
    """Returns the program with ``replace(eqn, wires)`` in place of each layer.

    What holds no layer stays the same object, by which JAX's caches know it.
    """
    if isinstance(program, ClosedJaxpr) and not isinstance(program, Jaxpr):
        inner = _replace_layers(program.jaxpr, replace)
        return program if inner is program.jaxpr else program.replace(jaxpr=inner)
    eqns = []
    for eqn in program.eqns:
        if wires := _wires(eqn):
            eqns += replace(eqn, wires)
        elif _rule_body(eqn) is not None:
            eqns.append(eqn)  # Its derivative does not come from its body.
        else:
            params = _in_params(eqn.params, replace)
            eqns.append(eqn.replace(params=params) if params else eqn)
    same = len(eqns) == len(program.eqns) and all(map(_is, eqns, program.eqns))
    return program if same else program.replace(eqns=eqns)


def _in_params(params: dict[str, Any], replace: Replace) -> dict[str, Any] | None:
    """Returns an equation's parameters with the layers inside replaced, if any."""
    changed = {}
    for name, value in params.items():
        leaves, structure = jax.tree.flatten(value, is_leaf=_is_jaxpr)
        new = [_replace_layers(v, replace) if _is_jaxpr(v) else v for v in leaves]
        if not all(map(_is, new, leaves)):
            changed[name] = jax.tree.unflatten(structure, new)
    # Under JAX_REMAT3, one parameter is an object with the parameters.
    rule = params.get("_prim")
    if rule is not None and (inner := _in_params(rule.params, replace)):
        changed["_prim"] = copy.copy(rule)
        vars(changed["_prim"]).update(inner, params=inner)
    return {**params, **changed} if changed else None


def _is(a: Any, b: Any) -> bool:
    return a is b


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _rule_body(eqn: JaxprEqn) -> Any:
    """Returns what an equation with its own derivative rule computes, else None."""
    # Under JAX_CUSTOM_VJP3 and JAX_CUSTOM_JVP3, an object holds the parameters.
    params = getattr(eqn.params.get("_prim"), "params", eqn.params)
    if not params.keys() & {"jvp_jaxpr_fun", "jvp_rule", "bwd"}:
        return None
    return _opened(params.get("call_jaxpr", params.get("traced")))


def _opened(value: Any) -> Any:
    while not isinstance(value, Jaxpr | None):
        value = value.jaxpr
    return value


def _wires(eqn: JaxprEqn) -> list[int | None]:
    """Returns which input each output of a layer copies; [] for any other equation."""
    floating = [jnp.issubdtype(out.aval.dtype, jnp.inexact) for out in eqn.outvars]
    sources = [_source(eqn, i) if f else None for i, f in enumerate(floating)]
    layers = [source for source in sources if source and source[1] == 1]
    whole = layers and len(layers) == sum(floating)
    return [source and source[0] for source in sources] if whole else []


def _source(eqn: JaxprEqn, output: int) -> tuple[int, int] | None:
    """Returns which input the output copies, and how many rules are passed between."""
    # One case to select from: a copy, batched like the index (see the layer's _tie).
    if str(eqn.primitive) == "select_n" and len(eqn.invars) == 2:
        return 1, 0
    rule = _rule_body(eqn)
    is_jit = "donated_invars" in eqn.params
    body = _opened(eqn.params["jaxpr"]) if is_jit else rule
    if body is None or len(body.invars) != len(eqn.invars):
        return None
    var, rules = body.outvars[output], 0
    makers = {v: (e, i) for e in body.eqns for i, v in enumerate(e.outvars)}
    while not isinstance(var, Literal) and var not in body.invars:
        # Of a variable that nothing makes, the jaxpr holds the value.
        maker, i = makers.get(var, (None, 0))
        if maker is None or not (source := _source(maker, i)):
            return None
        var, rules = maker.invars[source[0]], rules + source[1]
    if isinstance(var, Literal):
        return None
    return body.invars.index(var), rules if rule is None else 1
