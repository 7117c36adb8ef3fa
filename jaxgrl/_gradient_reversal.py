"""The gradient reversal layer: the identity forward, minus scale times the gradient."""

import functools
import numbers
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from ._dtypes import as_float, at_least_float32, is_real

T = TypeVar("T")


class _HasJaxArray(Protocol):
    def __jax_array__(self) -> Any: ...


# A number, an array, an nnx.Variable, or a pytree prefix that holds them. Type checkers
# let complex through: it is part of ArrayLike, which optax's schedules return.
ScaleLike = ArrayLike | _HasJaxArray | Mapping[Any, Any] | list[Any] | tuple[Any, ...]
_SCALE_RULE = (
    "`scale` must be a real number, an array of real numbers, or a pytree prefix of "
    "`x` that holds them"
)


def gradient_reversal(x: T, scale: ScaleLike = 1.0, *, forward_mode: bool = False) -> T:
    """Returns ``x`` unchanged and multiplies its gradient by ``-scale``.

    Forward, ``R(x) = x``: bit for bit, for inf, nan and -0.0 too, and nothing is left
    of it in a compiled program. Backward, ``dR/dx = -scale * I``, at every order: the
    second derivative of ``f(R(x))`` is ``scale**2 * f''``. ``scale`` gets no gradient.
    Source: Ganin and Lempitsky, 2015, https://proceedings.mlr.press/v37/ganin15.html

    Args:
      x: An array, or any pytree. Floating and complex leaves of any shape are reversed.
        Other leaves (integers, booleans, PRNG keys, None, strings) pass through.
      scale: The strength of the reversal, the paper's lambda. May be traced, so that a
        schedule does not recompile anything. One of

        - a real number, or an array of shape ``()``;
        - one value per example: an array whose axes align with the *leading* axes of
          every reversed leaf and are each equal to that leaf's or 1, such as
          ``(batch,)``, ``(batch, 1)`` or ``(1, features)`` for ``(batch, features)``;
        - a pytree prefix of ``x`` holding any of these, one per subtree;
        - an ``nnx.Variable`` that holds one.

        Any real value is legal: 0 sends nothing back, a negative value scales without
        reversing, and -1 is the plain identity. With 0, a gradient of inf becomes nan.
      forward_mode: True defines ``jvp``, ``jacfwd`` and ``linearize`` too, as
        ``-scale * tangent``. With False they raise JAX's TypeError "can't apply
        forward-mode autodiff (jvp) to a custom_vjp function."

    Returns:
      A pytree like ``x``, with the same values, shapes and dtypes. The gradient has the
      dtype of ``x``: the product is computed in float32 or wider and rounded once.

    Raises:
      TypeError: If ``scale`` is complex, None, a string, or neither a number, an array
        nor a pytree prefix of ``x``; or if a leaf of ``x`` has a floating dtype without
        a sign (float8_e8m0fnu), or is a mutable reference.
      ValueError: If ``scale`` is too large for a float, does not align with a reversed
        leaf, or is sharded differently on a mesh with Explicit axes.
    """
    scale = _as_array(scale)
    # Not jax.tree.map, which takes 1 us more of an eager call of 3.5 us.
    leaves, structure = jax.tree.flatten(x)
    # None is no leaf, but as a prefix it would match an x without leaves.
    if scale is None or jax.tree_util.all_leaves([scale]):
        scales = [_as_real(scale)] * len(leaves)
    else:
        scales = jax.tree.leaves(_broadcast_prefix(scale, x))
    reversed_leaves = [
        _reverse_leaf(leaf, s, forward_mode)
        for leaf, s in zip(leaves, scales, strict=True)
    ]
    return jax.tree.unflatten(structure, reversed_leaves)


def _is_wrapped(value: Any) -> bool:
    """Whether value stands for an array without being one, as nnx.Variable does."""
    # Tracers have the attribute too, with the value None.
    return getattr(value, "__jax_array__", None) is not None


