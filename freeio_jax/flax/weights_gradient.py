"""A dispatch, and experts whose weights' gradients are computed beside the backward exchange.

From the gradient ct_y of the experts' result the backward pass computes two things. One is the
gradient of the packed rows, which an exchange brings back to the tokens. The other is the gradients
of the experts' weights. Neither waits for the other. With product i of the experts, its rows_i, and
the gradient ct_i of its result, the order is to be ::

    ct_rows, ct_i = transposed experts, of ct_y
    sent          = start of the exchange of ct_rows
    ct_weights_i  = rows_i.T @ ct_i, for each product
    ct_tokens     = done(sent)

JAX makes this program of the linear one that computes tangents, which it reverses. So the linear
program must have this order::

    terms_i = rows_i @ weights_i', for each product
    rows'   = dispatch of tokens'
    y'      = derivative of the experts, by rows' and by the terms, which add to the products

It can have this order because rows_i is known from the forward pass. Barriers (``tie``) hold the
terms before the dispatch, and after the place where the backward exchange is done. Each product is
evaluated as often as without this.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from freeio_jax.arguments import dispatch_arguments
from freeio_jax.define import bind, vary_alike
from freeio_jax.flax.experts import Experts
from freeio_jax.grouped_matmul import context, grouped_matmul, use
from freeio_jax.handle import Handle, Routes
from freeio_jax.overlap.derivative import delay, hold_p, release
from freeio_jax.overlap.start_done import tie_p
from freeio_jax.primitives import dispatch_along_p, run_dispatch
from freeio_jax.varying import vary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrived:
    """What a dispatch has brought, for :func:`multiply` alone.

    Attributes:
      routes: of the dispatch.
      held: the tokens, at the place where the backward exchange is done.
      rows: ``[capacity, H]``, packed, without a derivative.
      group_sizes: int32 ``[E/R]``.
      axes, layout: parameters of the exchange.
    """

    routes: Routes
    held: jax.Array
    rows: jax.Array
    group_sizes: jax.Array
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    layout: Any = dataclasses.field(metadata={"static": True})


def dispatch(tokens: jax.Array, topk_idx: jax.Array, **options: Any) -> tuple[Arrived, Handle]:
    """``freeio_jax.dispatch``; what has arrived is for :func:`multiply`."""
    (tokens,), _, topk_idx, layout, axes = dispatch_arguments(tokens, topk_idx, **options)
    topk_idx, tokens = vary_alike((topk_idx, tokens), axes)
    (held,) = hold_p.bind(tokens, name="dispatch")
    how = {"axes": axes, "layout": layout}
    (rows,), routes, counts = run_dispatch(topk_idx, lax.stop_gradient(tokens), **how)
    group_sizes, load, dropped, invalid = counts
    handle = Handle(load, dropped, invalid, *routes, layout, axes)
    return Arrived(routes, held, rows, group_sizes, **how), handle


def multiply(experts: Experts, parameters: dict[str, jax.Array], arrived: Arrived) -> jax.Array:
    """``experts(parameters, rows, group_sizes)`` of what has arrived.

    The gradient of a parameter is computed beside the backward exchange as far as ``experts`` pass
    the parameter, as it is, to ``grouped_matmul``. In a function that JAX traces by itself
    (``jax.checkpoint``, ``jax.jit``, ``lax.cond``, ``lax.scan``, ``jax.vmap``) it is computed where
    JAX puts it.
    """
    return _multiply(experts, context.implementation.value, parameters, arrived)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _multiply(experts, implementation, parameters, arrived):
    with use(implementation):
        return experts(parameters, arrived.rows, arrived.group_sizes)


def _multiply_jvp(experts, implementation, primals, tangents):
    parameters, arrived = primals
    of_parameters, of_held = tangents[0], tangents[1].held
    of_parameters = {n: t for n, t in of_parameters.items() if not _is_zero(t)}
    # With a derivative, for derivatives of higher order.
    how = {"axes": arrived.axes, "layout": arrived.layout}
    held, routes = [arrived.held], arrived.routes
    (arrived_rows,) = release(
        dispatch_along_p, routes, held, held, [arrived.rows], num_sms=0, **how
    )
    moves = not _is_zero(of_held)
    args = {n: parameters[n] for n in of_parameters}, {"rows": arrived_rows} if moves else {}

    def evaluate(changing, rows, added=None):
        """The experts' result, and their products by changing parameters.

        A product does not depend on ``changing`` here. Its result depends on ``added`` instead.
        """
        products, rows = [], rows.get("rows", arrived_rows)
        names = {id(parameter): name for name, parameter in changing.items()}
        here = jax.extend.core.get_opaque_trace_state()

        def substitute(left, weights, group_sizes):
            name = names.get(id(weights))
            # A function that JAX traces by itself may close over a parameter. Its rows and results
            # must not leave it.
            if name is None or jax.extend.core.get_opaque_trace_state() != here:
                return grouped_matmul(left, weights, group_sizes)
            out = grouped_matmul(left, parameters[name], group_sizes)
            if added is not None:
                out = _plus(out, added[len(products)])
            products.append((name, left, group_sizes, out))
            return out

        with context.replaced(substitute), use(implementation):
            y = experts(parameters | changing, rows, arrived.group_sizes)
        return y, products

    def look_at_results(*args):
        results.extend(jax.typeof(out) for *_, out in evaluate(*args)[1])

    def with_operands(*args):
        y, products = evaluate(*args)
        names.extend(name for name, *_ in products)
        return y, [(left, group_sizes) for _, left, group_sizes, _ in products]

    def of_rows(run):
        return {"rows": run(dispatch_along_p, *routes, of_held, **how)[0]} if moves else {}

    names, results = [], []
    jax.eval_shape(look_at_results, *args)
    if not results:  # nothing that could run beside the exchange
        return jax.jvp(lambda *args: evaluate(*args)[0], args, (of_parameters, of_rows(bind)))
    zeros = [vary(jnp.zeros(r.shape, r.dtype), r.mat.varying) for r in results]
    y, derivative, operands = jax.linearize(with_operands, *args, zeros, has_aux=True)

    # The terms of the weights, and then the exchange: its transpose runs beside theirs.
    weights = {name: of_parameters[name] for name in dict.fromkeys(names)}
    if moves:
        (*tied, of_held) = tie_p.bind(*weights.values(), of_held)
        weights = dict(zip(weights, tied, strict=True))
    with use(implementation), jax.named_scope("weights_gradient"):
        terms = [
            grouped_matmul(left, weights[name], group_sizes)
            for name, (left, group_sizes) in zip(names, operands, strict=True)
        ]
    if moves:
        (*terms, of_held) = tie_p.bind(*terms, of_held)
    return y, derivative(of_parameters, of_rows(functools.partial(delay, num_sms=0)), terms)


_multiply.defjvp(_multiply_jvp, symbolic_zeros=True)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, SymbolicZero)


@jax.custom_jvp
def _plus(out, added):
    """``out``, with the tangents of both. What is added is zero."""
    return out


@_plus.defjvp
def _plus_jvp(primals, tangents):
    return primals[0], tangents[0] + tangents[1]
