"""Puts a switch on each reversal layer in the program of a loss.

A layer is an identity with its own derivative rule. Its switch is read in the backward
pass, from the index of a named axis: a vmap over that axis differentiates the program
for all three settings at once, and reaches layers inside a scan or a jit too.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

AXIS = "jaxgrl_switch"
# The layers as they are, as plain copies, and as stop_gradients.
GIVEN, OPEN, SHUT = range(3)


def _choose(_: None, cts: tuple[Any, Any]) -> tuple[Any]:
    """Returns what comes back through the rule, around it, or nothing.

    An identity that does not change the sign, such as one that clips gradients, is no
    layer and keeps its rule.
    """
    ruled, plain = cts
    agreement = (jnp.sign(ruled) * jnp.sign(plain).conj()).real
    is_layer = jnp.sum(agreement, dtype=jnp.float32) < 0
    setting = jax.lax.axis_index(AXIS)
    around = jnp.where(setting == OPEN, plain, 0)
    return (jnp.where(is_layer & (setting != GIVEN), around, ruled),)


_fork = jax.custom_vjp(lambda x: (x, x))
_fork.defvjp(lambda x: ((x, x), None), _choose)
_join = jax.custom_vjp(lambda ruled, plain: ruled)
_join.defvjp(lambda ruled, plain: (ruled, None), lambda _, ct: (ct, ct))


def with_switches(program: Any) -> tuple[Any, int]:
    """Returns the program with a switch on each layer, and their number.

    A part without a layer stays the same object: JAX's caches go by that.
    """
    if not hasattr(program, "eqns"):
        return program, 0
    # A ClosedJaxpr, which newer JAX does not tell from a Jaxpr.
    if not isinstance(program, Jaxpr):
        inner, count = with_switches(program.jaxpr)
        return (program.replace(jaxpr=inner) if count else program), count
    eqns, total = [], 0
    for eqn in program.eqns:
        new, count = [eqn], 0
        if wires := _wires(eqn):
            new, count = _switched(eqn, wires), 1
        elif _rule_body(eqn) is None:
            params, count = _in_params(eqn.params)
            new = [eqn.replace(params=params) if count else eqn]
        eqns, total = eqns + new, total + count
    return (program.replace(eqns=eqns) if total else program), total


def _switched(eqn: JaxprEqn, wires: dict[int, int]) -> list[JaxprEqn]:
    def traced(function: Any, invars: list[Any], outvars: list[Any]) -> JaxprEqn:
        (new,) = jax.make_jaxpr(function)(*(var.aval for var in invars)).jaxpr.eqns
        # The context holds the mesh if the layer is inside a shard_map.
        return new.replace(invars=invars, outvars=outvars, ctx=eqn.ctx)

    forks, joins, invars, outvars = [], [], list(eqn.invars), list(eqn.outvars)
    for output, wire in wires.items():
        out: Any = eqn.outvars[output]
        into, around, outvars[output] = (Var(out.aval) for _ in range(3))
        forks.append(traced(_fork, [invars[wire]], [into, around]))
        joins.append(traced(_join, [outvars[output], around], [out]))
        invars[wire] = into
    return [*forks, eqn.replace(invars=invars, outvars=outvars), *joins]


def _in_params(params: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the parameters of an equation with switches, and their number."""
    params, total = dict(params), 0
    for name, value in params.items():
        leaves, structure = jax.tree.flatten(value, lambda v: hasattr(v, "eqns"))
        switched = [with_switches(leaf) for leaf in leaves]
        if count := sum(count for _, count in switched):
            params[name] = jax.tree.unflatten(structure, [leaf for leaf, _ in switched])
        # Under JAX_REMAT3, an object holds the parameters.
        elif name == "_prim":
            inner, count = _in_params(value.params)
            params[name] = copy.copy(value)
            vars(params[name]).update(inner, params=inner)
        total += count
    return params, total


def _rule_body(eqn: JaxprEqn) -> Any:
    """Returns what an equation with its own derivative rule computes; else None."""
    # Under JAX_CUSTOM_VJP3 and JAX_CUSTOM_JVP3, an object holds the parameters.
    params = getattr(eqn.params.get("_prim"), "params", eqn.params)
    has_rule = params.keys() & {"bwd", "jvp_jaxpr_fun", "jvp_rule"}
    return _opened(params.get("call_jaxpr", params.get("traced"))) if has_rule else None


def _opened(value: Any) -> Any:
    return value if isinstance(value, Jaxpr) else _opened(value.jaxpr)


def _wires(eqn: JaxprEqn) -> dict[int, int]:
    """Returns which input each output of a layer copies; {} for any other equation."""
    wires = {}
    for i, out in enumerate(eqn.outvars):
        if jnp.issubdtype(getattr(out.aval, "dtype", bool), jnp.inexact):
            wires[i], rules = _source(eqn, i) or (0, 0)
            if rules != 1:
                return {}
    return wires


def _source(eqn: JaxprEqn, output: int) -> tuple[int, int] | None:
    """Returns which input the output copies, and by how many rules."""
    # One case to select from is a copy (see the layer's _tie).
    if str(eqn.primitive) == "select_n" and len(eqn.invars) == 2:
        return 1, 0
    rule = _rule_body(eqn)
    is_jit = "donated_invars" in eqn.params
    body = _opened(eqn.params["jaxpr"]) if is_jit else rule
    if body is None or len(body.invars) != len(eqn.invars):
        return None
    var, rules = body.outvars[output], 0
    makers = {v: (e, i) for e in body.eqns for i, v in enumerate(e.outvars)}
    while not isinstance(var, Literal) and var in makers:
        maker, i = makers[var]
        if not (source := _source(maker, i)):
            return None
        var, rules = maker.invars[source[0]], rules + source[1]
    # A literal or a constant is no input.
    index = next((i for i, v in enumerate(body.invars) if v is var), None)
    return None if index is None else (index, rules if rule is None else 1)