def _as_array(value: Any) -> Any:
    return value.__jax_array__() if _is_wrapped(value) else value


def _as_real(scale: Any) -> Any:
    """Returns one scale, checked, as a float or an array."""
    if isinstance(scale, numbers.Real):
        # One Python type, so that 1, True and 1.0 share one trace.
        return as_float("scale", scale)
    dtype = getattr(scale, "dtype", None)
    no_scales = jax.Ref, np.ma.MaskedArray
    is_array = hasattr(scale, "__array__") and not isinstance(scale, no_scales)
    if is_array and is_real(dtype):
        return scale
    shown = f"{dtype}{list(scale.shape)}" if is_array else repr(scale)
    raise TypeError(f"{_SCALE_RULE}, got {shown}.")


def _broadcast_prefix(scale: Any, x: Any) -> Any:
    """Returns the pytree prefix scale, checked, with one scale for each leaf of x."""
    scale = jax.tree.map(lambda s: _as_real(_as_array(s)), scale, is_leaf=_is_wrapped)
    try:
        return jax.tree.broadcast(scale, x)
    except ValueError as error:
        raise TypeError(
            f"{_SCALE_RULE}, got {jax.tree.structure(scale)} for `x` with "
            f"{jax.tree.structure(x)}. One value per example is an array, not a list."
        ) from error


def _reverse_leaf(leaf: Any, scale: Any, forward_mode: bool) -> Any:
    x = _as_array(leaf)
    dtype = getattr(x, "dtype", None)
    if dtype is None or not _is_reversible(dtype):
        return leaf
    if isinstance(x, jax.Ref):
        raise TypeError(
            f"`x` must not hold a mutable reference, got {jax.typeof(x)}. Pass the "
            "value it holds, `x[...]`."
        )
    if not isinstance(scale, float):
        _check_aligned(scale, x)
    if not isinstance(x, Tracer):
        # Nothing differentiates a value that no transformation is tracing.
        return leaf
    tied = isinstance(scale, Tracer)
    # Where forward mode raises, JAX's traceback shows one of the lines that say why.
    return _gradient_reversal(x, scale, forward_mode, tied)  # jvp: forward_mode=True


@functools.cache
def _is_reversible(dtype: Any) -> bool:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return False
    # float(): zero itself does not exist in the dtype that this is about.
    if float(jnp.finfo(dtype).min) >= 0:
        raise TypeError(
            "`x` must have a dtype that can hold a negative gradient, got "
            f"{dtype}, which has no sign."
        )
    return True


def _check_aligned(scale: Any, x: Any) -> None:
    """Raises ValueError unless scale aligns with x on leading axes."""
    if not scale.ndim:
        return
    shape, x_shape = scale.shape, x.shape
    fits = len(shape) <= len(x_shape) and all(
        s == n or s == 1 for s, n in zip(shape, x_shape, strict=False)
    )
    if not fits:
        raise ValueError(
            "`scale` must be a scalar or align with the leading axes of `x`, each of "
            f"its axes equal to that of `x` or 1, got shape {shape} for `x` of shape "
            f"{x_shape}. {_what_fits(x_shape)}"
        )
    spec, x_spec = (tuple(jax.typeof(a).sharding.spec) for a in (scale, x))
    if any(s is not None and s != n for s, n in zip(spec, x_spec, strict=False)):
        raise ValueError(
            "`scale` must be sharded like the leading axes of `x` or replicated, got "
            f"PartitionSpec{spec} for `x` with PartitionSpec{x_spec}. Use "
            "`jax.sharding.reshard` to shard it like `x`."
        )


def _what_fits(x_shape: tuple[Any, ...]) -> str:
    if not x_shape:
        return "Only a scalar fits."
    ones = (1,) * (len(x_shape) - 1)
    shapes = dict.fromkeys(((), x_shape[:1], (x_shape[0], *ones), x_shape))
    return f"Shapes that fit: {', '.join(str(s) for s in shapes)}."


