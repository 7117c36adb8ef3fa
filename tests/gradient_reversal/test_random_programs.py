r"""The layer in programs that nobody wrote, against ordinary autodiff.

A case is a random program with the layer at random places, and a random way to
transform, differentiate, compile and place it. The oracle has no custom rule and no
transformation. It runs every loop, map and shard one after the other. In place of the
layer it has `x0 - s * (x - x0)`, with the x0 and s of a first run: a constant each,
so that its derivatives of every order are those of the law.

The suite runs the same few cases each time. Run 20,000 others with

    for seed in $(seq 40); do
      JAXGRL_EXAMPLES=250 JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
        python -m pytest -q tests/gradient_reversal/test_random_programs.py \
        --hypothesis-seed=$seed --hypothesis-show-statistics
    done

The statistics count the programs that JAX refuses, or that its oldest version has
wrong, with a product or nothing for the layer too. They are not among the 20,000.

With JAX_PLATFORMS=cuda,cpu they run on a GPU. On one device no mesh is drawn.
"""

import functools
import pathlib
import re
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, reject
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_cases import cases

from jaxgrl import gradient_reversal

pytestmark = pytest.mark.slow

# There a limit that docs/guarantees.md names: forward over reverse through a loop.
BEFORE_JAX_0_12 = jax.__version_info__ < (0, 12)
LOW = ("bfloat16", "float16")
SEVERAL_DEVICES = jax.device_count() > 1


@functools.cache
def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("i",), axis_types=(kind,), devices=jax.devices()[:2])


# Two machines run a program: one with JAX's transformations and the layer, one without.


class Transformed:
    """With the layer, and JAX's own loops, maps, branches and shards."""

    wide = False

    def __init__(self, forward_mode):
        self.forward_mode = forward_mode

    def layer(self, x, scale):
        y = gradient_reversal(x, scale, forward_mode=self.forward_mode)
        assert jax.tree.structure(y) == jax.tree.structure(x)
        return y

    def loop(self, how, body, env, h):
        if how == "fori":
            return lax.fori_loop(
                0, 2, lambda i, h: body(_with(env, env["ms"][i]), h), h
            )
        step = lambda h, m: (body(_with(env, m), h), None)  # noqa: E731
        return lax.scan(step, h, env["ms"])[0]

    def mapped(self, how, body, env, h):
        """Returns the results of two instances, with the two multipliers of scales."""
        ms = env["ms"]
        if how == "vmap, shared x":
            both = jax.vmap(lambda m: body(_with(env, m), h))(ms)
        elif how == "vmap, shared scale":
            stacked = jnp.stack(_instances(h), 1)
            both = jax.vmap(lambda h: body(env, h), in_axes=1, out_axes=0)(stacked)
        elif how == "vmap":
            f = lambda m, h: body(_with(env, m), h)  # noqa: E731
            both = jax.vmap(f)(ms, jnp.stack(_instances(h)))
        elif how == "map":
            f = lambda mh: body(_with(env, mh[0]), mh[1])  # noqa: E731
            both = lax.map(f, (ms, jnp.stack(_instances(h))))
        else:
            shared, check_vma, psum = how

            def local(env, m, h):
                out = body(_with(env, m[0]), h)
                return lax.psum(out, "i") if psum else out

            out = jax.shard_map(
                local,
                mesh=_mesh(),
                in_specs=(P(), P("i"), P() if shared else P("i")),
                out_specs=P() if psum else P("i"),
                check_vma=check_vma,
            )(env, ms, h if shared else jnp.concatenate(_instances(h)))
            return [out / 2, out / 2] if psum else [out[:4], out[4:]]
        return [both[0], both[1]]

    def branch(self, index, bodies, env, h):
        return lax.switch(index, [functools.partial(b, env) for b in bodies], h)

    def checkpoint(self, policy, body, env, h):
        return jax.checkpoint(lambda h: body(env, h), policy=POLICIES[policy])(h)

    def jit(self, body, env, h):
        return jax.jit(body)(env, h)

    def derive(self, derivative, body, env, h):
        return derivative(lambda h: body(env, h))(h)


