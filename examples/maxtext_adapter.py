"""freeio_jax as the exchange of MaxText's MoE layers. Tried with MaxText 0.2.5.

    from maxtext_adapter import freeio_exchange

    with freeio_exchange():
        ...  # build and run MaxText's layers, models or train loop as always

MaxText's ``RoutedMoE`` keeps its router, its losses and its products. In its ``shard_map`` it sorts
rows by expert (``permute``), moves them between ranks and sorts them again. Afterwards it does all
of that backwards (``unpermute``). Here dispatch takes the place of the first three steps, and
combine that of the others. So the layer must not exchange by itself: inside the ``shard_map`` it is
told that there is a single expert rank, which makes it leave out everything between ``permute`` and
the products.

Not supported: ``use_ring_of_experts``, which gathers tokens in a different way, tokens that are
quantized before the exchange, and padding by ``forced_routed_experts``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from maxtext.common.common_types import DecoderBlockType
from maxtext.layers.moe import RoutedMoE

import freeio_jax as fio


@contextlib.contextmanager
def freeio_exchange(on_drop: Callable[[int], None] | None = None) -> Iterator[None]:
    """MoE layers that are traced within this context exchange by freeio_jax.

    Args:
      on_drop: called for each layer, rank and run in which assignments are dropped, with their
        number. MaxText itself has no report of drops for this path. The call is a host callback, so
        it costs time. Drops need a ``ragged_buffer_factor`` above 0.
    """
    replaced = {
        "get_expert_parallelism_size": _expert_parallelism_size,
        "permute": _permute(on_drop),
        "unpermute": _unpermute,
    }
    for name, method in replaced.items():
        setattr(RoutedMoE, name, method)
    try:
        yield
    finally:
        for name in replaced:
            setattr(RoutedMoE, name, _MAXTEXT[name])


_MAXTEXT = {
    name: getattr(RoutedMoE, name)
    for name in ("get_expert_parallelism_size", "permute", "unpermute")
}


def _expert_axes(layer):
    axes = layer._expert_parallelism_name
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _expert_parallelism_size(self):
    """1 inside the layer's shard_map, where MaxText must not exchange; else the true size."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return 1 if set(_expert_axes(self)) <= set(manual) else _MAXTEXT[_SIZE](self)


_SIZE = "get_expert_parallelism_size"


def _permute(on_drop):
    def permute(
        self,
        inputs,
        gate_logits,
        pre_bias_logits,
        use_custom_sort_vjp=True,
        rngs=None,
        roll_to_expert_id=None,
        input_ids=None,
        forced_routed_experts=None,
        **options,
    ):
        _check(self, inputs, forced_routed_experts)
        weights, experts = self.get_topk(gate_logits, pre_bias_logits, rngs, input_ids, None)
        # MaxText's own gives the balance loss and the update of the bias. Its sorted rows have no
        # use, so XLA removes the sort.
        by_maxtext = _MAXTEXT["permute"](
            self,
            inputs,
            gate_logits,
            pre_bias_logits,
            use_custom_sort_vjp,
            rngs,
            input_ids=input_ids,
            precomputed_topk=(weights, experts),
            **options,
        )
        tokens = inputs.reshape(-1, inputs.shape[-1])
        experts = experts.reshape(tokens.shape[0], -1)
        if self.config.decoder_block == DecoderBlockType.LLAMA4:  # weights are on the input
            tokens = tokens * jax.nn.sigmoid(weights.astype(jnp.float32)).reshape(-1, 1)
        out = fio.dispatch(
            tokens.astype(self.dtype),
            experts,
            num_experts=self.config.num_experts,
            axis_name=_expert_axes(self),
            capacity=_capacity(self, experts.size),
        )
        dropped = out.handle.num_dropped
        if on_drop is not None:
            jax.debug.callback(lambda dropped: dropped > 0 and on_drop(int(dropped)), dropped)
        replaced = {
            0: out.tokens,
            1: out.handle,  # MaxText passes it on to unpermute, where it has its sort order
            2: weights,
            3: out.group_sizes,
            4: jnp.minimum(out.expert_of_row(), out.group_sizes.size - 1),  # biases are taken by it
            8: dropped > 0,
        }
        return tuple(replaced.get(i, value) for i, value in enumerate(by_maxtext))

    return permute


def _unpermute(self, intermediate, handle, weights, batch_size, sequence_length, *_, **__):
    weights = weights.reshape(batch_size * sequence_length, -1)
    if self.config.decoder_block == DecoderBlockType.LLAMA4:
        weights = None
    y = fio.combine(intermediate, handle, weights)
    return y.reshape(batch_size, sequence_length, -1).astype(self.dtype)


def _capacity(layer, num_assignments):
    """MaxText's size of a rank's buffer; None, so that nothing is dropped, where it sets none."""
    factor = layer.get_ragged_buffer_factor()
    return int(num_assignments * factor) if factor > 0 else None


def _check(layer, inputs, forced_routed_experts):
    unsupported = {
        "use_ring_of_experts=True": layer.config.use_ring_of_experts,
        "quantized tokens": not isinstance(inputs, jax.Array),
        "forced_routed_experts": forced_routed_experts is not None,
    }
    asked = [name for name, is_asked in unsupported.items() if is_asked]
    if asked:
        raise NotImplementedError(f"freeio_exchange: {', '.join(asked)}: use MaxText's exchange.")
