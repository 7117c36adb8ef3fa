"""Reversal layers in a traced program, each with a switch for its derivative rule.

A layer is an identity with its own derivative rule. The switch decides in the backward
pass whether the rule is used (given) or replaced by a plain copy (open) or by a
stop_gradient (shut). One vmap runs all settings at once. Its axis has a name, so that a
switch inside a scan or a jit can read its setting.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

# All layers given, open or shut. Then for each switch: it alone shut, it alone given,
# while the others are open.
GIVEN, OPEN, SHUT, ALONE = range(4)
AXIS = "jaxgrl_switch_setting"
_LIBRARIES = os.path.dirname(os.path.dirname(jax.__file__)), os.path.dirname(__file__)

_Replace = Callable[[JaxprEqn, list[int | None]], list[JaxprEqn]]


def layer_lines(program: Any) -> list[str]:
    """Returns the line of code that calls each layer, in the order of the program."""
    lines = []

    def note(eqn: JaxprEqn, _: list[int | None]) -> list[JaxprEqn]:
        frames = getattr(eqn.source_info.traceback, "frames", ())
        names = (f"{f.file_name}:{f.line_num}" for f in frames)
        lines.append(next((n for n in names if not n.startswith(_LIBRARIES)), ""))
        return [eqn]

    _replace_layers(program, note)
    return lines


def with_switches(program: Any, numbers: list[int | None]) -> Any:
    """Returns the program with a switch behind each layer that has a number."""
    each = iter(numbers)

    def switched(eqn: JaxprEqn, wires: list[int | None]) -> list[JaxprEqn]:
        number = next(each)
        return [eqn] if number is None else list(_switched(eqn, wires, number))

    return _replace_layers(program, switched)


def _switched(
    eqn: JaxprEqn, wires: list[int | None], number: int
) -> Iterator[JaxprEqn]:
    pairs = list(zip(eqn.outvars, wires, strict=True))
    copies: list[Any] = [out if w is None else Var(out.aval) for out, w in pairs]
    yield eqn.replace(outvars=copies)
    for (out, wire), y in zip(pairs, copies, strict=True):
        if wire is not None:
            (switch,) = jax.make_jaxpr(_switch(number))(y.aval, y.aval).jaxpr.eqns
            ends = {"invars": [eqn.invars[wire], y], "outvars": [out]}
            # The context holds the mesh if the layer is inside a shard_map.
            yield switch.replace(**ends, ctx=eqn.ctx)


def _switch(number: int) -> Callable[[Any, Any], Any]:
    """Returns ``(x, y) -> y``, whose gradient goes to y, to x or to neither."""

    @jax.custom_vjp
    def switch(x: Any, y: Any) -> Any:
        del x
        return y

    def backward(_: None, ct: Any) -> Any:
        setting, alone = jax.lax.axis_index(AXIS), ALONE + 2 * number
        given = (setting == GIVEN) | (setting == alone + 1)
        shut = (setting == SHUT) | (setting == alone)
        return jnp.where(given | shut, 0, ct), jnp.where(given, ct, 0)

    switch.defvjp(lambda x, y: (y, None), backward)
    return switch


def _replace_layers(program: Any, replace: _Replace) -> Any:
    """Returns the program with ``replace(eqn, wires)`` in place of each layer.

    A part without a layer stays the same object: JAX's caches go by that.
    """
    if not isinstance(program, Jaxpr):
        inner = _replace_layers(program.jaxpr, replace)
        return program if inner is program.jaxpr else program.replace(jaxpr=inner)
    eqns = []
    for eqn in program.eqns:
        if wires := _wires(eqn):
            eqns += replace(eqn, wires)
        elif _rule_body(eqn) is None and (params := _in_params(eqn.params, replace)):
            eqns.append(eqn.replace(params=params))
        else:
            eqns.append(eqn)
    same = len(eqns) == len(program.eqns) and all(map(_is, eqns, program.eqns))
    return program if same else program.replace(eqns=eqns)


def _in_params(params: dict[str, Any], replace: _Replace) -> dict[str, Any] | None:
    """Returns the parameters with the layers in them replaced; None if none is."""
    changed = {}
    for name, value in params.items():
        leaves, structure = jax.tree.flatten(value, is_leaf=_is_jaxpr)
        new = [_replace_layers(v, replace) if _is_jaxpr(v) else v for v in leaves]
        if not all(map(_is, new, leaves)):
            changed[name] = jax.tree.unflatten(structure, new)
    # Under JAX_REMAT3, an object holds the parameters.
    if (rule := params.get("_prim")) and (new := _in_params(rule.params, replace)):
        changed["_prim"] = copy.copy(rule)
        vars(changed["_prim"]).update(new, params=new)
    return {**params, **changed} if changed else None


def _is(a: Any, b: Any) -> bool:
    return a is b


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _rule_body(eqn: JaxprEqn) -> Any:
    """Returns what an equation with its own derivative rule computes; else None."""
    # Under JAX_CUSTOM_VJP3 and JAX_CUSTOM_JVP3, an object holds the parameters.
    params = getattr(eqn.params.get("_prim"), "params", eqn.params)
    has_rule = params.keys() & {"bwd", "jvp_jaxpr_fun", "jvp_rule"}
    return _opened(params.get("call_jaxpr", params.get("traced"))) if has_rule else None


def _opened(value: Any) -> Any:
    return value if isinstance(value, Jaxpr) else _opened(value.jaxpr)


def _wires(eqn: JaxprEqn) -> list[int | None]:
    """Returns which input each output of a layer copies; [] for any other equation."""
    kinds = [getattr(out.aval, "dtype", bool) for out in eqn.outvars]
    floating = [jnp.issubdtype(kind, jnp.inexact) for kind in kinds]
    sources = [_source(eqn, i) if f else None for i, f in enumerate(floating)]
    ruled = sum(source is not None and source[1] == 1 for source in sources)
    return [s and s[0] for s in sources] if 0 < ruled == sum(floating) else []


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
