"""The primitives: results, derivatives and custom call of each, one block for one primitive.

For a fixed handle everything but the routing is multilinear. With rows ``e`` (one for each packed
row), weights ``w`` (one for each assignment) and token rows ``x``, let

    phi(e, w, x) = sum over assignments a = (t, k) of  w[a] * <e[row(a)], x[t]>

Its three partial derivatives are ``combine`` (by x), the weighted dispatch along the handle (by e)
and the dot products that are the weights' gradient (by w). Each is the transpose of the others, so
derivatives of any order are made of the primitives of this file. Only ``dispatch_p`` exchanges
routing. No derivative exchanges it again.

A block begins with the operands and results. ``routes`` are the three arrays of ``Routes``, and
``row(a)`` is the packed row of assignment a, on the rank that hosts its expert; an assignment
without a row adds nothing.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.ad_util import p2tz
from jax.interpreters import ad, mlir
from jax.interpreters import partial_eval as pe

from freeio_jax.define import (
    bind,
    define,
    define_derivatives_along,
    is_zero,
    result_aval,
    split_routes,
)
from freeio_jax.dtypes import COMBINE_DTYPES, accumulator_dtype, combine_dtype_names
from freeio_jax.handle import Routes
from freeio_jax.keep import keep
from freeio_jax.lowering import lower, lower_along, register, register_operation

# --- dispatch: routing and rows in one exchange ------------------------------------------------
#
# (topk_idx, *leaves) -> (*rows, *routes, group_sizes, expert_load, num_dropped, num_invalid)
#
#     rows[row(a)] = leaf[t]   for each assignment a = (t, k), on the rank that hosts its expert


_NUM_COUNTS = 4  # group_sizes, expert_load, num_dropped, num_invalid


def _dispatch_abstract_eval(topk_idx, *leaves, layout):
    i32 = partial(result_aval, topk_idx, dtype=np.int32)
    rows = [_rows_aval(leaf, layout) for leaf in leaves]
    routes = Routes(
        dest_rank=i32(topk_idx.shape),
        dest_row=i32(topk_idx.shape),
        row_source=i32((layout.capacity,)),
    )
    counts = [i32((layout.experts_per_rank,)), i32((layout.experts_per_rank,)), i32(()), i32(())]
    return [*rows, *routes, *counts]


def _rows_aval(leaf, layout):
    return result_aval(leaf, (layout.capacity, *leaf.shape[1:]), leaf.dtype)


def run_dispatch(topk_idx, *leaves, **params):
    """(rows, routes, counts) of a dispatch: all that it returns, by what it is for."""
    return split_dispatched(bind(dispatch_p, topk_idx, *leaves, **params))


def split_dispatched(results):
    """(rows, routes, counts) of a dispatch's results. ``jax.checkpoint`` keeps the last two."""
    num_leaves = len(results) - len(Routes._fields) - _NUM_COUNTS
    routes, counts = split_routes(keep(*results[num_leaves:]))
    return results[:num_leaves], routes, counts


def _dispatch_jvp(primals, tangents, **params):
    rows, routes, counts = run_dispatch(*primals, **params)
    row_tangents = _dispatch_along_tangents(routes, primals[1:], tangents[1:], rows, **params)
    return [*rows, *routes, *counts], [*row_tangents, *map(p2tz, routes), *map(p2tz, counts)]


def _dispatch_partial_eval(trace, topk_idx, *leaves, **params):
    """As a function of unknown leaves a dispatch is linear, once its routes are known.

    ``jax.linear_transpose`` asks for this. One exchange now gives the routes and the rows of known
    leaves. The unknown leaves go along the routes.
    """
    unknown = [leaf for leaf in leaves if not leaf.is_known()]
    if not unknown or not topk_idx.is_known():
        return trace.default_process_primitive(dispatch_p, (topk_idx, *leaves), params)
    ids = topk_idx.pval.get_known()
    # A dispatch takes at least one leaf. Where no leaf is known, nobody uses the ids' rows.
    known = [leaf.pval.get_known() for leaf in leaves if leaf.is_known()] or [ids]
    known_rows, routes, counts = run_dispatch(ids, *known, **params)
    unknown_rows = trace.default_process_primitive(
        dispatch_along_p, (*map(trace.new_const, routes), *unknown), params
    )
    sources = iter(known_rows), iter(unknown_rows)
    return [*(next(sources[not leaf.is_known()]) for leaf in leaves), *routes, *counts]