class Untransformed:
    """With an affine function for the layer, and Python for all that is around it."""

    def __init__(self, wide=False):
        self.wide = wide  # computes in float32 where the program has less
        self.tape, self.at, self.recording = [], 0, True

    def layer(self, x, scale):
        def affine(leaf, s):
            if self.recording:
                self.tape.append((leaf, s))
            (x0, s), self.at = self.tape[self.at], self.at + 1
            if jnp.iscomplexobj(leaf):
                return x0 - s.astype(leaf.dtype) * (leaf - x0)
            x, x0 = leaf.astype(jnp.float32), x0.astype(jnp.float32)
            return (x0 - s * (x - x0)).astype(leaf.dtype)

        return _map_leaves(affine, x, scale)

    def loop(self, how, body, env, h):
        for m in env["ms"]:
            h = body(_with(env, m), h)
        return h

    def mapped(self, how, body, env, h):
        shared = how == "vmap, shared x" or how[0] is True
        instances = [h, h] if shared else _instances(h)
        envs = [_with(env, m) for m in env["ms"]]
        if how == "vmap, shared scale":
            envs = [env, env]
        results = [body(e, h) for e, h in zip(envs, instances, strict=True)]
        psum = how in SHARD_MAPS and how[-1]
        return [sum(results) / 2] * 2 if psum else results

    def branch(self, index, bodies, env, h):
        return bodies[int(index)](env, h)

    def checkpoint(self, policy, body, env, h):
        return body(env, h)

    def jit(self, body, env, h):
        return body(env, h)

    def derive(self, derivative, body, env, h):
        if self.recording:
            start = self.at
            body(env, h)
            self.at, self.recording = start, False
            out = self.derive(derivative, body, env, h)
            self.recording = True
            return out
        return derivative(lambda h: body(env, h))(h)


class Product:
    """With a product for the layer."""

    def layer(self, x, scale):
        return _map_leaves(lambda leaf, s: leaf * s.astype(leaf.dtype), x, scale)


class TransformedProduct(Product, Transformed):
    pass


class UntransformedProduct(Product, Untransformed):
    pass


class Nothing:
    """With nothing for the layer."""

    def layer(self, x, scale):
        return x


class TransformedNothing(Nothing, Transformed):
    pass


class UntransformedNothing(Nothing, Untransformed):
    pass


WITHOUT_LAYER = [
    (TransformedProduct, UntransformedProduct),
    (TransformedNothing, UntransformedNothing),
]


def _map_leaves(function, x, scale):
    """Applies the function to each leaf that the layer reverses, with its scale."""

    def of_leaf(leaf, s):
        if not jnp.issubdtype(getattr(leaf, "dtype", int), jnp.inexact):
            return leaf
        s = jnp.asarray(s).astype(jnp.float32)
        return function(leaf, s.reshape(s.shape + (1,) * (leaf.ndim - s.ndim)))

    return jax.tree.map(
        lambda s, part: jax.tree.map(lambda leaf: of_leaf(leaf, s), part), scale, x
    )


def _with(env, m):
    return env | {"m": env["m"] * m}


def _instances(h):
    return [h, jnp.cos(h)]


