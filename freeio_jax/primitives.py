"""The primitives: abstract evaluation, derivatives, batching, lowering.

For a fixed handle everything but the routing is multilinear. With rows ``e`` (one for each packed
row), weights ``w`` (one for each assignment) and token rows ``x``, let

    phi(e, w, x) = sum over assignments a = (t, k) of  w[a] * <e[row(a)], x[t]>

Its three partial derivatives are ``combine`` (by x), the weighted dispatch along the handle (by e)
and the dot products that are the weights' gradient (by w), so each is the transpose of the others,
and derivatives of any order stay inside this file. Routing is exchanged once, by ``dispatch_p``;
no derivative of anything exchanges it again.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core, dispatch
from jax._src.ad_util import p2tz
from jax._src.lib.mlir.dialects import hlo
from jax._src.mesh import get_concrete_mesh
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from freeio_jax import log
from freeio_jax.dtypes import COMBINE_DTYPES, accumulator_dtype, combine_dtype_names
from freeio_jax.engines import ENGINES
from freeio_jax.varying import checks_varying_axes

# --- What all primitives share ---------------------------------------------------------------


def bind(primitive, *args, axes, **params):
    """Binds ``primitive`` with all operands varying over the same mesh axes."""
    if checks_varying_axes():
        varying = frozenset(axes).union(*(jax.typeof(a).mat.varying for a in args))
        args = [
            core.pvary(a, tuple(missing)) if (missing := varying - jax.typeof(a).mat.varying) else a
            for a in args
        ]
    return primitive.bind(*args, axes=axes, **params)


def _aval(like, shape, dtype):
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec())
    return like.update(
        shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding
    )


def _effects(axes):
    return {core.NamedAxisEffect(axis) for axis in axes}


def _device_index(ctx):
    """This device's index in the mesh, as uint32: what the groups' members are counted in."""
    axis_context = ctx.module_context.axis_context
    manual = getattr(axis_context, "manual_axes", frozenset())
    if not manual or manual == frozenset(axis_context.mesh.axis_names):
        return hlo.partition_id()
    # In a partly manual shard_map XLA does not offer the partition id: enter the rest of the axes.
    return mlir.lower_fun(
        lambda: jax.shard_map(
            device_index_p.bind, in_specs=(), out_specs=PartitionSpec(), check_vma=False
        )(),
        multiple_results=False,
    )(ctx.replace(primitive=None, avals_in=[], avals_out=[core.ShapedArray((), np.uint32)]))[0]


def _groups(mesh, axes):
    """``[groups, R]`` mesh device indices: each group's members in order of rank."""
    devices = np.arange(mesh.size, dtype=np.int64).reshape(mesh.axis_sizes)
    positions = [mesh.axis_names.index(axis) for axis in axes]
    num_ranks = math.prod(mesh.axis_sizes[p] for p in positions)
    return np.moveaxis(devices, positions, range(-len(axes), 0)).reshape(-1, num_ranks)


def _where(mesh, axes):
    """Which devices exchange with each other, in words."""
    groups = _groups(mesh, axes)
    text = f"{len(groups)} group(s) of {groups.shape[1]} rank(s) along {axes}"
    if not isinstance(mesh, Mesh):
        mesh = get_concrete_mesh()
    if mesh.empty:
        return text  # the devices are known when it runs
    process = np.array([device.process_index for device in mesh.devices.flat])
    spread = max(len(set(process[group])) for group in groups)
    within = "each in one process" if spread == 1 else f"each across {spread} processes"
    return f"{text} on {mesh.devices.flat[0].device_kind} devices, {within}"


