"""From primitives to custom calls: what XLA compiles for each of them on each platform.

A custom call has this device's index in the mesh as its first operand, then the primitive's
operands, and sizes and groups as attributes. The engines in ``xla_ffi`` read them in this order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax._src import core, dispatch
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import hlo
from jax._src.mesh import get_concrete_mesh
from jax.sharding import Mesh, PartitionSpec

from freeio_jax import hosts, log, runtime, transport
from freeio_jax.engines import ENGINES

#: The rules of primitives, by primitive.
lowerings: dict[core.Primitive, Callable] = {}


def register_operation(primitive: core.Primitive, lowering: Callable) -> None:
    """As :func:`register`, for an operation: a transport lowers it where a group spans hosts."""
    operation = primitive.name.removeprefix("freeio_")

    def lower_here_or_across(ctx, *operands, engine, axes, layout, start=None, **params):
        groups = _groups(ctx.module_context.axis_context.mesh, axes)
        runtime.require_initialize()
        spanned = hosts.of_groups(ctx.module_context.axis_context.mesh, groups)
        if spanned is None or engine.knows_hosts:
            known = {} if start is None else {"start": start}
            return lowering(
                ctx, *operands, engine=engine, axes=axes, layout=layout, **known, **params
            )
        meet = None
        if engine.meets:
            meet = partial(
                _meet,
                engine=engine,
                operation=operation,
                layout=layout,
                groups=groups,
                rows_text=transport.describe_rows(operation, ctx.avals_in),
            )
        # A transport has nothing that only starts: the operation runs to its end.
        carrier = transport.choose(engine.platform, ctx.module_context.axis_context.mesh, groups)
        call = transport.SpanningCall(
            operation=operation,
            lowering=lowering,
            engine=engine,
            meet=meet,
            device_index=lambda: (_device_index(ctx), _INDEX),
            groups=groups,
            hosts=spanned,
        )
        return carrier.lower(ctx, *operands, call=call, axes=axes, layout=layout, **params)

    register(primitive, lower_here_or_across)


def _meet(ctx, value, *, engine, operation, layout, groups, rows_text):
    """``value``, when all ranks of its group have come to the operation that follows."""
    engine.start()
    (aval,) = ctx.avals_in
    if not aval.size:
        return value  # there is nothing to exchange
    call_ctx = ctx.replace(avals_in=[_INDEX, aval], avals_out=[aval])
    (result,) = jax.ffi.ffi_lowering("freeio_meet", operand_output_aliases={1: 0})(
        call_ctx,
        _device_index(ctx),
        value,
        operation=operation,
        rows_text=rows_text,
        **_attributes(engine, ctx, layout, groups),
    )
    return result


def register(primitive: core.Primitive, lowering: Callable) -> None:
    """Lowers ``primitive`` by ``lowering(ctx, *operands, engine=, **params)`` for each engine.

    On a platform without an engine the lowering raises NotImplementedError.
    """
    lowerings[primitive] = lowering
    rules = {platform: partial(lowering, engine=engine) for platform, engine in ENGINES.items()}

    def lower_per_platform(ctx, *operands, **params):
        # JAX finds the rules of a program for several platforms only in lowerings that it caches:
        # in others it adds avals_out, a tuple, to a list.
        ctx = ctx.replace(avals_out=[*ctx.avals_out])
        default = _lower_without_engine
        return mlir.lower_per_platform(
            ctx, str(primitive), rules, default, frozenset(), *operands, **params
        )

    # Equal calls are lowered one by one: each has its number in the module.
    mlir.register_lowering(primitive, lower_per_platform, cacheable=False)
    if any(engine.needs_devices for engine in ENGINES.values()):
        dispatch.prim_requires_devices_during_lowering.add(primitive)


def _lower_without_engine(ctx, *_, op=None, **__):
    name = (op or ctx.primitive).name.removeprefix("freeio_")
    raise NotImplementedError(
        f"freeio_jax.{name} has no engine for platform(s) "
        f"{tuple(ctx.module_context.platforms)} in this installation; there is one for "
        f"{', '.join(ENGINES)}. freeio_jax.reference runs on every platform."
    )


def lower(ctx, *operands, axes, layout, engine, scratch=(), start=None, **attributes):
    """The custom call of ``ctx.primitive``, which is the name of its target, too.

    Args:
      ctx: JAX's lowering context.
      operands: MLIR values, as ``ctx.avals_in`` describes them.
      axes: the mesh axes over which ranks exchange.
      layout: the exchange's geometry.
      engine: one of ``ENGINES``.
      scratch: (shape, dtype) of each buffer that the engine needs beside the results. XLA owns
        them because they are results of the custom call. They are not returned.
      start: None, or a function that makes the call which only starts the exchange. It takes
        (ctx, target, operands, attributes), and returns the results.
      attributes: further attributes of the custom call, as integers.

    Returns:
      MLIR values, as ``ctx.avals_out`` describes them.
    """
    engine.start()
    target, mesh = ctx.primitive.name, ctx.module_context.axis_context.mesh
    if log.logger.isEnabledFor(logging.DEBUG):
        operand_types = ", ".join(f"{aval.dtype}{list(aval.shape)}" for aval in ctx.avals_in)
        log.logger.debug(
            "compiles %s(%s), %s, %s", target, operand_types, layout, _where(mesh, axes)
        )
    avals_in = ctx.avals_in
    avals_out = [*ctx.avals_out, *(core.ShapedArray(*buffer) for buffer in scratch)]
    operands = [
        operand if aval.size else _zeros(_not_empty(aval))
        for operand, aval in zip(operands, avals_in, strict=True)
    ]
    avals_in, avals_out = map(_not_empty, avals_in), map(_not_empty, avals_out)
    if (check := engine.program_check(ctx.module_context)) is not None:
        # It has no results. XLA keeps it because of its side effect.
        jax.ffi.ffi_lowering("freeio_check", has_side_effect=True)(
            ctx.replace(avals_in=[], avals_out=[]), **check
        )
    call_ctx = ctx.replace(avals_in=[_INDEX, *avals_in], avals_out=[*avals_out])
    operands = [_device_index(ctx), *operands]
    groups = _groups(mesh, axes)
    attributes = {
        **_attributes(engine, ctx, layout, groups),
        **{name: np.int64(value) for name, value in attributes.items()},
    }
    if (spanned := hosts.of_groups(mesh, groups)) is not None:
        attributes["hosts"] = spanned.reshape(-1)
    if start is None:
        results = jax.ffi.ffi_lowering(target + engine.suffix)(call_ctx, *operands, **attributes)
        room = engine.room(ctx.module_context)
        room.calls.append(results[0].owner)
        if room.num_sms is not None:
            _leave_room(results[0].owner, room.num_sms)
    else:
        results = start(call_ctx, target, operands, attributes)
    return [
        result if aval.size else _zeros(aval)
        for result, aval in zip(results, ctx.avals_out, strict=False)  # without the scratch
    ]


def _attributes(engine, ctx, layout, groups):
    """The attributes that all custom calls of an engine have."""
    return {
        "groups": groups.reshape(-1),
        "num_ranks": np.int64(layout.num_ranks),
        "num_tokens": np.int64(layout.num_tokens),
        "top_k": np.int64(layout.top_k),
        "num_experts": np.int64(layout.num_experts),
        "capacity": np.int64(layout.capacity),
        "alignment": np.int64(layout.alignment),
        "zero_tail": np.int64(layout.zero_tail),
        **engine.attributes(ctx.module_context),
    }


def make_room(room, num_sms):
    """Has all synchronous calls of a module leave room for a start that asks for ``num_sms``."""
    if room.num_sms is not None and room.num_sms >= num_sms:
        return
    room.num_sms = num_sms
    for call in room.calls:
        _leave_room(call, num_sms)


def _leave_room(call, num_sms):
    name = "mhlo.backend_config"  # where a custom call has the attributes that its handler gets
    attributes = {attribute.name: attribute.attr for attribute in call.attributes[name]}
    attributes["starts_num_sms"] = mlir.ir_attribute(np.int64(num_sms))
    call.attributes[name] = ir.DictAttr.get(attributes)


def lower_along(ctx, *operands, layout, engine, **params):
    """As :func:`lower`, for calls along a handle.

    They do nothing but move rows. Without tokens, without packed rows, or without elements in the
    results, the results are zeros, and nothing is called.
    """
    if not (layout.num_tokens and layout.capacity and any(a.size for a in ctx.avals_out)):
        return [*map(_zeros, ctx.avals_out)]
    return lower(ctx, *operands, layout=layout, engine=engine, **params)


# --- Buffers without elements ------------------------------------------------------------------
#
# They stay out of the custom calls. XLA:GPU crashes when it compiles a call that has one, and
# XLA:CPU of jaxlib 0.11 does if the call has others, too.


def _not_empty(aval):
    """What stands for an array without elements: one along each dimension that has none."""
    return core.ShapedArray(tuple(max(1, size) for size in aval.shape), aval.dtype)


def _zeros(aval):
    # Lowered as a broadcast of one zero.
    return mlir.ir_constant(np.broadcast_to(np.zeros((), aval.dtype), aval.shape))


# --- Devices and groups ------------------------------------------------------------------------

_INDEX = core.ShapedArray((), np.uint32)

device_index_p = core.Primitive("freeio_device_index")
device_index_p.def_abstract_eval(lambda: _INDEX)
mlir.register_lowering(device_index_p, lambda ctx: [hlo.partition_id()])


def _device_index(ctx):
    """This device's index in the mesh, by which the attribute ``groups`` names the members."""
    axis_context = ctx.module_context.axis_context
    manual = getattr(axis_context, "manual_axes", frozenset())
    if not manual or manual == frozenset(axis_context.mesh.axis_names):
        return hlo.partition_id()
    # XLA has no partition id in a shard_map that leaves axes over: one over the rest has it.
    return mlir.lower_fun(
        lambda: jax.shard_map(
            device_index_p.bind, in_specs=(), out_specs=PartitionSpec(), check_vma=False
        )(),
        multiple_results=False,
    )(ctx.replace(primitive=None, avals_in=[], avals_out=[_INDEX]))[0]


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