POLICIES = {
    "none": None,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("h"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["h"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "offload dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}


# The operations. Each maps [4, 4] to [4, 4]: rows and columns are as many, so that a
# scale that is aligned with the wrong ones is not refused. All values are of order 1.

ROWS = np.arange(4, dtype=np.int32)
ORDER = np.array([2, 0, 3, 1])


def _weight(env, h, i):
    return env["w"][i].astype(h.dtype)


def _conv(machine, env, h, i):
    kernel = _weight(env, h, i)[:3, :1, None]
    dims = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        h[..., None], kernel, (1,), "SAME", dimension_numbers=dims
    )[..., 0]


def _sort(machine, env, h, axis):
    # The gaps are wide, so that rounding never changes the order.
    apart = (4 * ORDER).astype(h.dtype)
    apart = apart[:, None] if axis == 0 else apart[None, :]
    return jnp.tanh(jnp.sort(jnp.sin(h) + apart, axis) - jnp.sort(apart, axis))


def _sort_by_key(machine, env, h, axis):
    keys = jnp.broadcast_to(ORDER if axis else ORDER[:, None], (4, 4))
    return lax.sort((keys, h), dimension=axis, num_keys=1)[1]


def _attention(machine, env, h, i):
    return jax.nn.softmax(h @ _weight(env, h, i) @ h.T, -1) @ h


def _update(machine, env, h, i):
    # Not a part of h: if a scatter follows, XLA writes over what it still has to read.
    part = _weight(env, h, i)[:2, :3]
    return lax.dynamic_update_slice(h, part, (jnp.int32(env["k"]), jnp.int32(i)))


PLAIN = {
    # These treat rows alone and the axis of columns as a whole.
    "sin": lambda machine, env, h, i: jnp.sin(1.3 * h + i),
    "tanh": lambda machine, env, h, i: h * jnp.tanh(h),
    "matmul": lambda machine, env, h, i: h @ _weight(env, h, i),
    "softmax": lambda machine, env, h, i: 3 * jax.nn.softmax(h, -1),
    "strength": lambda machine, env, h, i: h * env["s"][i].astype(h.dtype),
    "where": lambda machine, env, h, i: jnp.where(ORDER[None, :] > i, h, jnp.sin(h)),
    # These move values about, and compute nothing that rounds.
    "gather": lambda machine, env, h, i: h[ORDER],
    "gather columns": lambda machine, env, h, i: h[:, ORDER],
    "roll": lambda machine, env, h, i: h[(ROWS + env["k"]) % 4],
    "transpose": lambda machine, env, h, i: h.T,
    "sort by key": _sort_by_key,
    "halves": lambda machine, env, h, i: jnp.concatenate([-h[2:], 2 * h[:2]]),
    "reshape": lambda machine, env, h, i: (
        h.reshape(2, 2, 4).swapaxes(0, 1).reshape(4, 4)
    ),
    "scatter": lambda machine, env, h, i: jnp.zeros_like(h).at[ORDER].set(h),
    # And the rest.
    "gather twice": lambda machine, env, h, i: h[jnp.array([1, 1, 3, 0])],
    "softmax of rows": lambda machine, env, h, i: 3 * jax.nn.softmax(h, 0),
    "conv": _conv,
    "sort": _sort,
    "attention": _attention,
    "update": _update,
    "cumsum": lambda machine, env, h, i: jnp.cumsum(h, i) / 2,
}
ROWWISE = list(PLAIN)[:6]
EXACT = list(PLAIN)[6:14]


def _vary(machine, env, h):
    """Makes h differ between the instances of a map, as its loops and branches must."""
    return h + (0 * env["m"]).astype(h.dtype)


def _traced(env, h, i):
    return env["s"][i] * env["m"]


def _per_row(env):
    return env["p"] * env["m"]


SCALES = {
    "traced": _traced,
    "rows": lambda env, h, i: _per_row(env),
    "from data": lambda env, h, i: jnp.tanh(h.astype(jnp.float32).mean()) + 1.5,
    "number": lambda env, h, i: (0.5, 3, -0.7, True)[2 * i + (h.dtype == jnp.float32)],
    "zero": lambda env, h, i: (0.0, np.float32(0))[i],
    "numpy": lambda env, h, i: (np.float32(0.7), np.float64(1.3))[i],
    "numpy array": lambda env, h, i: (np.array(-0.6, "f4"), np.array(2, "i4"))[i],
    "numpy rows": lambda env, h, i: np.array([0.5, -1.5, 0.2, 2.0], np.float32),
    "low": lambda env, h, i: _traced(env, h, i).astype(LOW[i]),
    "integer": lambda env, h, i: (env["k"] + 1, env["k"] > 0)[i],
    "column": lambda env, h, i: _per_row(env)[:, None],
    "row": lambda env, h, i: _per_row(env)[None, :],
    "full": lambda env, h, i: _per_row(env)[:, None] * _per_row(env)[None, :],
}


def _layer(machine, env, h, view, kind, i):
    """Applies the layer to a view of h; ``i`` chooses among values and shapes."""
    scale = SCALES[kind](env, h, i)
    if kind in ("row", "full") and view not in ("array", "complex"):
        view = "array"  # such a scale has the columns of h
    if view == "array":
        return machine.layer(h, scale)
    if view == "complex":
        if h.dtype != jnp.float32:
            return machine.layer(h, scale)
        z = machine.layer(lax.complex(h, jnp.sin(h)), scale)
        return z.real - z.imag
    if view == "many axes":
        return machine.layer(h.reshape(4, 2, 2), scale).reshape(4, 4)
    if view == "scalar":
        scalar = scale if np.ndim(scale) == 0 else scale.ravel()[i]
        return h.at[i, 0].set(machine.layer(h[i, 0], scalar))
    # A tree with leaves of other kinds, one scale for all or one for each subtree.
    tree = {
        "a": h[:, :2],
        "b": [h[:, 2:], env["k"], None, h[:, 0] > 0, jnp.argmax(h, 1)],
        "c": jnp.sin(h),  # never used
    }
    other = (0.25, np.float32(-2))[i]
    scales = {"a": scale, "b": other, "c": scale} if view == "subtrees" else scale
    out = machine.layer(tree, scales)
    return jnp.concatenate([out["a"], out["b"][0]], 1)


def _run(machine, ops, env, h):
    for name, *args in ops:
        h = OPS[name](machine, env, h, *args)
    return h


def _body(machine, ops):
    return lambda env, h: checkpoint_name(_run(machine, ops, env, h), "h")


def _mapped(machine, env, h, how, ops):
    first, second = machine.mapped(how, _body(machine, ops), env, h)
    return first + second / 2


def _branch(machine, env, h, ops, others):
    bodies = [_body(machine, o) for o in (ops, others)]
    return machine.branch(env["k"], bodies, env, h)


def _in_dtype(machine, env, h, dtype, ops):
    dtype = h.dtype if machine.wide else dtype
    return _run(machine, ops, env, h.astype(dtype)).astype(h.dtype)


def _gradient(f):
    return jax.grad(lambda h: jnp.sum(jnp.sin(f(h)).astype(jnp.float32)))


def _tangent(f):
    return lambda h: jax.jvp(f, (h,), (jnp.cos(h),))[1]


def _derived(derivative):
    def op(machine, env, h, ops):
        return jnp.tanh(h + machine.derive(derivative, _body(machine, ops), env, h))

    return op


OPS = PLAIN | {
    "layer": _layer,
    "vary": _vary,
    "loop": lambda machine, env, h, how, ops: machine.loop(
        how, _body(machine, ops), env, h
    ),
    "map": _mapped,
    "branch": _branch,
    "checkpoint": lambda machine, env, h, policy, ops: machine.checkpoint(
        policy, _body(machine, ops), env, h
    ),
    "jit": lambda machine, env, h, ops: machine.jit(_body(machine, ops), env, h),
    "dtype": _in_dtype,
    "gradient": _derived(_gradient),
    "tangent": _derived(_tangent),
}


# What Hypothesis draws.


class Case(NamedTuple):
    """A program, and all that is done with it."""

    dtype: str
    order: str
    mode: str
    forward_mode: bool
    index: int
    ops: list


class Choices(NamedTuple):
    """What may occur in a program, or a part of it."""

    plain: list
    views: list
    kinds: list
    blocks: list
    maps: list
    what: tuple = ("plain", "layer", "block")


VIEWS = ["array", "complex", "many axes", "scalar", "tree", "subtrees"]
BLOCKS = ["loop", "branch", "checkpoint", "jit", "dtype", "gradient", "tangent"]
BLOCKS += ["map"] * 4  # of twelve kinds
SHARD_MAPS = [(s, v, p) for s in (False, True) for v in (True, False) for p in (0, 1)]
MAPS = ["vmap", "vmap, shared x", "vmap, shared scale", "map"]
MAPS += SHARD_MAPS if SEVERAL_DEVICES else []

ANY = Choices(list(PLAIN), VIEWS, list(SCALES), BLOCKS, MAPS)
# On a mesh with Explicit axes JAX refuses to move rows about.
ON_EXPLICIT_AXES = Choices(
    ROWWISE,
    ["array", "complex", "tree", "subtrees"],
    [kind for kind in SCALES if kind not in ("row", "full")],
    [block for block in BLOCKS if block != "map"],
    [],
)
# Without rounding, and with one layer in front: what it rounds is seen in every bit.
EXACTLY = Choices(
    EXACT,
    [view for view in VIEWS if view != "complex"],
    [kind for kind in SCALES if kind != "from data"],
    ["branch", "checkpoint", "jit"],
    [],
    what=("plain", "block"),
)


def _draw_ops(rng, size, choices, depth=0):
    one = rng.choice

    def inside(size, **changed):
        part = choices._replace(**changed) if changed else choices
        return _draw_ops(rng, size, part, depth + 1)

    ops = []
    while size > 0:
        what = one(choices.what)
        if what == "block" and size > 1 and depth < 3:
            block, part = one(choices.blocks), rng.randint(1, size - 1)
            size -= part
            without = [b for b in choices.blocks if b not in ("gradient", "tangent")]
            if block == "map":
                how = one(choices.maps)
                # A mesh is mapped over once.
                maps = [m for m in choices.maps if m not in SHARD_MAPS]
                body = inside(part, **{"maps": maps} if how in SHARD_MAPS else {})
                if how == "vmap, shared x" or how[0] is True:
                    kind = one(("traced", "rows", "column", "low"))
                    first = ("layer", one(choices.views), kind, one((0, 1)))
                    body = [first, ("vary",), *body]
                ops.append((block, how, body))
            elif block == "loop":
                ops.append((block, one(("scan", "fori")), inside(part)))
            elif block == "branch":
                ops.append((block, inside(part), inside(1)))
            elif block == "checkpoint":
                ops.append((block, one(tuple(POLICIES)), inside(part)))
            elif block == "dtype":
                ops.append((block, one(("float32", *LOW)), inside(part)))
            elif block == "jit":
                ops.append((block, inside(part)))
            else:
                ops.append((block, inside(part, blocks=without)))
        elif what == "plain":
            ops.append((one(choices.plain), one((0, 1))))
        else:
            ops.append(_draw_layer(one, choices))
        size -= 1
    return ops


def _draw_layer(one, choices):
    return ("layer", one(choices.views), one(choices.kinds), one((0, 1)))


@st.composite
def _draw_case(draw, modes, dtypes, choices=ANY):
    size = draw(st.integers(3, 10))
    # Independent of each other. Hypothesis alone would often repeat what it has drawn.
    rng = draw(st.randoms(use_true_random=True))
    one = rng.choice
    mode, forward_mode = one(modes), one((False, True))
    if mode == "explicit axes":
        choices = ON_EXPLICIT_AXES
    if BEFORE_JAX_0_12:
        # There XLA may end the process for a loop on a mesh: one of both at a time.
        if mode in ("auto axes", "explicit axes") or one((False, True)):
            blocks = [block for block in choices.blocks if block != "loop"]
            maps = [how for how in choices.maps if how != "map"]
            choices = choices._replace(blocks=blocks, maps=maps)
        else:
            maps = [how for how in choices.maps if how not in SHARD_MAPS]
            choices = choices._replace(maps=maps)
    if mode == "checkify":  # which JAX refuses for a shard_map in a map
        choices = choices._replace(maps=MAPS[:4])
    if not forward_mode:
        blocks = [block for block in choices.blocks if block != "tangent"]
        choices = choices._replace(blocks=blocks)
    ops = _draw_ops(rng, size, choices)
    if not _has_layer(ops):
        ops.insert(rng.randint(0, len(ops)), _draw_layer(one, choices))
    # Twice as many cases take half of the time with half of them of first order.
    orders = list(ORDERS)[: None if forward_mode else -1]
    # JAX 0.7.2 does not shard the rows of a Jacobian.
    if mode == "explicit axes" or (mode == "auto axes" and BEFORE_JAX_0_12):
        orders = [o for o in orders if "jac" not in o and o != "hessian"]
    order = "gradient" if one((False, True)) else one(orders)
    # JAX 0.7.2 may refuse a vmap in a shard_map at third order, without a layer too.
    if BEFORE_JAX_0_12 and "third" in order and _has(ops, "map"):
        order = "grad of grad"
    return Case(one(dtypes), order, mode, forward_mode, one((0, 1)), ops)


def _parts(op):
    return [arg for arg in op if isinstance(arg, list)]


def _has_layer(ops, without=()):
    """Whether a layer is in the program outside of some blocks."""
    return any(
        op[0] == "layer" or any(_has_layer(part, without) for part in _parts(op))
        for op in ops
        if op[0] not in without
    )


def _has_layer_in_loop(ops):
    return any(
        _has_layer([op])
        if op[0] == "loop" or op[1:2] == ("map",)
        else any(map(_has_layer_in_loop, _parts(op)))
        for op in ops
    )


def _has(ops, *names):
    return any(op[0] in names or any(_has(p, *names) for p in _parts(op)) for op in ops)


# How it is differentiated, beside the value and the gradient.


def _dot(a, b):
    products = jax.tree.map(
        lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)), a, b
    )
    return sum(jax.tree.leaves(products))


