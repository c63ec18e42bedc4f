"""The custom calls of start and done.

An engine whose ``starts_apart`` is true has a call ``freeio_<operation>_start`` for each operation,
and one call ``freeio_done``. A start has the operands, results and attributes of the synchronous
call, and two attributes more: ``num_sms``, and ``start``, its number in the module. Its done has
this number, too. The operands and all results of the start are operands of done. The results of
done are those of the start, each in place. Scratch buffers stay out.

For other engines the start is the synchronous call, and done does nothing.

Between the two the kernel reads and writes buffers that XLA knows nothing of. XLA must not reuse
one: so all of them are operands of done. It must not copy a result, which is not there yet: so
results go nowhere but into barriers and into done. It must not move compute out from between, nor
fuse anything with a result of done, which would not be in place then: so barriers stand before and
behind both calls.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import hlo

from freeio_jax.lowering import lowerings, make_room


def barrier(values) -> list[ir.Value]:
    """The values, of which XLA schedules the users when all are there, or started.

    A value without elements has nothing to wait for and stays out. XLA for GPUs crashes while it
    simplifies a barrier that has one (jax 0.11.2).
    """
    values = list(values)
    is_filled = [0 not in ir.RankedTensorType(value.type).shape for value in values]
    filled = list(itertools.compress(values, is_filled))
    results = iter(hlo.OptimizationBarrierOp(filled).results if filled else ())
    return [next(results) if f else v for v, f in zip(values, is_filled, strict=True)]


@dataclasses.dataclass
class Started:
    """A start that was lowered.

    Attributes:
      ctx: JAX's lowering context, with the types of operands and results.
      operands: the custom call's.
      results: the custom call's. Scratch buffers come last.
      num_results: how many of them are no scratch buffers.
    """

    ctx: mlir.LoweringRuleContext
    operands: list[ir.Value]
    results: list[ir.Value]
    num_results: int


def _runs_apart(ctx, engine) -> bool:
    """Whether start and done are calls of their own.

    In a program for several platforms each call is a choice between those of all platforms. A done
    could not find its start there.
    """
    return engine.starts_apart and len(ctx.module_context.platforms) == 1


def lower_start(ctx, *operands, op, num_sms, engine, **params):
    """A start of ``op``, or ``op`` itself."""
    ctx = ctx.replace(primitive=op)
    if _runs_apart(ctx, engine):
        operands = barrier(operands)
        params["start"] = partial(
            _start_call, engine=engine, num_sms=num_sms, num_results=len(ctx.avals_out)
        )
    return lowerings[op](ctx, *operands, engine=engine, **params)


def _start_call(ctx, target, operands, attributes, *, engine, num_sms, num_results):
    starts = engine.starts(ctx.module_context)
    number = len(starts)
    results = jax.ffi.ffi_lowering(f"{target}_start", has_side_effect=True)(
        ctx, *operands, **attributes, num_sms=np.int64(num_sms), start=np.int64(number)
    )
    make_room(engine.room(ctx.module_context), num_sms)
    starts[number] = Started(ctx, operands, list(results), num_results)
    return barrier(results[:num_results])


def lower_done(ctx, *unfinished, name, engine):
    """The dones of all starts that the values come from. ``name`` is that of the user's call."""
    made_by = [_start_of(value, ctx, name, engine) for value in unfinished]
    if not _runs_apart(ctx, engine):
        return unfinished
    of_start = {}
    for value, (number, index) in zip(unfinished, made_by, strict=True):
        of_start.setdefault(number, {})[index] = value
    complete = {
        number: _done_call(ctx, number, values, engine)
        for number, values in of_start.items()
        if number is not None
    }
    return [
        value if number is None else complete[number][index]
        for value, (number, index) in zip(unfinished, made_by, strict=True)
    ]


#: Operations that may return what was started in another block of operations.
_CONTROL_FLOW = ("func.call", "stablehlo.while", "stablehlo.case", "stablehlo.if")


def _start_of(value, ctx, name, engine):
    """The number of the start whose result a value is, and which result.

    (None, 0) if the value is complete because the operation has run to its end: on CPU, in a
    derivative of higher order, or where there was nothing to exchange.

    Raises:
      RuntimeError: the start may be in another block of operations. XLA passes values to other
        blocks by copying them.
    """
    while not isinstance(owner := value.owner, ir.Block):
        operation = owner.operation
        if operation.name != "stablehlo.optimization_barrier":
            break
        value = operation.operands[ir.OpResult(value).result_number]
    if (
        isinstance(owner, ir.Block)
        or operation.block != ir.InsertionPoint.current.block
        or operation.name in _CONTROL_FLOW
    ):
        raise RuntimeError(
            f"freeio_jax: the exchange of a {name} is done in another function or loop body than "
            "the one that started it. Start it and call done() in one function and loop body."
        )
    for number, started in engine.starts(ctx.module_context).items():
        if started.results[0].owner.operation == operation:
            return number, ir.OpResult(value).result_number
    return None, 0


def _done_call(ctx, number, values, engine):
    """The results of a start, complete. ``values``: those that have come through barriers."""
    started = engine.starts(ctx.module_context)[number]
    results = [values.get(i, result) for i, result in enumerate(started.results)]
    num_results, num_operands = started.num_results, len(started.operands)
    complete = jax.ffi.ffi_lowering(
        "freeio_done",
        has_side_effect=True,
        operand_output_aliases={num_operands + i: i for i in range(num_results)},
    )(
        ctx.replace(
            avals_in=[*started.ctx.avals_in, *started.ctx.avals_out],
            avals_out=started.ctx.avals_out[:num_results],
        ),
        *started.operands,
        *barrier(results[:num_results]),
        *results[num_results:],
        start=np.int64(number),
        **engine.attributes(ctx.module_context),
    )
    return barrier(complete)
