"""What all primitives of an exchange share: how one is defined, bound, batched and refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import core
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding, PartitionSpec

from freeio_jax.handle import Routes
from freeio_jax.varying import vary, varying_axes


def define(name: str, abstract_eval: Callable, *, multiple_results: bool = True) -> core.Primitive:
    """A primitive ``freeio_<name>``, to be bound by :func:`bind`.

    Args:
      name: of the operation, for errors.
      abstract_eval: ``(*avals, layout, **params)`` to the avals of the results.
      multiple_results: whether it returns a list, and ``abstract_eval`` a list of avals.
    """
    primitive = core.Primitive(f"freeio_{name}")
    primitive.multiple_results = multiple_results
    primitive.def_impl(partial(refuse_outside_shard_map, name))

    @primitive.def_effectful_abstract_eval
    def _(*avals, axes, **params):
        effects = {core.NamedAxisEffect(axis) for axis in axes}
        return abstract_eval(*avals, **params), effects

    batching.fancy_primitive_batchers[primitive] = partial(batch_as_loop, primitive)
    return primitive


def vary_alike(operands, axes: tuple[str, ...]) -> list:
    """The operands, which all vary over the same axes then, ``axes`` included."""
    everywhere = varying_axes(*operands).union(axes)
    return [vary(x, everywhere) for x in operands]


def bind(primitive: core.Primitive, *operands, axes: tuple[str, ...], **params):
    """Evaluates ``primitive`` with operands that all vary over the same axes, ``axes`` included."""
    return primitive.bind(*vary_alike(operands, axes), axes=axes, **params)


def result_aval(like, shape, dtype):
    """The aval of a result of this shape and dtype that varies as ``like`` does."""
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec())
    return like.update(
        shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding
    )


def is_zero(tangent) -> bool:
    """Whether a tangent or cotangent is a symbolic zero."""
    return type(tangent) is ad.Zero


def split_routes(operands):
    """(routes, the other operands) of a call along a handle: the routes come first."""
    num_routes = len(Routes._fields)
    return Routes(*operands[:num_routes]), operands[num_routes:]


#: The rules ``tangents`` that :func:`define_derivatives_along` was given, by primitive.
tangent_rules: dict[core.Primitive, Callable] = {}


def define_derivatives_along(
    primitive: core.Primitive, *, tangents: Callable, transpose: Callable
) -> None:
    """Registers the derivatives of a primitive whose first operands are the routes of a handle.

    Routes are integers and have no derivatives. So the rules get them as one value:

      ``tangents(routes, operands, tangents, results, run=, **params)`` returns the tangents of the
      results.
      ``transpose(ct, routes, *operands, run=, **params)`` returns a cotangent for each operand;
      None for an operand that is known.

    ``run(primitive, *operands, **params)`` evaluates the primitives of which a derivative is made.
    It is :func:`bind`, unless the derivative is to be started and done (``overlap/derivative.py``).
    """

    def jvp_with_routes(primals, operand_tangents, **params):
        routes, operands = split_routes(primals)
        results = bind(primitive, *primals, **params)
        of_operands = split_routes(operand_tangents)[1]
        return results, tangents(routes, operands, of_operands, results, **params)

    def transpose_with_routes(ct, *args, **params):
        routes, operands = split_routes(args)
        return [*(None for _ in routes), *transpose(ct, routes, *operands, **params)]

    tangent_rules[primitive] = tangents
    ad.primitive_jvps[primitive] = jvp_with_routes
    ad.primitive_transposes[primitive] = transpose_with_routes


def refuse_outside_shard_map(name, *_, **__):
    raise RuntimeError(
        f"freeio_jax: {name} was evaluated outside jax.shard_map. Call it per shard inside one."
    )


def batch_as_loop(primitive, axis_data, args, dims, *, axes, **params):
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