def _lower(
    target, ctx, *operands, axes, layout, engine, scratch=(), moves_nothing=False, **attributes
):
    """One custom call: the device's mesh index, then the operands, as the engines expect.

    ``scratch``: (shape, dtype) of buffers that the engine needs beside the results. They are
    results of the call, so that XLA owns them, and end here.
    ``moves_nothing``: the results are zeros, whatever the operands are.
    """
    if not engine.takes_empty and moves_nothing:
        return [*map(_zeros, ctx.avals_out)]
    engine.start()
    mesh = ctx.module_context.axis_context.mesh
    if log.logger.isEnabledFor(logging.DEBUG):
        operand_types = ", ".join(f"{aval.dtype}{list(aval.shape)}" for aval in ctx.avals_in)
        log.logger.debug(
            "compiles %s(%s), %s, %s", target, operand_types, layout, _where(mesh, axes)
        )
    device_index_aval = core.ShapedArray((), np.uint32)
    rule = jax.ffi.ffi_lowering(target)
    avals_in = ctx.avals_in
    avals_out = [*ctx.avals_out, *(core.ShapedArray(*buffer) for buffer in scratch)]
    if not engine.takes_empty:
        operands = [
            operand if aval.size else _zeros(_not_empty(aval))
            for operand, aval in zip(operands, avals_in, strict=True)
        ]
        avals_in, avals_out = map(_not_empty, avals_in), map(_not_empty, avals_out)
    results = rule(
        ctx.replace(avals_in=[device_index_aval, *avals_in], avals_out=[*avals_out]),
        _device_index(ctx),
        *operands,
        groups=_groups(mesh, axes).reshape(-1),
        num_ranks=np.int64(layout.num_ranks),
        num_tokens=np.int64(layout.num_tokens),
        top_k=np.int64(layout.top_k),
        num_experts=np.int64(layout.num_experts),
        capacity=np.int64(layout.capacity),
        alignment=np.int64(layout.alignment),
        **engine.attributes(ctx.module_context),
        **{name: np.int64(value) for name, value in attributes.items()},
    )
    return [
        result if aval.size else _zeros(aval)
        for result, aval in zip(results, ctx.avals_out, strict=False)  # without the scratch
    ]


def _not_empty(aval):
    """What stands for an array without elements: one along each dimension that has none."""
    return core.ShapedArray(tuple(max(1, size) for size in aval.shape), aval.dtype)


def _zeros(aval):
    # Lowered as a broadcast of one zero.
    return mlir.ir_constant(np.broadcast_to(np.zeros((), aval.dtype), aval.shape))


def _batch_as_loop(primitive, axis_data, args, dims, *, axes, **params):
    """vmap as a loop: every rank runs the same exchanges in the same order."""
    if axis_data.name in axes:
        raise NotImplementedError(
            f"freeio_jax: {axis_data.name!r} is a vmap axis here. Experts are spread over a mesh "
            "axis: call under jax.shard_map, and use vmap for further dimensions only."
        )
    mapped = [jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True) if d is not None]

    def one(mapped):
        rest = iter(mapped)
        full = [a if d is None else next(rest) for a, d in zip(args, dims, strict=True)]
        return bind(primitive, *full, axes=axes, **params)

    if not mapped:
        outs = one(())
        return outs, jax.tree_util.tree_map(lambda _: None, outs)
    outs = lax.map(one, mapped)
    return outs, jax.tree_util.tree_map(lambda _: 0, outs)


def _unsupported(name, ctx, *_, **__):
    raise NotImplementedError(
        f"freeio_jax.{name} has no engine for platform(s) {tuple(ctx.module_context.platforms)} in "
        f"this installation; there is one for {', '.join(ENGINES)}. freeio_jax.reference "
        "runs on every platform."
    )


def _define(name, abstract_eval, lowering, *, multiple_results=True, by_engine=True):
    primitive = core.Primitive(f"freeio_{name}")
    primitive.multiple_results = multiple_results
    primitive.def_impl(partial(_outside_shard_map, name))
    primitive.def_effectful_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, partial(_unsupported, name))
    for platform, engine in ENGINES.items():
        rule = partial(lowering, engine=engine) if by_engine else lowering
        mlir.register_lowering(primitive, rule, platform=platform)
        if engine.needs_devices:
            dispatch.prim_requires_devices_during_lowering.add(primitive)
    batching.fancy_primitive_batchers[primitive] = partial(_batch_as_loop, primitive)
    return primitive


def _outside_shard_map(name, *_, **__):
    raise RuntimeError(
        f"freeio_jax: {name} was evaluated outside jax.shard_map. Call it per shard inside one."
    )


def _is_zero(tangent):
    return type(tangent) is ad.Zero


device_index_p = core.Primitive("freeio_device_index")
device_index_p.def_abstract_eval(lambda: core.ShapedArray((), np.uint32))
mlir.register_lowering(device_index_p, lambda ctx: [hlo.partition_id()])