def _dispatch_lowering(ctx, topk_idx, *leaves, layout, engine, **params):
    scratch = engine.dispatch_scratch(layout, num_leaves=len(leaves))
    return lower(ctx, topk_idx, *leaves, layout=layout, engine=engine, scratch=scratch, **params)


dispatch_p = define("dispatch", _dispatch_abstract_eval)
ad.primitive_jvps[dispatch_p] = _dispatch_jvp
pe.custom_partial_eval_rules[dispatch_p] = _dispatch_partial_eval
register_operation(dispatch_p, _dispatch_lowering)


# --- dispatch_along: rows along a handle, no routing -------------------------------------------
#
# (*routes, *leaves) -> (*rows); linear in the leaves
#
#     rows[row(a)] = leaf[t]


def _dispatch_along_abstract_eval(*operands, layout):
    _, leaves = split_routes(operands)
    return [_rows_aval(leaf, layout) for leaf in leaves]


def _dispatch_along_tangents(routes, leaves, tangents, rows, *, run=bind, **params):
    """The tangents of the rows: those of the leaves that are not zero, dispatched along."""
    nonzero = [tangent for tangent in tangents if not is_zero(tangent)]
    dispatched = iter(run(dispatch_along_p, *routes, *nonzero, **params) if nonzero else ())
    return [
        p2tz(row) if is_zero(tangent) else next(dispatched)
        for row, tangent in zip(rows, tangents, strict=True)
    ]


def _dispatch_along_transpose(cts, routes, *leaves, **params):
    def gradient(ct, leaf):
        if not ad.is_undefined_primal(leaf):
            return None
        return ad.Zero(leaf.aval) if is_zero(ct) else _combine_any(routes, ct, **params)

    return [gradient(ct, leaf) for ct, leaf in zip(cts, leaves, strict=True)]


def _combine_any(routes, rows, *, run=bind, **params):
    """Combine with unit weights; complex rows are summed as pairs of reals."""
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        pair = jnp.stack([rows.real, rows.imag], axis=-1)
        summed = _combine_any(routes, pair, **params)
        return lax.complex(summed[..., 0], summed[..., 1])
    if rows.dtype not in COMBINE_DTYPES:
        raise TypeError(
            f"freeio_jax: the gradient of a dispatch of {rows.dtype} rows needs their sums, which "
            f"exist for {combine_dtype_names()}. Cast the tokens, or stop the "
            "gradient with jax.lax.stop_gradient."
        )
    return run(combine_p, *routes, rows, **params)


dispatch_along_p = define("dispatch_along", _dispatch_along_abstract_eval)
define_derivatives_along(
    dispatch_along_p, tangents=_dispatch_along_tangents, transpose=_dispatch_along_transpose
)
register_operation(dispatch_along_p, lower_along)


# --- combine -----------------------------------------------------------------------------------
#
# (*routes, expert_out[, weights]) -> sums; linear in expert_out and in weights
#
#     sums[t] = sum over k of  weights[t, k] * expert_out[row(t, k)]


def _combine_abstract_eval(*operands, layout):
    _, (expert_out, *_) = split_routes(operands)
    return _sums_aval(expert_out, layout)


def _sums_aval(expert_out, layout):
    return result_aval(expert_out, (layout.num_tokens, *expert_out.shape[1:]), expert_out.dtype)