def _along(f):
    """Returns the gradient of the derivative of f along v."""
    return lambda p, v: jax.grad(lambda p: _dot(jax.grad(f)(p), v))(p)


def _of_x(derivative):
    return lambda f: lambda p, v: derivative(lambda x: f(p | {"x": x}))(p["x"])


def _third(f):
    return lambda p, v: jax.grad(lambda p: _dot(_along(f)(p, v), v))(p)


def _third_in_both_modes(f):
    def along(p, v):
        return jax.jvp(jax.grad(f), (p,), (v,))[1]

    return lambda p, v: jax.grad(lambda p: _dot(along(p, v), v))(p)


ORDERS = {
    "grad of grad": _along,
    "vjp of grad": lambda f: lambda p, v: jax.vjp(jax.grad(f), p)[1](v)[0],
    "jacrev of grad": _of_x(lambda f: jax.jacrev(jax.grad(f))),
    "third": _third,
    "jvp of grad": lambda f: lambda p, v: jax.jvp(jax.grad(f), (p,), (v,))[1],
    "linearize of grad": lambda f: lambda p, v: jax.linearize(jax.grad(f), p)[1](v),
    "hessian": _of_x(jax.hessian),
    "third, both modes": _third_in_both_modes,
    "jvp": lambda f: lambda p, v: jax.jvp(f, (p,), (v,))[1],
    "linearize": lambda f: lambda p, v: jax.linearize(f, p)[1](v),
    "jacfwd": _of_x(jax.jacfwd),
    # With forward mode only: otherwise JAX has another error, or none if all is linear.
    "jvp of jvp": lambda f: (
        lambda p, v: jax.jvp(lambda p: jax.jvp(f, (p,), (v,))[1], (p,), (v,))[1]
    ),
}
FORWARD = list(ORDERS)[8:]
FORWARD_OVER_REVERSE = list(ORDERS)[4:8]


