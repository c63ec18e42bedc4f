"""The primitives that start an exchange, wait for it, and put compute between the two.

``start_p`` starts an operation of ``primitives.py``. Its results have the types of the operation's,
but nobody may look at them: the exchange still writes them. ``done_p`` waits for the exchange, and
returns them. ``tie_p`` keeps compute between the two. ::

    unfinished = start(operands)                  launches the kernel
    args, unfinished = tie(args, unfinished)      compute comes after the start
    result = fn(args)
    result, unfinished = tie(result, unfinished)  done comes after compute
    results = done(unfinished)                    waits for the kernel

JAX does not know that a start has an effect. If it knew, ``jax.checkpoint`` would save what a start
returns, and XLA would copy it before it is there. XLA does know, or it could merge equal starts, or
remove one.

The derivative of a start is that of the operation, which then runs at once. Done passes on what is
complete. That serves derivatives of higher order. ``derivative.py`` has the first derivative.
"""

from __future__ import annotations

from jax._src.ad_util import p2tz
from jax._src.interpreters import mlir
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from freeio_jax.define import bind, is_zero
from freeio_jax.lowering import register
from freeio_jax.overlap import calls
from freeio_jax.overlap.define import (
    as_of,
    batch_all,
    bind_nonzero,
    define_passing,
    define_standing_for,
    residuals,
)
from freeio_jax.primitives import dispatch_along_p, dispatch_p, run_dispatch

# --- start ---------------------------------------------------------------------------------------
#
# operands of op -> results of op, unfinished


def start(op, *operands, axes, num_sms, origin=None, **params):
    """Starts ``op``. Its results are to be passed to nothing but ``tie_p`` and ``done_p``.

    Args:
      op: the primitive of an operation.
      operands: of ``op``.
      axes: the mesh axes over which ranks exchange.
      num_sms: multiprocessors that the exchange may use; 0 means the setting ``overlap_num_sms``.
      origin: of the user's call, if ``derivative.release_p`` gives the results their derivative.
        None where this is a part of a derivative.
      params: of ``op``.
    """
    results = bind(start_p, *operands, axes=axes, op=op, num_sms=num_sms, origin=origin, **params)
    return as_of(op, results)


start_p = define_standing_for("start", "num_sms", "origin")
_jvp_of_operation = ad.primitive_jvps[start_p]


def _start_jvp(primals, tangents, *, origin, **params):
    if origin is None:
        return _jvp_of_operation(primals, tangents, origin=origin, **params)
    results = start_p.bind(*primals, origin=origin, **params)
    return results, [p2tz(x) for x in results]


def _start_transpose(cts, *operands, op, num_sms, origin, **params):
    if all(map(is_zero, cts)):
        return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in operands]
    return ad.primitive_transposes[op](as_of(op, cts), *operands, **params)


def _start_partial_eval(trace, *operands, op, num_sms, origin, **params):
    """As that of a dispatch: known ids are exchanged now. Unknown leaves go along the routes."""
    all_params = {"op": op, "num_sms": num_sms, "origin": origin, **params}
    is_known = [x.is_known() for x in operands]
    if op is not dispatch_p or not is_known[0] or all(is_known):
        return trace.default_process_primitive(start_p, operands, all_params)
    ids, *leaves = operands
    ids = ids.pval.get_known()
    known = [leaf.pval.get_known() for leaf in leaves if leaf.is_known()] or [ids]
    known_rows, routes, counts = run_dispatch(ids, *known, **params)
    unknown_rows = trace.default_process_primitive(
        start_p,
        (*map(trace.new_const, routes), *(leaf for leaf in leaves if not leaf.is_known())),
        {**all_params, "op": dispatch_along_p},
    )
    rows = {True: iter(known_rows), False: iter(unknown_rows)}
    return [*(next(rows[leaf.is_known()]) for leaf in leaves), *routes, *counts]


def _start_partial_eval_jaxpr(policy, unknown, instantiated, eqn):
    """jax.checkpoint never saves what a start returns: it saves done's results, or starts again."""
    yes, no = [True] * len(eqn.outvars), [False] * len(eqn.outvars)
    needed = residuals(eqn, instantiated)
    if any(unknown):
        return None, eqn, yes, yes, needed
    return eqn, eqn, no, yes, needed


def _start_eliminate_dead(used, *rest):
    eqn = rest[-1]
    _check_done(eqn.params["origin"])
    if not any(used):
        return [False] * len(eqn.invars), None
    return [True] * len(eqn.invars), eqn


def _check_done(origin):
    """To be called for a program that is traced to its end."""
    if origin is not None:
        origin.check_done()


def _start_lowering(ctx, *operands, origin, **params):
    _check_done(origin)
    return calls.lower_start(ctx, *operands, **params)


ad.primitive_jvps[start_p] = _start_jvp
ad.primitive_transposes[start_p] = _start_transpose
pe.custom_partial_eval_rules[start_p] = _start_partial_eval
pe.partial_eval_jaxpr_custom_rules[start_p] = _start_partial_eval_jaxpr
pe.dce_rules[start_p] = _start_eliminate_dead
register(start_p, _start_lowering)


# --- done ----------------------------------------------------------------------------------------
#
# unfinished results of starts -> the same, complete


def _done_jvp(primals, tangents, **params):
    return done_p.bind(*primals, **params), tangents


def _done_batch(primitive, operands, dims, **params):
    """Under vmap a start has run to its end: results that are mapped are complete."""
    unmapped = [x for x, dim in zip(operands, dims, strict=True) if dim is None]
    results = iter(primitive.bind(*unmapped, **params) if unmapped else ())
    return [next(results) if d is None else x for x, d in zip(operands, dims, strict=True)], dims


done_p = define_passing("done", _done_batch)
ad.primitive_jvps[done_p] = _done_jvp
ad.primitive_transposes[done_p] = lambda cts, *_, **__: cts
register(done_p, calls.lower_done)


# --- tie -----------------------------------------------------------------------------------------
#
# values -> values, of which XLA schedules the users when all are there, or started
#
# Other than in jax.lax.optimization_barrier, zero tangents and cotangents stay symbolic. If they
# became arrays, they would be exchanged. And values that nobody uses go: so does their start.

tie_p = define_passing("tie", batch_all)
ad.primitive_jvps[tie_p] = lambda primals, tangents: (
    tie_p.bind(*primals),
    bind_nonzero(tie_p, tangents),
)
ad.primitive_transposes[tie_p] = lambda cts, *_: bind_nonzero(tie_p, cts)
mlir.register_lowering(tie_p, lambda ctx, *values: calls.barrier(values))