# jit caches the trace of the rule per shape. Without inline=True it would stay a
# boundary that keeps XLA from fusing across it (benchmarks/overhead.py).
@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _gradient_reversal(x: jax.Array, scale: Any, forward_mode: bool, tied: bool) -> Any:
    # A derivative with respect to scale is zero; it must not make forward mode raise.
    scale = lax.stop_gradient(scale)
    if tied:
        x = _tie(x, scale)
    scale = lax.convert_element_type(scale, _product_dtype(x, scale))
    # Singleton axes, never a broadcast: a residual is no larger than scale.
    scale = lax.expand_dims(scale, range(scale.ndim, x.ndim)) if scale.ndim else scale
    if forward_mode:
        return _forward_rule(x, scale)
    return _reverse_rule(x, scale)  # jvp, jacfwd, linearize: pass forward_mode=True


def _tie(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x, as batched and as varying over a mesh as scale is.

    If scale is mapped and x is shared, cotangents would be summed before the rule,
    which is then applied once for every example: wrong, and silent. The select has one
    case, so nothing of it is compiled, and its transpose sums where it must. Its index
    is an int because a one-case bool select has no transpose on JAX 0.10.
    """
    index = lax.convert_element_type(scale, jnp.int32)
    if index.ndim:
        index = jnp.sum(index, dtype=jnp.int32)
    # Not earlier: jaxlib 0.7.2 keeps the all-reduce of a sum of zeros.
    return lax.select_n(index * 0, x)


def _product_dtype(x: jax.Array, scale: jax.Array) -> Any:
    """Returns a real dtype, float32 or wider, in which scale * x rounds only once."""
    if jax.typeof(scale).weak_type:
        # A Python number must not widen float32 to float64.
        return at_least_float32(x.dtype)
    return at_least_float32(x.dtype, scale.dtype)


@jax.named_scope("gradient_reversal")  # the name that profiles show
def _reversed(t: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns -scale * t, in the dtype of t."""
    if jnp.iscomplexobj(t):
        parts = (lax.convert_element_type(p, scale.dtype) for p in (t.real, t.imag))
        product = lax.complex(*(lax.neg(scale) * p for p in parts))
    else:
        # Not -scale: JAX 0.7.2 gives a NumPy scale back as a literal without operators.
        product = lax.neg(scale) * lax.convert_element_type(t, scale.dtype)
    return lax.convert_element_type(product, t.dtype)


# Where a scan hoists loop invariants, JAX before 0.12 drops a custom_jvp rule, so that
# second derivatives would be reversed once, silently. It keeps a custom_vjp rule, where
# only forward over reverse (hessian) raises. See test_higher_order_through_scan.
_SCAN_DROPS_CUSTOM_JVP = jax.__version_info__ < (0, 12)


@jax.custom_jvp
def _forward_rule(x: jax.Array, scale: Any) -> jax.Array:
    if _SCAN_DROPS_CUSTOM_JVP:
        return _reverse_rule(x, scale)
    del scale
    return x


@_forward_rule.defjvp
def _forward_rule_jvp(primals: Any, tangents: Any) -> Any:
    x, scale = primals
    t, _ = tangents
    # The rule itself, not x: derivatives of every order must pass through it.
    return _forward_rule(x, scale), _reversed(t, scale)


@jax.custom_vjp
def _reverse_rule(x: jax.Array, scale: Any) -> jax.Array:
    del scale
    return x


def _reverse_rule_fwd(x: jax.Array, scale: Any) -> Any:
    # The forward-mode twin: returning x would lose the rule in the second derivative,
    # and _reverse_rule cannot be differentiated forward over reverse (hessian).
    return _forward_rule(x, scale), scale


def _reverse_rule_bwd(scale: Any, ct: jax.Array) -> Any:
    return _reversed(ct, scale), None


_reverse_rule.defvjp(_reverse_rule_fwd, _reverse_rule_bwd)
