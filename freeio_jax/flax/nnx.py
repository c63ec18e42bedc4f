"""The MoE layer for ``flax.nnx``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.custom_router import CustomRouter
from freeio_jax.flax.experts import DEFAULT_EXPERTS, Experts
from freeio_jax.flax.mesh import check_divides, num_token_shards
from freeio_jax.flax.moe import moe
from freeio_jax.flax.parameters import initializer
from freeio_jax.flax.report import Report
from freeio_jax.flax.router import DEFAULT_ROUTER, Router, update_bias

_KERNEL_INIT = nnx.initializers.lecun_normal()


class ReportVariable(nnx.Intermediate):
    """What a layer reports of its calls. Before the first call it is zero.

    ``nnx.eval_shape`` leaves shapes in a model's Variables. Weights of a checkpoint replace those
    of the parameters, but none has the reports. So a shape in a report counts as zeros.
    """

    __slots__ = ()

    def _fill(self):
        value = self._raw_value
        if isinstance(value, jax.ShapeDtypeStruct):
            with jax.ensure_compile_time_eval():
                zeros = jnp.zeros(value.shape, value.dtype)
            object.__setattr__(self, "_raw_value", zeros)  # allowed where Variables must not change

    def get_value(self, **options):
        self._fill()
        return super().get_value(**options)

    def get_raw_value(self):
        self._fill()
        return super().get_raw_value()

    def set_value(self, value, **options):
        self._fill()
        super().set_value(value, **options)


class AuxLoss(ReportVariable):
    """A layer's auxiliary loss, with its coefficients: add all of a model's to the training loss.

    ``sum(jax.tree.leaves(nnx.state(model, AuxLoss)))``

    It is the sum over the layer's calls since it was last read. So a layer that is called twice in
    a step reports both losses. Passing the model to a transformation (``nnx.jit``, ``nnx.grad``,
    ``nnx.remat``, ``nnx.scan``) also reads it, and a new sum begins inside. So if two calls of a
    layer are each in an ``nnx.remat`` of their own, or in steps of an ``nnx.scan`` that does not
    stack the losses, only the loss of the last call stays. Return the loss of each call there, and
    add them up:

    ``nnx.remat(lambda layer, x: (layer(x), layer.aux_loss[...]))``
    """

    # The value that the last call wrote; None when it has been read.
    __slots__ = ("_unread",)

    def get_value(self, **options):
        object.__setattr__(self, "_unread", None)  # allowed also where Variables must not change
        return super().get_value(**options)

    def get_raw_value(self):
        object.__setattr__(self, "_unread", None)
        return super().get_raw_value()

    def add(self, loss: jax.Array) -> None:
        """Adds the loss of one call."""
        # A value that something else has put there is not of this step.
        unread = getattr(self, "_unread", None)
        self[...] = loss if unread is None or unread is not self._raw_value else unread + loss
        self._unread = self._raw_value


class ExpertLoad(ReportVariable):
    """int32 ``[E]``: assignments to each expert in the last call, before any drop.

    With Z zero experts it is ``[E + Z]``, these last.
    """


class Dropped(ReportVariable):
    """int32: assignments of the last call that did not fit in the capacity."""


class ExpertDrops(ReportVariable):
    """int32 ``[E]``: the dropped assignments of the last call, by expert."""


class SourceDrops(ReportVariable):
    """int32 ``[S]``: the dropped assignments of the last call, by the rank whose tokens they are.

    S ranks hold tokens. It is the S of the mesh of the last call; before, that of the mesh under
    which the layer was made.
    """


class RouterBias(nnx.Variable):
    """float32 ``[E]``: the bias of loss-free balancing; state like a running mean, no parameter."""


_REPORTS = {
    "load": ExpertLoad,
    "dropped": Dropped,
    "expert_drops": ExpertDrops,
    "source_drops": SourceDrops,
    "load_balance_loss": ReportVariable,
    "z_loss": ReportVariable,
    "aux_loss": AuxLoss,
}


class MoE(nnx.Module):
    """A Mixture-of-Experts layer whose experts are spread over a mesh axis.

    ``layer(x, deterministic=None, token_mask=None, router_input=None)`` takes ``[..., H]``, under
    ``nnx.jit`` with a mesh a global array, and returns ``[..., H]``. ``deterministic=True``
    (``layer.eval()``) is for evaluation: there is no jitter, and neither the router's bias nor a
    report is written. So ``jax.jit`` and other transformations of JAX may close over the layer.
    ``token_mask``, bool of ``x.shape[:-1]``, is false for padding. Such tokens may be NaN. They are
    routed nowhere, take no room, are not counted, and have no part in the losses. Their output is
    zero, also that of the shared expert. ``router_input`` is what the router sees instead of x:
    ``[..., W]``, or for a custom router any pytree of arrays that begin as x does.

    It reports what all devices did together, in Variables: ``aux_loss`` (:class:`AuxLoss`, which
    adds up the calls), and of the last call ``load`` (:class:`ExpertLoad`), ``dropped``
    (:class:`Dropped`), ``expert_drops`` and ``source_drops`` (:class:`ExpertDrops`,
    :class:`SourceDrops`), ``load_balance_loss`` and ``z_loss`` (:class:`ReportVariable`, without
    coefficients). All of them are of type ``nnx.Intermediate``; leave that type out of checkpoints.
    ``nnx.pop`` may remove them. The next call that is not deterministic creates them again. After
    ``nnx.eval_shape`` the layer needs its parameters, and the router's bias if it has one; its
    reports are zero.

    Parameters (``nnx.Param``): ``router`` ``[H, E]`` (float32), ``gate_up`` ``[E, H, 2*F]``,
    ``down`` ``[E, F, H]``, ``shared_gate_up`` ``[H, 2*S]``, ``shared_down`` ``[S, H]``. Instead of
    ``gate_up`` and ``down`` other ``experts`` have other names. Where the settings ask for them
    there are ``router_bias`` ``[E]`` (float32) and ``shared_expert_gate`` ``[H, 1]``. The experts'
    parameters carry ``out_sharding=(axis_name, None, ...)``. ``bias`` (:class:`RouterBias`) where
    ``router.bias_update_rate`` is set: updated by each call that is not deterministic. With a rate
    of 0.0 it is never updated.

    Args:
      width: H, features of a token.
      num_experts: E; a multiple of the expert axis's size, or see ``pad_experts_to``.
      top_k: K, experts of one token.
      expert_width: F, hidden width of one expert.
      router: how tokens choose their experts.
      capacity_factor: room of a rank as a multiple of its even share (MaxText's
        ``ragged_buffer_factor``, not its ``capacity_factor``, which is for one expert and
        sequence); None: nothing is dropped.
      alignment: the rows of each expert are padded to a multiple of it.
      shared_expert_width: S, hidden width of an expert that sees every token; None for none.
      axis_name: mesh axis, or axes, over which the experts are spread.
      token_axes: mesh axes over which the tokens are sharded; None: the expert axes alone.
      mesh: None: the current mesh (``jax.set_mesh``), or one device where there is none.
      dtype: of the experts' computation; None: the common dtype of input and parameters.
      exchange: what has the functions ``dispatch`` and ``combine``, ``freeio_jax.reference`` say;
        None: ``freeio_jax`` itself.
      param_dtype: of the experts' parameters.
      kernel_init: initializer of each matrix, applied to each expert on its own.
      experts: what the experts compute, as ``freeio_jax.flax.experts.SwiGLU()``.
      shared_expert_gate: whether the shared expert's output is multiplied with
        ``sigmoid(x @ shared_expert_gate)`` (Qwen2-MoE).
      num_zero_experts: Z, experts that return their input (LongCat-Flash): ids ``E`` to
        ``E + Z - 1``.
      pad_experts_to: P, first dimension of the experts' parameters, where the ranks do not divide
        E: 64, say, for 60 experts on 8 ranks. No token reaches the experts from E on.
      router_width: W, features of ``router_input``; None: H.
      drops: ``"evenly"``: each expert and source rank loses the same share, for a small all-gather
        and a sort (``freeio_jax.flax.drops``); or ``"last"`` in packed order, for nothing.
      fsdp_axes: mesh axes, of ``token_axes`` but not the expert axes, over which the experts'
        matrices are sharded as well, to be gathered where they are used.
      model_axes: mesh axes without tokens over which the experts' hidden width is split; with
        ``experts=SwiGLU(separate=True)``, say.
      overlap: whether the shared expert runs beside the combine, and in the backward pass the
        experts' weights' gradients beside the exchange that brings the tokens' gradient back
        (``docs/overlap.md``). :class:`~freeio_jax.flax.MoEConfig` says more.
      num_chunks: n, the number of chunks that the tokens of a rank are cut into. While the experts
        multiply one chunk, the next is dispatched, and the one before is combined. The room of
        ``capacity_factor`` is that of each chunk.
      expert_capacity: rows of one expert for one sequence, the L tokens of ``x[..., L, H]``. Those
        of later tokens are dropped. None: no such bound. (Switch Transformers, MaxText's
        ``capacity_factor``.) Whole sequences are padded then, so B should be a multiple of the
        ranks that hold tokens.
      deterministic: the default of the calls; ``train()`` and ``eval()`` set it.
      rngs: streams ``params``, and ``jitter`` for ``router.jitter``.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from freeio_jax.flax.nnx import MoE
    >>> layer = MoE(8, num_experts=4, top_k=2, expert_width=16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 3, 8))).shape, int(layer.load[...].sum())
    ((2, 3, 8), 12)
    """

    def __init__(
        self,
        width: int,
        *,
        num_experts: int,
        top_k: int,
        expert_width: int,
        router: Router | CustomRouter = DEFAULT_ROUTER,
        capacity_factor: float | None = None,
        alignment: int = 1,
        shared_expert_width: int | None = None,
        axis_name: str | tuple[str, ...] = "expert",
        token_axes: tuple[str, ...] | None = None,
        mesh: Any = None,
        dtype: Any = None,
        exchange: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., jax.Array] = _KERNEL_INIT,
        experts: Experts = DEFAULT_EXPERTS,
        shared_expert_gate: bool = False,
        num_zero_experts: int = 0,
        pad_experts_to: int | None = None,
        router_width: int | None = None,
        drops: str = "evenly",
        fsdp_axes: tuple[str, ...] = (),
        model_axes: tuple[str, ...] = (),
        overlap: bool = False,
        num_chunks: int = 1,
        expert_capacity: int | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        self.config = MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            expert_width=expert_width,
            router=router,
            capacity_factor=capacity_factor,
            alignment=alignment,
            shared_expert_width=shared_expert_width,
            axis_name=axis_name,
            token_axes=token_axes,
            dtype=dtype,
            exchange=exchange,
            experts=experts,
            shared_expert_gate=shared_expert_gate,
            num_zero_experts=num_zero_experts,
            pad_experts_to=pad_experts_to,
            router_width=router_width,
            drops=drops,
            fsdp_axes=fsdp_axes,
            model_axes=model_axes,
            overlap=overlap,
            num_chunks=num_chunks,
            expert_capacity=expert_capacity,
        )
        self.width = width
        self.mesh = mesh
        self.deterministic = deterministic
        if router.bias_update_rate is not None:
            self.bias = RouterBias(jnp.zeros(self.config.num_choices, jnp.float32))
        self.rngs = nnx.data(None)
        num_sources = num_token_shards(self.config, mesh)
        self._write(Report.zeros(num_experts, num_sources, num_zero_experts))
        check_divides(self.config, mesh, width)
        # Flax shards a Variable when it is created, and raises an error where there is no mesh.
        current = jax.sharding.get_abstract_mesh()
        meshless = mesh is None and (current.empty or current.manual_axes)
        placement = {"eager_sharding": False} if meshless else {"mesh": mesh}
        of_router = self.config.router_parameters(width)
        for name, (shape, names) in self.config.parameters(width).items():
            if hasattr(self, name):
                raise ValueError(
                    f"MoE: experts={experts!r} have a parameter {name!r}, but the layer has an "
                    "attribute of this name: rename it."
                )
            dtype = jnp.float32 if name in of_router else param_dtype
            init = initializer(self.config, width, name, kernel_init)
            value = init(rngs.params(), shape, dtype)
            setattr(self, name, nnx.Param(value, out_sharding=names, **placement))
        if router.needs_key:  # after the parameters: the streams may be one
            self.rngs = rngs["jitter"].fork()

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        layer: int | str | None = None,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> MoE:
        """The layer that computes what the MoE block of a Hugging Face model computes.

        Its losses and jitter are off. ``freeio_jax.hf.load_moe`` loads its weights.

        Args:
          config: the contents of config.json.
          layer: the number of the decoder layer, needed where layers differ.
          rngs: as of the layer.
          options: more arguments of the layer, or others than the model's.

        Raises:
          ValueError: the family is not known, or the layer cannot express it; the message says what
            of it.

        >>> from flax import nnx
        >>> from freeio_jax.flax.nnx import MoE
        >>> config = {"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 16}
        >>> layer = nnx.eval_shape(lambda: MoE.from_hf(config, rngs=nnx.Rngs(0)))
        >>> layer.gate_up.shape
        (8, 8, 32)
        """
        # Not at the top: the table of families is made of this package's experts and routers.
        from freeio_jax.hf.options import moe_options

        return cls(**moe_options(config, layer) | options, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        deterministic: bool | None = None,
        token_mask: jax.Array | None = None,
        router_input: Any = None,
    ) -> jax.Array:
        router = self.config.router
        training = not (self.deterministic if deterministic is None else deterministic)
        bias = getattr(self, "bias", None)
        y, report = moe(
            self._parameters(x.shape[-1]),
            x,
            self.config,
            router_input=router_input,
            bias=None if bias is None else bias[...],
            token_mask=token_mask,
            mesh=self.mesh,
            jitter_key=self.rngs() if training and router.needs_key else None,
        )
        if training and router.bias_update_rate:
            self.bias[...] = update_bias(bias[...], report.load, router.bias_update_rate)
        if training:
            self._write(report)
        return y

    def _parameters(self, width):
        """The arrays of the layer's parameters by name, also of those that it has no use for.

        ``nnx.update`` may have put them there: as a Param, or as an array if it was given arrays.
        ``moe`` says that they have no use. A subclass may have parameters for a use of its own.
        """
        needed = self.config.parameters(width)
        others = (nnx.Param, jax.Array, np.ndarray) if type(self) is MoE else ()
        return {
            name: value[...]
            for name, value in sorted(vars(self).items())
            if (name in needed and isinstance(value, nnx.Variable))
            or (name != "bias" and isinstance(value, others))
        }

    def _write(self, report):
        for name, kind in _REPORTS.items():
            value = getattr(report, name)
            if not hasattr(self, name):  # nnx.pop has removed it
                setattr(self, name, kind(jnp.zeros_like(value)))
            variable = getattr(self, name)
            if kind is AuxLoss:
                variable.add(value)
            elif variable.shape != value.shape:  # source_drops of another mesh
                variable.set_value(value)
            else:
                variable[...] = value