def _combine_tangents(routes, operands, tangents, out, *, run=bind, **params):
    if all(map(is_zero, tangents)):
        return p2tz(out)
    if len(operands) == 2 and not any(map(is_zero, tangents)):
        return run(combine_tangent_p, *routes, *tangents, *operands, **params)
    mixed = [x if is_zero(t) else t for x, t in zip(operands, tangents, strict=True)]
    return run(combine_p, *routes, *mixed, **params)


def _combine_transpose(ct, routes, expert_out, *weights, run=bind, **params):
    if not ad.is_undefined_primal(expert_out):
        (w,) = weights
        if is_zero(ct):
            return [None, ad.Zero(w.aval)]
        return [None, _weights_gradient(routes, ct, expert_out, run=run, **params)]
    if is_zero(ct):
        gradient = ad.Zero(expert_out.aval)
    elif weights:
        gradient = _weighted_rows(routes, ct, *weights, run=run, **params)
    else:
        (gradient,) = run(dispatch_along_p, *routes, ct, **params)
    return [gradient, *(None for _ in weights)]


def _combine_lowering(ctx, *operands, layout, engine, **params):
    _, (expert_out, *weights) = split_routes(ctx.avals_in)
    return lower_along(
        ctx,
        *operands,
        layout=layout,
        engine=engine,
        scratch=engine.combine_scratch(layout, expert_out),
        weighted=bool(weights),
        **params,
    )


combine_p = define("combine", _combine_abstract_eval, multiple_results=False)
define_derivatives_along(combine_p, tangents=_combine_tangents, transpose=_combine_transpose)
register_operation(combine_p, _combine_lowering)


# --- combine_tangent: the derivative of combine in both operands at once -----------------------
#
# (*routes, expert_out_dot, weights_dot, expert_out, weights) -> sums_dot; linear in the first two
#
#     sums_dot = combine(expert_out_dot, weights) + combine(expert_out, weights_dot)
#
# It is a primitive so that its transpose is one exchange that gives both gradients: the rows of the
# cotangent cross once.


def _combine_tangent_abstract_eval(*operands, layout):
    _, (_, _, expert_out, _) = split_routes(operands)
    return _sums_aval(expert_out, layout)


def _combine_tangent_tangents(routes, operands, tangents, out, *, run=bind, **params):
    e_dot, w_dot, e, w = operands
    t_e_dot, t_w_dot, t_e, t_w = tangents
    pairs = ((t_e_dot, w), (e_dot, t_w), (t_e, w_dot), (e, t_w_dot))
    terms = [
        run(combine_p, *routes, *pair, **params) for pair in pairs if not any(map(is_zero, pair))
    ]
    return _sum_tangents(out, terms)


def _sum_tangents(out, terms):
    """The tangent of ``out``: the sum of the terms, a symbolic zero where there is none."""
    return sum(terms[1:], terms[0]) if terms else p2tz(out)


def _combine_tangent_transpose(ct, routes, e_dot, w_dot, e, w, *, run=bind, **params):
    wants_rows, wants_weights = map(ad.is_undefined_primal, (e_dot, w_dot))
    if is_zero(ct):
        grads = [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in (e_dot, w_dot)]
    elif wants_rows and wants_weights:
        grads = run(combine_transpose_p, *routes, ct, e, w, rows=True, weights=True, **params)
    elif wants_rows:
        grads = [_weighted_rows(routes, ct, w, run=run, **params), None]
    else:
        grads = [None, _weights_gradient(routes, ct, e, run=run, **params)]
    return [*grads, None, None]


def _combine_tangent_lowering(ctx, *operands, engine, **params):
    def two_combines(*operands):
        routes, (e_dot, w_dot, e, w) = split_routes(operands)
        by_rows = bind(combine_p, *routes, e_dot, w, **params)
        return by_rows + bind(combine_p, *routes, e, w_dot, **params)

    return mlir.lower_fun(two_combines, multiple_results=False)(ctx, *operands)