def _derivatives(loss, order):
    def everything(params, v, index):
        def f(params):
            return loss(params, index)

        value, gradient = jax.value_and_grad(f)(params)
        # Alone: undifferentiated, the layer is another function.
        found = {"alone": f(params), "value": value, "gradient": gradient}
        if order != "gradient":
            found["more"] = ORDERS[order](f)(params, v)
        return found

    return everything


# How it is compiled, and where it runs.


def _donated(f, params, v, index):
    copies = jax.tree.map(jnp.copy, params)
    out = jax.jit(f, donate_argnums=0)(copies, v, index)
    if len(out["gradient"]["x"].devices()) == 1:
        assert copies["x"].is_deleted()
    return out


def _on_mesh(kind):
    def run(f, params, v, index):
        mesh = _mesh(kind)
        with jax.set_mesh(mesh):
            rows = {"x": P("i"), "p": P("i")}

            def placed(tree):
                return {
                    key: jax.device_put(value, NamedSharding(mesh, rows.get(key, P())))
                    for key, value in tree.items()
                }

            return jax.device_get(jax.jit(f)(placed(params), placed(v), index))

    return run


def _exported(f, *args):
    data = jax.export.export(jax.jit(f))(*args).serialize()
    exported = jax.export.deserialize(data)
    if exported.nr_devices > 1:
        args = jax.device_put(args, NamedSharding(_mesh(), P()))
    return jax.jit(exported.call)(*args)


