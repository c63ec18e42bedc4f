"""keep: what ``jax.checkpoint`` saves of a dispatch under every policy that saves something.

Derivatives need the routes and counts of a dispatch, which are small. Where a policy saves the rows
of a dispatch (by ``checkpoint_name``), and these are saved, too, the backward pass does not run the
dispatch again.
"""

from __future__ import annotations

import jax
from jax._src import core
from jax.interpreters import batching, mlir
from jax.interpreters import partial_eval as pe


def keep(*arrays):
    """The arrays, which ``jax.checkpoint`` saves unless its policy is to save nothing."""
    return keep_p.bind(*arrays)


def _partial_eval(policy, unknown, instantiated, eqn):
    """The rule of jax.checkpoint.

    Returns:
      (eqn of the forward pass, eqn of the backward pass, which results are unknown, which of them
      the backward pass computes, what of the operands is saved for that).
    """
    not_instantiated = [
        v
        for v, is_there in zip(eqn.invars, instantiated, strict=True)
        if not is_there and isinstance(v, core.Var)
    ]
    yes, no = [True] * len(eqn.outvars), [False] * len(eqn.outvars)
    if any(unknown):
        return None, eqn, yes, yes, not_instantiated
    if policy is jax.checkpoint_policies.nothing_saveable:
        return eqn, eqn, no, yes, not_instantiated
    return eqn, None, no, no, []


keep_p = core.Primitive("freeio_keep")
keep_p.multiple_results = True
keep_p.def_impl(lambda *arrays: arrays)
keep_p.def_abstract_eval(lambda *avals: avals)
mlir.register_lowering(keep_p, lambda ctx, *arrays: arrays)
batching.primitive_batchers[keep_p] = lambda arrays, dims: (keep_p.bind(*arrays), dims)
pe.partial_eval_jaxpr_custom_rules[keep_p] = _partial_eval
