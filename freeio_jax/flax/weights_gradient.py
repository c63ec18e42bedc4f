"""A dispatch whose experts compute their weights' gradients beside the backward exchange.

In the backward pass the gradient of the experts' rows goes back to the tokens by an exchange. The
gradients of the experts' weights need not wait for it, and it need not wait for them. So they run
beside it. Reverse mode runs the linear program of the tangents backwards. In that program the
experts' products have two parts: ::

    backward pass                                 tangents, linear, in their order
    ct_tokens = done(sent), ct_weights            tokens' = hold(tokens')
    ct_weights = products of rows and ct          terms   = products of rows and weights'
    sent = start(ct_rows)                         rows'   = dispatch(tokens'), after the terms
    ct_rows, ct = experts' transpose of ct_y      y'      = experts' derivative of rows', plus terms

The rows that a product multiplies are known from the forward pass. So the rule of the derivative can
evaluate ``rows @ weights'`` of each product before the tangents of rows arrive. It adds that term to
the tangent of the product's result. Barriers (``tie``) stand before and behind the terms. The
transposed program starts its exchange before the terms' transposes, and is done after them.

Each product is evaluated as often as without this.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
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


def multiply(
    experts: Experts, parameters: dict[str, jax.Array], arrived: Arrived
) -> jax.Array:
    """``experts(parameters, rows, group_sizes)`` of what has arrived.

    The gradient of a parameter is computed beside the backward exchange as far as ``experts`` pass
    the parameter, as it is, to ``grouped_matmul``.
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
    of_rows = {} if _is_zero(of_held) else {"rows": arrived_rows}

    def evaluate(changing, rows, added=None):
        """The experts' result, and their products by changing parameters.

        Such a product is linear in its rows here, and in what is added to its result.
        """
        products, rows = [], rows.get("rows", arrived_rows)
        names = {id(parameter): name for name, parameter in changing.items()}

        def substitute(left, weights, group_sizes):
            name = names.get(id(weights))
            if name is None:
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

    names, results = [], []
    changing = {name: parameters[name] for name in of_parameters}
    jax.eval_shape(look_at_results, changing, of_rows)
    zeros = [vary(jnp.zeros(r.shape, r.dtype), r.mat.varying) for r in results]
    y, derivative, operands = jax.linearize(with_operands, changing, of_rows, zeros, has_aux=True)

    # The terms of the weights, and then the exchange: its transpose runs beside theirs.
    run = functools.partial(delay, num_sms=0) if names and of_rows else bind
    weights = {name: of_parameters[name] for name in dict.fromkeys(names)}
    if of_rows:
        (*tied, of_held) = tie_p.bind(*weights.values(), of_held)
        weights = dict(zip(weights, tied, strict=True))
    with use(implementation), jax.named_scope("weights_gradient"):
        terms = [
            grouped_matmul(left, weights[name], group_sizes)
            for name, (left, group_sizes) in zip(names, operands, strict=True)
        ]
    if of_rows:
        (*terms, of_held) = tie_p.bind(*terms, of_held)
        (of_rows["rows"],) = run(dispatch_along_p, *routes, of_held, **how)
    return y, derivative(of_parameters, of_rows, terms)


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