def _checked(f, *args):
    # JAX's index checks raise in maps and loops without a layer, too.
    errors = checkify.float_checks | checkify.user_checks
    checked = checkify.checkify(f, errors=errors)
    error, out = jax.jit(checked)(*args)
    error.throw()
    return out


MODES = {
    "jit": lambda f, *args: jax.jit(f)(*args),
    "eager": lambda f, *args: f(*args),
    "donated": _donated,
    "auto axes": _on_mesh(AxisType.Auto),
    "explicit axes": _on_mesh(AxisType.Explicit),
    "exported": _exported,
    "checkify": _checked,
}
if not SEVERAL_DEVICES:
    del MODES["auto axes"], MODES["explicit axes"]


def _loss(machine, ops):
    def loss(params, index):
        env = params | {"k": index, "m": jnp.float32(1), "ms": MULTIPLIERS}
        if not isinstance(machine, Transformed):
            machine.at = 0
        h = _run(machine, ops, env, params["x"])
        return jnp.sum(h.astype(jnp.float32) * OUTER)

    return loss


RNG = np.random.default_rng(0)
MULTIPLIERS = jnp.array([1.0, -0.6], jnp.float32)
OUTER = RNG.choice([-1.5, -1, -0.5, 0.5, 1, 1.25], (4, 4)).astype(np.float32)


