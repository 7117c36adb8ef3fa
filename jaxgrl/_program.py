"""Puts a switch on each reversal layer in the program of a loss.

The backward pass reads it from the index of a named axis. A vmap over that axis
differentiates for all three settings at once, also inside a scan or a jit.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp

AXIS = "jaxgrl_switch"
# The layers as they are, as plain copies, and as stop_gradients.
GIVEN, OPEN, SHUT = range(3)


def _choose(_: None, cts: tuple[Any, Any]) -> tuple[Any]:
    """Returns what comes back through the rule, around it, or nothing."""
    ruled, plain = cts
    agreement = (jnp.sign(ruled) * jnp.sign(plain).conj()).real
    # An identity that keeps the sign, such as one that clips gradients, is no layer.
    is_layer = jnp.sum(agreement, dtype=jnp.float32) < 0
    # An index over the mesh of a shard_map would count as one that varies over devices.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        setting = jax.lax.axis_index(AXIS)
    around = jnp.where(setting == OPEN, plain, 0)
    return (jnp.where(is_layer & (setting != GIVEN), around, ruled),)


_fork = jax.custom_vjp(lambda x: (x, x))
_fork.defvjp(lambda x: ((x, x), None), _choose)
_join = jax.custom_vjp(lambda ruled, plain: ruled)
_join.defvjp(lambda ruled, plain: (ruled, None), lambda _, ct: (ct, ct))


def with_switches(part: Any) -> Any:
    """Returns a program, or a parameter of an equation, with a switch on each layer."""
    # A part without a layer stays the same object: JAX's caches go by that.
    if hasattr(part, "eqns"):
        # An older JAX has a ClosedJaxpr around the Jaxpr.
        if (closed := getattr(part, "jaxpr", part)) is not part:
            inner = with_switches(closed)
            return part if inner is closed else part.replace(jaxpr=inner)
        eqns = [new for eqn in part.eqns for new in _switched(eqn)]
        return part if eqns == part.eqns else part.replace(eqns=eqns)
    # Under JAX_REMAT3, an object holds the parameters.
    if isinstance(getattr(part, "params", None), dict):
        inner = _in_params(part.params)
        if inner is not part.params:
            part = copy.copy(part)
            vars(part).update(inner, params=inner)
    return part


def _in_params(params: dict[str, Any]) -> dict[str, Any]:
    leaves, structure = jax.tree.flatten(params, lambda v: hasattr(v, "eqns"))
    new = list(map(with_switches, leaves))
    same = all(a is b for a, b in zip(new, leaves, strict=True))
    return params if same else jax.tree.unflatten(structure, new)


def _switched(eqn: Any) -> list[Any]:
    """Returns the equations that take the place of one."""
    dtypes = (getattr(out.aval, "dtype", bool) for out in eqn.outvars)
    inexact = [i for i, d in enumerate(dtypes) if jnp.issubdtype(d, jnp.inexact)]
    sources = [_source(eqn, i) for i in inexact]
    if not sources or any(source is None or source[1] != 1 for source in sources):
        # A layer inside another function with its own rule is none.
        params = _in_params(eqn.params) if _rule_body(eqn) is None else eqn.params
        return [eqn if params is eqn.params else eqn.replace(params=params)]

    def traced(function: Any, *avals: Any) -> Any:
        # A new function, since JAX would give variables that it gave before.
        (new,) = jax.make_jaxpr(lambda *x: function(*x))(*avals).jaxpr.eqns
        # The context holds the mesh if the layer is inside a shard_map.
        return new.replace(ctx=eqn.ctx)

    forks, joins, around = [], [], {}
    invars, outvars = list(eqn.invars), list(eqn.outvars)
    for output, (wire, _) in zip(inexact, sources, strict=True):
        out = eqn.outvars[output]
        if wire not in around:
            forks.append(traced(_fork, out.aval).replace(invars=[invars[wire]]))
            invars[wire], around[wire] = forks[-1].outvars
        join = traced(_join, out.aval, out.aval)
        outvars[output] = join.invars[0]
        joins.append(join.replace(invars=[join.invars[0], around[wire]], outvars=[out]))
    return [*forks, eqn.replace(invars=invars, outvars=outvars), *joins]


def _rule_body(eqn: Any) -> Any:
    """Returns what an equation with its own derivative rule computes; else None."""
    # Under JAX_CUSTOM_VJP3 and JAX_CUSTOM_JVP3, an object holds the parameters.
    params = getattr(eqn.params.get("_prim"), "params", eqn.params)
    has_rule = params.keys() & {"bwd", "jvp_jaxpr_fun", "jvp_rule"}
    return _opened(params.get("call_jaxpr", params.get("traced"))) if has_rule else None


def _opened(value: Any) -> Any:
    inner = getattr(value, "jaxpr", value)
    return value if inner is value else _opened(inner)


def _source(eqn: Any, output: int) -> Any:
    """Returns which input the output copies and by how many rules, or None."""
    # One case to select from is a copy (see the layer's _tie).
    if str(eqn.primitive) == "select_n" and len(eqn.invars) == 2:
        return 1, 0
    rule = _rule_body(eqn)
    # Only a jit has donated_invars.
    body = _opened(eqn.params["jaxpr"]) if "donated_invars" in eqn.params else rule
    if body is None or len(body.invars) != len(eqn.invars):
        return None
    var, rules = body.outvars[output], 0
    for maker in reversed(body.eqns):
        if var in maker.outvars:
            if not (source := _source(maker, maker.outvars.index(var))):
                return None
            var, rules = maker.invars[source[0]], rules + source[1]
    rules = rules if rule is None else 1
    # A literal or a constant is no input.
    return (body.invars.index(var), rules) if var in body.invars else None
