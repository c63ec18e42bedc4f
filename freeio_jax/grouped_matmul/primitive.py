"""The primitive behind grouped_matmul: its derivatives, batching and lowering."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config, core, dispatch
from jax._src.ad_util import p2tz
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from freeio_jax.grouped_matmul import choice
from freeio_jax.grouped_matmul.product import Product
from freeio_jax.varying import vary, varying_axes

#: (left, right, group_sizes) -> the product's result, in the dtype of both operands.
grouped_matmul_p = core.Primitive("freeio_grouped_matmul")


def bind(product: Product, left, right, group_sizes, by: str | None = None) -> jax.Array:
    """Evaluates ``product``.

    Args:
      product: which one.
      left, right: its operands, of one floating dtype.
      group_sizes: int32 ``[G]``.
      by: name of the implementation; None: the first in the order of choice that is right.
    """
    args = (left, right, group_sizes)
    axes = varying_axes(*args)
    return grouped_matmul_p.bind(*(vary(a, axes) for a in args), product=product, by=by)


def _abstract_eval(left, right, group_sizes, *, product, by):
    for name, operand in zip(product.operands, (left, right), strict=True):
        if any(axis is not None for axis in operand.sharding.spec):
            raise ValueError(
                f"grouped_matmul: operand {name!r} {operand.str_short()} is sharded over explicit "
                "mesh axes. Call grouped_matmul per shard, inside jax.shard_map, or jax.reshard it "
                "first."
            )
    shape = product.shape(left, right, group_sizes.shape[0])
    sharding = NamedSharding(left.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return left.update(shape=shape, weak_type=False, sharding=sharding)


grouped_matmul_p.def_abstract_eval(_abstract_eval)
grouped_matmul_p.def_impl(functools.partial(dispatch.apply_primitive, grouped_matmul_p))


def _is_zero(tangent):
    return type(tangent) is ad.Zero


def _jvp(primals, tangents, *, product, by):
    *operands, group_sizes = primals
    out = bind(product, *operands, group_sizes, by)
    total = None
    for i, tangent in enumerate(tangents[:2]):
        if not _is_zero(tangent):
            term = bind(product, *operands[:i], tangent, *operands[i + 1 :], group_sizes, by)
            total = term if total is None else total + term
    return out, p2tz(out) if total is None else total


def _transpose(cotangent, *args, product, by):
    left, right, group_sizes = args
    operands = (left, right)
    results = [None, None, None]
    for i, operand in enumerate(operands):
        if not ad.is_undefined_primal(operand):
            continue
        if _is_zero(cotangent):
            results[i] = ad.Zero(operand.aval)
        else:
            transposed, given = product.transpose(i, cotangent, operands[1 - i])
            results[i] = bind(transposed, *given, group_sizes, by)
    return results


ad.primitive_jvps[grouped_matmul_p] = _jvp
ad.primitive_transposes[grouped_matmul_p] = _transpose


def _batch(args, dims, *, product, by):
    """One product after the other: each has groups of its own."""
    mapped = [jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True) if d is not None]

    def one(mapped):
        rest = iter(mapped)
        full = (a if d is None else next(rest) for a, d in zip(args, dims, strict=True))
        return bind(product, *full, by)

    return lax.map(one, mapped), 0


batching.primitive_batchers[grouped_matmul_p] = _batch


def _lower(ctx, *operands, product, by, platform):
    left, right, _ = ctx.avals_in
    multiply = choice.choose(
        platform, product, left.dtype, product.widths(left, right), by
    ).implementation.multiply

    def evaluate(left, right, group_sizes):
        # A library need not know over which mesh axes its operands vary; XLA does not, either.
        # And how strict the user is with promotions in their own code is no affair of its.
        with (
            config._check_vma(False),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            return multiply(product, left, right, group_sizes)

    plain = ctx.replace(
        primitive=None,
        avals_in=[core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in],
    )
    return mlir.lower_fun(evaluate, multiple_results=False)(plain, *operands)


for _platform in (*choice.CANDIDATES, None):
    mlir.register_lowering(
        grouped_matmul_p, functools.partial(_lower, platform=_platform), platform=_platform
    )