def _params(dtype):
    params = {
        "x": RNG.normal(size=(4, 4)),
        "w": RNG.normal(size=(2, 4, 4)) / 2,
        "s": RNG.uniform(0.3, 1.5, 2),
        "p": RNG.uniform(-1.5, 1.5, 4),
    }
    dtypes = {"x": dtype, "w": dtype}
    return {
        key: jnp.asarray(value, dtypes.get(key, "float32"))
        for key, value in params.items()
    }


POINTS = {dtype: (_params(dtype), _params(dtype)) for dtype in ("float32", *LOW)}


def _expected(case, wide=False, machine=Untransformed):
    params, v = POINTS["float32" if wide else case.dtype]
    if wide:
        params, v = jax.tree.map(lambda a: a.astype("float32"), POINTS[case.dtype])
    untransformed = machine(wide)
    loss = _loss(untransformed, case.ops)
    with jax.disable_jit():
        loss(params, case.index)
        untransformed.recording = False
        return _derivatives(loss, case.order)(params, v, case.index)


def _actual(case, machine=Transformed):
    loss = _loss(machine(case.forward_mode), case.ops)
    everything = _derivatives(loss, case.order)
    params, v = POINTS[case.dtype]
    try:
        return MODES[case.mode](everything, params, v, jnp.int32(case.index))
    except Exception as error:
        # JAX refuses some offloads, and 0.7.2 more, with a product for the layer too.
        offloads = "offload" in repr(case.ops)
        maybe = machine is Transformed and (BEFORE_JAX_0_12 or offloads)
        # An offload that JAX 0.7.2 refuses may end in one error or in another.
        kind = Exception if BEFORE_JAX_0_12 and offloads else type(error)
        if maybe and _refused(case, kind):
            event("refused without the layer")
            reject()
        raise


def _refused(case, kind):
    try:
        _actual(case, TransformedProduct)
    except Exception as error:
        return isinstance(error, kind)
    return False