# --- keep: what rematerialization saves ----------------------------------------------------------
#
# Identity. Derivatives need a dispatch's routes and counts, which are small: jax.checkpoint saves
# them under every policy that saves something. So a dispatch whose rows are saved, by a name that
# the caller gave them, is not exchanged again: all else that it returned is there.


def _keep_partial_eval(policy, unknown, instantiated, eqn):
    """jax.checkpoint's: (known eqn, eqn run again, unknown, instantiated, residuals)."""
    not_here = [
        v
        for v, here in zip(eqn.invars, instantiated, strict=True)
        if not here and isinstance(v, core.Var)
    ]
    yes, no = [True] * len(eqn.outvars), [False] * len(eqn.outvars)
    if any(unknown):
        return None, eqn, yes, yes, not_here
    if policy is jax.checkpoint_policies.nothing_saveable:
        return eqn, eqn, no, yes, not_here
    return eqn, None, no, no, []


keep_p = core.Primitive("freeio_keep")
keep_p.multiple_results = True
keep_p.def_impl(lambda *arrays: arrays)
keep_p.def_abstract_eval(lambda *avals: avals)
mlir.register_lowering(keep_p, lambda ctx, *arrays: arrays)
batching.primitive_batchers[keep_p] = lambda arrays, dims: (keep_p.bind(*arrays), dims)
pe.partial_eval_jaxpr_custom_rules[keep_p] = _keep_partial_eval


# --- dispatch: routing and rows in one exchange ------------------------------------------------
#
# (topk_idx, *leaves) -> (*rows, dest_rank, dest_row, row_source, group_sizes, expert_load,
#                         num_dropped, num_invalid)


