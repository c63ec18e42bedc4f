"""The derivative of an exchange that is started and done: an exchange that is started and done.

To run beside compute, it must start where the forward program has its done, and be done where the
forward program has its start. Then what lies between the two in the forward program lies between
the two in the backward program. Two primitives, which compute nothing, mark the places. ``hold_p``
stands beside the start and returns the operands. ``release_p`` stands behind done and gives the
results their derivative, which is a function of the tangents that ``hold_p`` passes on. ::

    forward program            tangents, linear             their transpose, in reverse order
    x1 = hold(x)               x1' = hold(x')               ct_x = done(unfinished)
    unfinished = start(x)
    ...                        ...                          ...
    y = done(unfinished)
    z = release(x, x1, y)      z' = delayed(x1')            unfinished = start(ct_z)

``delayed_p`` is the operation that is linear in the held tangents, at the place of done. Forward
mode has it there as a synchronous call. Its transpose starts the transposed operation. That is done
where ``hold_p`` is transposed. The routes of a dispatch are a result of it, so nothing of its
derivative could be computed at the place of the start.
"""

from __future__ import annotations

from functools import partial

from jax._src.interpreters import mlir
from jax.interpreters import ad, batching

from freeio_jax.define import bind, split_routes, tangent_rules
from freeio_jax.overlap.define import (
    Primitive,
    as_list,
    as_of,
    batch_all,
    bind_nonzero,
    define_passing,
    define_standing_for,
)
from freeio_jax.overlap.start_done import done_p, start

# --- hold ----------------------------------------------------------------------------------------
#
# operands -> operands


def _hold_transpose(cts, *_, **params):
    """The cotangents come from starts at ``release``, through ties."""
    return bind_nonzero(done_p, cts, **params)


hold_p = define_passing("hold", batch_all)
ad.primitive_jvps[hold_p] = lambda primals, tangents, **params: (
    hold_p.bind(*primals, **params),
    bind_nonzero(hold_p, tangents, **params),
)
ad.primitive_transposes[hold_p] = _hold_transpose
mlir.register_lowering(hold_p, lambda ctx, *operands, **_: operands)


# --- release -------------------------------------------------------------------------------------
#
# (*routes, *operands, *held, *results) -> results
#
# op is an operation along a handle. ``held`` is what ``hold`` has made of its operands. The rules
# need the values of operands, and the tangents of held. Were held values used, too, a program would
# keep both for its backward pass.


def release(op, routes, operands, held, results, **params):
    """``results`` of ``op``, with their derivative. ``params``: num_sms, and those of ``op``."""
    return release_p.bind(*routes, *operands, *held, *results, op=op, num=len(operands), **params)


def _split(values, num):
    """(routes, operands, held, results) of the primitive's operands."""
    routes, values = split_routes(values)
    return routes, values[:num], values[num : 2 * num], values[2 * num :]


def _results(values, num):
    return list(_split(values, num)[-1])


def _release_jvp(primals, tangents, *, op, num, num_sms, **params):
    routes, operands, _, _ = _split(primals, num)
    _, _, of_held, _ = _split(tangents, num)
    results = release_p.bind(*primals, op=op, num=num, num_sms=num_sms, **params)
    of_results = tangent_rules[op](
        routes,
        operands,
        of_held,
        as_of(op, results),
        run=partial(delay, num_sms=num_sms),
        **params,
    )
    return results, as_list(op, of_results)


def _release_transpose(cts, *operands, op, num, num_sms, **params):
    """What jax.linear_transpose asks for: the results as a linear function of ``held``."""
    routes, _, held, _ = _split(operands, num)
    run = partial(start, num_sms=num_sms)
    of_held = ad.primitive_transposes[op](as_of(op, cts), *routes, *held, run=run, **params)
    of_operands = [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in operands]
    first = len(routes) + num
    of_operands[first : first + num] = of_held[len(routes) :]
    return of_operands


def _release_batch(operands, dims, *, num, **_):
    """Under vmap the exchange has run to its end, and its results have a derivative."""
    return _results(operands, num), _results(dims, num)


release_p = Primitive("release", lambda trace, operands, *rest: _results(operands, rest[-1]["num"]))
release_p.def_abstract_eval(lambda *avals, num, **_: _results(avals, num))
ad.primitive_jvps[release_p] = _release_jvp
ad.primitive_transposes[release_p] = _release_transpose
batching.primitive_batchers[release_p] = _release_batch
mlir.register_lowering(release_p, lambda ctx, *operands, num, **_: _results(operands, num))


# --- delayed -------------------------------------------------------------------------------------
#
# operands of op -> results of op, which is linear in the operands that come from ``hold``


def delay(op, *operands, axes, num_sms, **params):
    """``op``, whose transpose runs from here to where the operands were held."""
    return as_of(op, bind(delayed_p, *operands, axes=axes, op=op, num_sms=num_sms, **params))


def _delayed_transpose(cts, *operands, op, num_sms, **params):
    run = partial(start, num_sms=num_sms)
    return ad.primitive_transposes[op](as_of(op, cts), *operands, run=run, **params)


def _delayed_lowering(ctx, *operands, op, num_sms, **params):
    run = mlir.lower_fun(partial(op.bind, **params), multiple_results=op.multiple_results)
    return run(ctx, *operands)


delayed_p = define_standing_for("delayed", "num_sms")
ad.primitive_transposes[delayed_p] = _delayed_transpose
mlir.register_lowering(delayed_p, _delayed_lowering, cacheable=False)