def _check(case):
    reached = _has_layer(case.ops, without=("gradient",))
    if case.order in FORWARD and reached and not case.forward_mode:
        message = "can't apply forward-mode"
        # The message of JAX 0.7.2 for a custom_vjp in a shard_map that is not compiled.
        sharded = any(repr(how) in repr(case.ops) for how in SHARD_MAPS)
        if BEFORE_JAX_0_12 and case.mode == "eager" and sharded:
            message += "|unhashable type: 'list'"
        with pytest.raises(TypeError, match=message):
            _actual(case)
        return
    mixed = case.order in FORWARD_OVER_REVERSE + FORWARD or _has(case.ops, "tangent")
    if BEFORE_JAX_0_12 and mixed and _has_layer_in_loop(case.ops):
        # An error or right, but never wrong, and right with reverse over reverse.
        try:
            actual = _actual(case)
        except (TypeError, NotImplementedError) as error:
            assert re.search("can't apply forward-mode|'custom_lin'", str(error))
            if not _has(case.ops, "tangent"):
                _check(case._replace(order="grad of grad"))
            return
    else:
        actual = _actual(case)
    _assert_right(case, actual, _wrong)


def _assert_right(case, actual, find):
    wrong = find(case, actual)
    # JAX 0.7.2 may be wrong with a product or nothing for the layer too.
    if (wrong and BEFORE_JAX_0_12) and any(
        find(case, _actual(case, transformed), untransformed)
        for transformed, untransformed in WITHOUT_LAYER
    ):
        event("wrong without the layer")
        reject()
    assert not wrong


def _wrong(case, actual, machine=Untransformed):
    """Returns what is further from the reference than rounding explains."""
    expected = _expected(case, machine=machine)
    dtypes = jax.tree.map(lambda a: a.dtype, (actual, expected))
    if dtypes[0] != dtypes[1]:
        return [dtypes]
    low = _low(case)
    wide, wrong = None, []
    for i, (a, e) in enumerate(
        zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
    ):
        a, e = (np.asarray(value, np.float32) for value in (a, e))
        if not np.isfinite(e).all():
            event("the reference overflows")
            continue
        error, size = np.abs(a - e).max(), np.abs(e).max()
        allowed = 0.03 * size + 1e-3 if low else 2e-4 * size + 1e-6
        if not error <= allowed:
            # What rounding changes in this program, by the oracle alone.
            wide = wide or _wide(case, machine)
            allowed += 8 * np.abs(wide[i] - e).max()
        if not error <= allowed:
            wrong.append((error, allowed))
    return wrong


def _low(case):
    return case.dtype in LOW or _has(case.ops, "dtype")


def _wide(case, machine):
    """Returns the reference in float32 for a program that has less, else in float64."""
    if _low(case):
        wide = _expected(case, True, machine)
    else:
        with jax.enable_x64(True):
            there = _in_float64()
            case = case._replace(dtype="float64")
            wide = there["_expected"](case, machine=there[machine.__name__])
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(wide)]


@functools.cache
def _in_float64():
    """Returns what this module defines, with float64 for float32."""
    source = pathlib.Path(__file__).read_text().replace("float32", "float64")
    defined = {"__name__": "float64", "__file__": __file__}
    exec(compile(source, "float64", "exec"), defined)
    return defined


def _wrong_bits(case, actual, machine=Untransformed):
    """Returns the gradients if they differ in a bit."""
    expected = _expected(case, machine=machine)
    both = [tree["gradient"]["x"] for tree in (actual, expected)]
    return both if (both[0] != both[1]).any() else []


DTYPES = ["float32", "float32", *LOW]
EXACT_MODES = [mode for mode in ("jit", "donated", "auto axes") if mode in MODES]


# The eager ones half as often as the others: nothing else takes as long.
MOSTLY_COMPILED = [*MODES, *(mode for mode in MODES if mode != "eager")]


@cases(40)
@given(_draw_case(MOSTLY_COMPILED, DTYPES))
def test_random_programs(case):
    _check(case)


@cases(20)
@given(_draw_case(EXACT_MODES, list(LOW), EXACTLY))
def test_the_gradient_is_rounded_once(case):
    case = case._replace(order="gradient")
    _assert_right(case, _actual(case), _wrong_bits)
