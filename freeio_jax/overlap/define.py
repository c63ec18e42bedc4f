"""What the primitives of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jax._src import core
from jax._src.shard_map import ShardMapTrace
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from freeio_jax.define import batch_as_loop, is_zero, refuse_outside_shard_map


class Primitive(core.Primitive):
    """A primitive that ``shard_map`` without ``jit`` evaluates by ``at_once``.

    Each primitive is a program of its own there. An exchange runs to its end in the program that
    starts it.

    Args:
      name: of the primitive, without the prefix ``freeio_``.
      at_once: ``(trace, operands, ..., params)`` to the list of results.
    """

    multiple_results = True

    def __init__(self, name: str, at_once: Callable):
        super().__init__(f"freeio_{name}")
        self._at_once = at_once
        self.def_impl(partial(refuse_outside_shard_map, name))

    def bind_with_trace(self, trace, operands, *rest):
        if isinstance(trace, ShardMapTrace):
            return self._at_once(trace, operands, *rest)
        return super().bind_with_trace(trace, operands, *rest)


def residuals(eqn, instantiated) -> list[core.Var]:
    """What the backward pass needs of the forward pass to evaluate the equation again."""
    return [
        v
        for v, is_there in zip(eqn.invars, instantiated, strict=True)
        if not is_there and isinstance(v, core.Var)
    ]


# --- Primitives that pass on each of their operands ----------------------------------------------


def define_passing(name: str, batch: Callable) -> Primitive:
    """A primitive each of whose results is one of its operands, later.

    What is known of some operands is known of their results, whatever the others are. So
    transformations that split a program split such an equation. ``jax.checkpoint`` never saves the
    results, which may not be there yet.

    Args:
      name: of the primitive.
      batch: ``(primitive, operands, dims, **params)`` to results and their dims.
    """
    primitive = Primitive(name, lambda trace, operands, *_: list(operands))
    primitive.def_abstract_eval(lambda *avals, **_: list(avals))

    def partial_eval(trace, *tracers, **params):
        parts = {}
        for is_known in (True, False):
            part = [tracer for tracer in tracers if tracer.is_known() == is_known]
            results = trace.default_process_primitive(primitive, part, params) if part else ()
            parts[is_known] = iter(results)
        return [next(parts[tracer.is_known()]) for tracer in tracers]

    pe.custom_partial_eval_rules[primitive] = partial_eval
    pe.partial_eval_jaxpr_custom_rules[primitive] = _partial_eval_jaxpr
    pe.dce_rules[primitive] = _eliminate_dead
    batching.primitive_batchers[primitive] = partial(batch, primitive)
    return primitive


def _partial_eval_jaxpr(policy, unknown, instantiated, eqn):
    """The rule of jax.checkpoint; ``keep.py`` says what it returns."""
    known_eqn = _only_at(eqn, [not is_unknown for is_unknown in unknown])
    yes = [True] * len(unknown)
    return known_eqn, eqn, list(unknown), yes, residuals(eqn, instantiated)


def _eliminate_dead(used, *rest):
    eqn = rest[-1]  # newer versions of jax pass one argument more before it
    return list(used), _only_at(eqn, used)


def _only_at(eqn, chosen):
    """The equation with the chosen operands and results alone; None where there are none."""
    if not any(chosen):
        return None
    return eqn.replace(
        invars=[v for v, is_chosen in zip(eqn.invars, chosen, strict=True) if is_chosen],
        outvars=[v for v, is_chosen in zip(eqn.outvars, chosen, strict=True) if is_chosen],
    )


def batch_all(primitive, operands, dims, **params):
    """The rule of vmap of a primitive that does not look at its operands."""
    return primitive.bind(*operands, **params), dims


def bind_nonzero(primitive, values, **params) -> list:
    """Evaluates it with the values that are no symbolic zeros; the others stay what they are."""
    nonzero = [x for x in values if not is_zero(x)]
    results = iter(primitive.bind(*nonzero, **params) if nonzero else ())
    return [x if is_zero(x) else next(results) for x in values]


# --- Primitives that stand for an operation ------------------------------------------------------


def as_list(op: core.Primitive, results) -> list:
    """What ``op`` returns, as a list."""
    return list(results) if op.multiple_results else [results]


def as_of(op: core.Primitive, results: list):
    """The inverse of :func:`as_list`."""
    return results if op.multiple_results else results[0]


def define_standing_for(name: str, *own: str) -> Primitive:
    """A primitive that has the operands and results of the operation in its parameter ``op``.

    So are its derivatives. Under vmap, and without jit, it is the operation.

    Args:
      name: of the primitive.
      own: names of its parameters that are not the operation's.
    """

    def operation(params):
        own_names = ("op", *own)
        return params["op"], {k: v for k, v in params.items() if k not in own_names}

    def at_once(trace, operands, *rest):
        *avals, params = rest  # newer versions of jax pass avals, too
        op, params = operation(params)
        return as_list(op, op.bind_with_trace(trace, operands, *avals, params))

    primitive = Primitive(name, at_once)

    @primitive.def_effectful_abstract_eval
    def _(*avals, **params):
        op, params = operation(params)
        results, effects = op.abstract_eval(*avals, **params)
        return as_list(op, results), effects

    def jvp(primals, tangents, **params):
        op, params = operation(params)
        results, of_results = ad.primitive_jvps[op](primals, tangents, **params)
        return as_list(op, results), as_list(op, of_results)

    def batch(axis_data, operands, dims, **params):
        op, params = operation(params)
        results, dims = batch_as_loop(op, axis_data, operands, dims, **params)
        return as_list(op, results), as_list(op, dims)

    ad.primitive_jvps[primitive] = jvp
    batching.fancy_primitive_batchers[primitive] = batch
    return primitive