combine_tangent_p = define(
    "combine_tangent", _combine_tangent_abstract_eval, multiple_results=False
)
define_derivatives_along(
    combine_tangent_p, tangents=_combine_tangent_tangents, transpose=_combine_tangent_transpose
)
register(combine_tangent_p, _combine_tangent_lowering)


# --- combine_transpose: the gradients of combine -----------------------------------------------
#
# (*routes, x, expert_out if weights, w if rows) -> (out_rows if rows, out_weights if weights);
# linear in each of x, expert_out and w
#
#     out_rows[row(a)] = w[a] * x[t]
#     out_weights[a]   = <expert_out[row(a)], x[t]>


def _combine_transpose_abstract_eval(*operands, layout, rows, weights):
    _, (x, *_) = split_routes(operands)
    outs = [
        _rows_aval(x, layout),
        result_aval(x, (layout.num_tokens, layout.top_k), accumulator_dtype(x.dtype)),
    ]
    return _only(outs, rows, weights)


def _weighted_rows(routes, x, w, *, run=bind, **params):
    (out,) = run(combine_transpose_p, *routes, x, w, rows=True, weights=False, **params)
    return out


def _weights_gradient(routes, x, expert_out, *, run=bind, **params):
    (out,) = run(combine_transpose_p, *routes, x, expert_out, rows=False, weights=True, **params)
    return out


def _only(values, *present):
    """Those of the values that this call has, by one flag for each."""
    return [value for value, is_present in zip(values, present, strict=True) if is_present]


def _in_place(values, *present):
    """The inverse of :func:`_only`: None stands for what this call does not have."""
    values = iter(values)
    return [next(values) if is_present else None for is_present in present]


def _combine_transpose_tangents(
    routes, operands, tangents, outs, *, rows, weights, run=bind, **params
):
    evaluate = partial(run, combine_transpose_p, *routes, rows=rows, weights=weights, **params)
    x, *others = operands
    t_x, t_e, t_w = _in_place(tangents, True, weights, rows)
    terms = [[] for _ in outs]
    if not is_zero(t_x):
        for of_out, term in zip(terms, evaluate(t_x, *others), strict=True):
            of_out.append(term)
    if rows and not is_zero(t_w):
        terms[0].append(_weighted_rows(routes, x, t_w, run=run, **params))
    if weights and not is_zero(t_e):
        terms[-1].append(_weights_gradient(routes, x, t_e, run=run, **params))
    return [_sum_tangents(out, of_out) for out, of_out in zip(outs, terms, strict=True)]


def _combine_transpose_transpose(cts, routes, *operands, rows, weights, run=bind, **params):
    x, e, w = _in_place(operands, True, weights, rows)
    ct_rows, ct_weights = _in_place(cts, rows, weights)
    has_rows = rows and not is_zero(ct_rows)
    has_weights = weights and not is_zero(ct_weights)
    of_x = of_e = of_w = None
    if ad.is_undefined_primal(x):
        if has_rows and has_weights:
            of_x = run(combine_tangent_p, *routes, ct_rows, ct_weights, e, w, **params)
        elif has_rows:
            of_x = run(combine_p, *routes, ct_rows, w, **params)
        elif has_weights:
            of_x = run(combine_p, *routes, e, ct_weights, **params)
        else:
            of_x = ad.Zero(x.aval)
    elif weights and ad.is_undefined_primal(e):
        of_e = (
            _weighted_rows(routes, x, ct_weights, run=run, **params)
            if has_weights
            else ad.Zero(e.aval)
        )
    else:
        of_w = (
            _weights_gradient(routes, x, ct_rows, run=run, **params)
            if has_rows
            else ad.Zero(w.aval)
        )
    return _only([of_x, of_e, of_w], True, weights, rows)


combine_transpose_p = define("combine_transpose", _combine_transpose_abstract_eval)
define_derivatives_along(
    combine_transpose_p,
    tangents=_combine_transpose_tangents,
    transpose=_combine_transpose_transpose,
)
register_operation(combine_transpose_p, lower_along)