def _dispatch_abstract_eval(topk_idx, *leaves, axes, layout):
    i32 = partial(_aval, topk_idx, dtype=np.int32)
    rows = [_aval(leaf, (layout.capacity, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    routing = [
        i32(topk_idx.shape),
        i32(topk_idx.shape),
        i32((layout.capacity,)),
        i32((layout.experts_per_rank,)),
        i32((layout.experts_per_rank,)),
        i32(()),
        i32(()),
    ]
    return rows + routing, _effects(axes)


def run_dispatch(topk_idx, *leaves, **params):
    """(rows, routes, counts) of a dispatch: all that it returns, by what it is for."""
    outs = bind(dispatch_p, topk_idx, *leaves, **params)
    routing = keep_p.bind(*outs[len(leaves) :])
    return outs[: len(leaves)], routing[:3], routing[3:]


def _dispatch_jvp(primals, tangents, *, axes, layout):
    rows, routes, counts = run_dispatch(*primals, axes=axes, layout=layout)
    outs = [*rows, *routes, *counts]
    out_tangents = [p2tz(out) for out in outs]
    moving = [i for i, t in enumerate(tangents[1:]) if not _is_zero(t)]
    if moving:
        rows = bind(
            dispatch_along_p,
            *routes,
            *(tangents[1 + i] for i in moving),
            axes=axes,
            layout=layout,
        )
        for i, row in zip(moving, rows, strict=True):
            out_tangents[i] = row
    return outs, out_tangents


def _dispatch_partial_eval(trace, topk_idx, *leaves, **params):
    """As a function of unknown leaves a dispatch is linear, once its routes are known.

    Which is what jax.linear_transpose asks for: an exchange now for the routes and the known
    leaves, and the unknown ones along them.
    """
    unknown = [leaf for leaf in leaves if not leaf.is_known()]
    if not unknown or not topk_idx.is_known():
        return trace.default_process_primitive(dispatch_p, (topk_idx, *leaves), params)
    ids = topk_idx.pval.get_known()
    # Rows that nobody looks at, where there are no others: a call takes at least one leaf.
    known = [leaf.pval.get_known() for leaf in leaves if leaf.is_known()] or [ids]
    known_rows, routes, counts = run_dispatch(ids, *known, **params)
    unknown_rows = trace.default_process_primitive(
        dispatch_along_p, (*map(trace.new_const, routes), *unknown), params
    )
    sources = iter(known_rows), iter(unknown_rows)
    return [*(next(sources[not leaf.is_known()]) for leaf in leaves), *routes, *counts]


def _dispatch_lowering(ctx, *args, layout, engine, **params):
    scratch = engine.dispatch_scratch(layout, num_leaves=len(args) - 1)
    return _lower(
        "freeio_dispatch", ctx, *args, layout=layout, engine=engine, scratch=scratch, **params
    )


dispatch_p = _define("dispatch", _dispatch_abstract_eval, _dispatch_lowering)
ad.primitive_jvps[dispatch_p] = _dispatch_jvp
pe.custom_partial_eval_rules[dispatch_p] = _dispatch_partial_eval


# --- dispatch_along: rows along a handle, no routing -------------------------------------------
#
# (dest_rank, dest_row, row_source, *leaves) -> (*rows); linear in the leaves


def _dispatch_along_abstract_eval(dest_rank, dest_row, row_source, *leaves, axes, layout):
    rows = [_aval(leaf, (layout.capacity, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    return rows, _effects(axes)


def _dispatch_along_jvp(primals, tangents, *, axes, layout):
    handle = primals[:3]
    outs = bind(dispatch_along_p, *primals, axes=axes, layout=layout)
    out_tangents = [p2tz(out) for out in outs]
    moving = [i for i, t in enumerate(tangents[3:]) if not _is_zero(t)]
    if moving:
        leaves = [tangents[3 + i] for i in moving]
        rows = bind(dispatch_along_p, *handle, *leaves, axes=axes, layout=layout)
        for i, row in zip(moving, rows, strict=True):
            out_tangents[i] = row
    return outs, out_tangents


def _dispatch_along_transpose(cts, *args, axes, layout):
    handle, leaves = args[:3], args[3:]
    grads = []
    for ct, leaf in zip(cts, leaves, strict=True):
        if not ad.is_undefined_primal(leaf):
            grads.append(None)
        elif _is_zero(ct):
            grads.append(ad.Zero(leaf.aval))
        else:
            grads.append(_combine_any(ct, handle, axes=axes, layout=layout))
    return [None] * 3 + grads


def _combine_any(rows, handle, **params):
    """Combine with unit weights, complex rows included: they are summed as pairs of reals."""
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        pair = jnp.stack([rows.real, rows.imag], axis=-1)
        summed = _combine_any(pair, handle, **params)
        return lax.complex(summed[..., 0], summed[..., 1])
    if rows.dtype not in COMBINE_DTYPES:
        raise TypeError(
            f"freeio_jax: the gradient of a dispatch of {rows.dtype} rows needs their sums, which "
            f"exist for {combine_dtype_names()}. Cast the tokens, or stop the "
            "gradient with jax.lax.stop_gradient."
        )
    return bind(combine_p, *handle, rows, **params)


def _lower_along(target, ctx, *args, layout, **params):
    """As ``_lower``, for calls along a handle: without tokens or rows they have nothing to do."""
    empty = layout.num_tokens == 0 or layout.capacity == 0
    empty = empty or not any(aval.size for aval in ctx.avals_out)
    return _lower(target, ctx, *args, layout=layout, moves_nothing=empty, **params)


dispatch_along_p = _define(
    "dispatch_along", _dispatch_along_abstract_eval, partial(_lower_along, "freeio_dispatch_along")
)
ad.primitive_jvps[dispatch_along_p] = _dispatch_along_jvp
ad.primitive_transposes[dispatch_along_p] = _dispatch_along_transpose


# --- combine -----------------------------------------------------------------------------------
#
# (dest_rank, dest_row, row_source, expert_out[, weights]) -> sums; bilinear in expert_out, weights


def _combine_abstract_eval(dest_rank, dest_row, row_source, expert_out, *weights, axes, layout):
    shape = (layout.num_tokens, *expert_out.shape[1:])
    return _aval(expert_out, shape, expert_out.dtype), _effects(axes)


def _combine_jvp(primals, tangents, **params):
    handle, operands, moving = primals[:3], primals[3:], tangents[3:]
    out = bind(combine_p, *primals, **params)
    if all(map(_is_zero, moving)):
        return out, p2tz(out)
    if len(operands) == 2 and not any(map(_is_zero, moving)):
        return out, bind(combine_tangent_p, *handle, *moving, *operands, **params)
    mixed = [p if _is_zero(t) else t for p, t in zip(operands, moving, strict=True)]
    return out, bind(combine_p, *handle, *mixed, **params)


def _combine_transpose(ct, *args, axes, layout):
    handle, (expert_out, *weights) = args[:3], args[3:]
    params = {"axes": axes, "layout": layout}
    if not ad.is_undefined_primal(expert_out):
        (w,) = weights
        grad = (
            ad.Zero(w.aval) if _is_zero(ct) else _weights_gradient(handle, ct, expert_out, params)
        )
        return [None] * 4 + [grad]
    if _is_zero(ct):
        grad = ad.Zero(expert_out.aval)
    elif weights:
        grad = _weighted_rows(handle, ct, weights[0], params)
    else:
        (grad,) = bind(dispatch_along_p, *handle, ct, **params)
    return [None] * 3 + [grad] + [None] * len(weights)


def _combine_lowering(ctx, *args, layout, engine, **params):
    return _lower_along(
        "freeio_combine",
        ctx,
        *args,
        layout=layout,
        engine=engine,
        scratch=engine.combine_scratch(layout, ctx.avals_in[3]),
        weighted=len(args) == 5,
        **params,
    )


combine_p = _define(
    "combine",
    _combine_abstract_eval,
    _combine_lowering,
    multiple_results=False,
)
ad.primitive_jvps[combine_p] = _combine_jvp
ad.primitive_transposes[combine_p] = _combine_transpose


# --- combine_tangent: the derivative of combine in both operands at once -----------------------
#
# (handle, expert_out_dot, weights_dot, expert_out, weights) -> sums_dot. Exists so that its
# transpose is one exchange that gives both gradients: the rows of the cotangent cross once.


def _combine_tangent_abstract_eval(
    dest_rank, dest_row, row_source, expert_out_dot, weights_dot, expert_out, weights, axes, layout
):
    shape = (layout.num_tokens, *expert_out.shape[1:])
    return _aval(expert_out, shape, expert_out.dtype), _effects(axes)


def _combine_tangent(*args, **params):
    handle, (expert_out_dot, weights_dot, expert_out, weights) = args[:3], args[3:]
    return bind(combine_p, *handle, expert_out_dot, weights, **params) + bind(
        combine_p, *handle, expert_out, weights_dot, **params
    )


def _sum_tangents(out, terms):
    """Sum of the terms that are not None, or a symbolic zero."""
    terms = [t for t in terms if t is not None]
    return sum(terms[1:], terms[0]) if terms else p2tz(out)


def _combine_tangent_jvp(primals, tangents, **params):
    handle, (e_dot, w_dot, e, w) = primals[:3], primals[3:]
    out = bind(combine_tangent_p, *primals, **params)
    t_e_dot, t_w_dot, t_e, t_w = tangents[3:]
    pairs = ((t_e_dot, w), (e_dot, t_w), (t_e, w_dot), (e, t_w_dot))
    return out, _sum_tangents(
        out,
        [
            None if _is_zero(a) or _is_zero(b) else bind(combine_p, *handle, a, b, **params)
            for a, b in pairs
        ],
    )


def _combine_tangent_transpose(ct, *args, axes, layout):
    handle, (e_dot, w_dot, e, w) = args[:3], args[3:]
    params = {"axes": axes, "layout": layout}
    want_rows, want_weights = map(ad.is_undefined_primal, (e_dot, w_dot))
    if _is_zero(ct):
        grads = [ad.Zero(a.aval) if ad.is_undefined_primal(a) else None for a in (e_dot, w_dot)]
    elif want_rows and want_weights:
        grads = bind(combine_transpose_p, *handle, ct, e, w, rows=True, weights=True, **params)
    elif want_rows:
        grads = [_weighted_rows(handle, ct, w, params), None]
    else:
        grads = [None, _weights_gradient(handle, ct, e, params)]
    return [None] * 3 + list(grads) + [None] * 2


combine_tangent_p = _define(
    "combine_tangent",
    _combine_tangent_abstract_eval,
    mlir.lower_fun(_combine_tangent, multiple_results=False),
    multiple_results=False,
    by_engine=False,
)
ad.primitive_jvps[combine_tangent_p] = _combine_tangent_jvp
ad.primitive_transposes[combine_tangent_p] = _combine_tangent_transpose


# --- combine_transpose: gradients of combine ---------------------------------------------------
#
# (handle, x, expert_out if weights, w if rows) -> (w[a] * x[t] at row(a) if rows,
#                                                   <expert_out[row(a)], x[t]> if weights)


def _split_combine_transpose(operands, rows, weights):
    operands = list(operands)
    x = operands.pop(0)
    expert_out = operands.pop(0) if weights else None
    w = operands.pop(0) if rows else None
    return x, expert_out, w


def _combine_transpose_abstract_eval(
    dest_rank, dest_row, row_source, *operands, axes, layout, rows, weights
):
    x = operands[0]
    outs = []
    if rows:
        outs.append(_aval(x, (layout.capacity, *x.shape[1:]), x.dtype))
    if weights:
        outs.append(_aval(x, (layout.num_tokens, layout.top_k), accumulator_dtype(x.dtype)))
    return outs, _effects(axes)


def _weighted_rows(handle, x, w, params):
    (rows,) = bind(combine_transpose_p, *handle, x, w, rows=True, weights=False, **params)
    return rows


def _weights_gradient(handle, x, expert_out, params):
    (grad,) = bind(combine_transpose_p, *handle, x, expert_out, rows=False, weights=True, **params)
    return grad


def _combine_transpose_jvp(primals, tangents, *, rows, weights, **params):
    handle = primals[:3]
    outs = bind(combine_transpose_p, *primals, rows=rows, weights=weights, **params)
    x = primals[3]
    tx, te, tw = _split_combine_transpose(tangents[3:], rows, weights)
    moves_x, moves_e, moves_w = (t is not None and not _is_zero(t) for t in (tx, te, tw))
    by_x = (
        bind(
            combine_transpose_p,
            *handle,
            tx,
            *primals[4:],
            rows=rows,
            weights=weights,
            **params,
        )
        if moves_x
        else [None] * len(outs)
    )
    by_other = []
    if rows:
        by_other.append(_weighted_rows(handle, x, tw, params) if moves_w else None)
    if weights:
        by_other.append(_weights_gradient(handle, x, te, params) if moves_e else None)
    return outs, [
        _sum_tangents(out, terms) for out, *terms in zip(outs, by_x, by_other, strict=True)
    ]


def _combine_transpose_transpose(cts, *args, rows, weights, axes, layout):
    handle, operands = args[:3], args[3:]
    params = {"axes": axes, "layout": layout}
    x, e, w = _split_combine_transpose(operands, rows, weights)
    cts = list(cts)
    ct_rows = cts.pop(0) if rows else None
    ct_weights = cts.pop(0) if weights else None
    live_rows = rows and not _is_zero(ct_rows)
    live_weights = weights and not _is_zero(ct_weights)
    if ad.is_undefined_primal(x):
        if live_rows and live_weights:
            grad = bind(combine_tangent_p, *handle, ct_rows, ct_weights, e, w, **params)
        elif live_rows:
            grad = bind(combine_p, *handle, ct_rows, w, **params)
        elif live_weights:
            grad = bind(combine_p, *handle, e, ct_weights, **params)
        else:
            grad = ad.Zero(x.aval)
        return [None] * 3 + [grad] + [None] * (len(operands) - 1)
    if weights and ad.is_undefined_primal(e):
        grad = _weighted_rows(handle, x, ct_weights, params) if live_weights else ad.Zero(e.aval)
        return [None] * 4 + [grad] + [None] * (len(operands) - 2)
    grad = _weights_gradient(handle, x, ct_rows, params) if live_rows else ad.Zero(w.aval)
    return [None] * (len(args) - 1) + [grad]


def _combine_transpose_lowering(ctx, *args, rows, weights, **params):
    return _lower_along(
        "freeio_combine_transpose", ctx, *args, rows=rows, weights=weights, **params
    )


combine_transpose_p = _define(
    "combine_transpose", _combine_transpose_abstract_eval, _combine_transpose_lowering
)
ad.primitive_jvps[combine_transpose_p] = _combine_transpose_jvp
ad.primitive_transposes[combine_transpose_p] = _combine_transpose_transpose
