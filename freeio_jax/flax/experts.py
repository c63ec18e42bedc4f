"""What the experts compute: SwiGLU, a GLU, an MLP without a gate, or a class of the user's."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.grouped_matmul import grouped_matmul


class Experts(abc.ABC):
    """What the experts compute, and the shapes of their parameters.

    A subclass must be hashable and compare by value, because a layer's settings are known at trace
    time: a frozen dataclass is. Its parameters start as the layer's ``kernel_init`` draws them, for
    each expert on its own; vectors (biases) start as zeros. The layer keeps some names for itself,
    and says so.

    >>> import dataclasses, jax, jax.numpy as jnp
    >>> from freeio_jax.flax.experts import Experts
    >>> from freeio_jax.flax.linen import MoE
    >>> from freeio_jax.grouped_matmul import grouped_matmul
    >>> @dataclasses.dataclass(frozen=True)
    ... class Linear(Experts):
    ...     def parameters(self, width, expert_width):
    ...         return {"kernel": (width, width)}
    ...
    ...     def __call__(self, parameters, rows, group_sizes):
    ...         return grouped_matmul(rows, parameters["kernel"], group_sizes)
    >>> layer = MoE(num_experts=4, top_k=2, expert_width=16, experts=Linear())
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 8)))
    >>> variables["params"]["kernel"].value.shape
    (4, 8, 8)
    """

    @abc.abstractmethod
    def parameters(self, width: int, expert_width: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one expert, by name.

        Args:
          width: H, features of a token.
          expert_width: F, hidden width of the expert.
        """

    @abc.abstractmethod
    def __call__(
        self, parameters: dict[str, jax.Array], rows: jax.Array, group_sizes: jax.Array
    ) -> jax.Array:
        """Evaluates each group of rows with its own expert.

        Args:
          parameters: by name, with a first dimension ``[G]`` for the experts.
          rows: ``[M, H]``, packed expert-major, as ``dispatch`` returns them. Rows past
            ``sum(group_sizes)`` may hold anything.
          group_sizes: int32 ``[G]``.

        Returns:
          ``[M, H]``. Rows past ``sum(group_sizes)`` are not looked at.
        """

    def shared(self, parameters: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """Evaluates the shared expert, which sees every token.

        Args:
          parameters: by name, of one expert.
          x: ``[T, H]``.

        Returns:
          ``[T, H]``.
        """
        one_group = {name: a[None] for name, a in parameters.items()}
        return self(one_group, x, jnp.full(1, x.shape[0], jnp.int32))


class _TwoProducts(Experts):
    """``hidden(x @ first) @ down``, each product with a bias if ``biases`` is true."""

    biases: bool
    #: Name of the first matrix, and how many columns it has for each hidden feature.
    first: ClassVar[str]
    columns: ClassVar[int]

    @abc.abstractmethod
    def hidden(self, product: jax.Array) -> jax.Array:
        """``[..., F]`` from ``[..., columns * F]``, the first product."""

    def parameters(self, width: int, expert_width: int) -> dict[str, tuple[int, ...]]:
        shapes = {self.first: (width, self.columns * expert_width), "down": (expert_width, width)}
        return _with_biases(shapes) if self.biases else shapes

    def __call__(
        self, parameters: dict[str, jax.Array], rows: jax.Array, group_sizes: jax.Array
    ) -> jax.Array:
        apply = _grouped(parameters, group_sizes)
        return apply("down", self.hidden(apply(self.first, rows)))

    def shared(self, parameters: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        apply = _dense(parameters)
        return apply("down", self.hidden(apply(self.first, x)))


@dataclasses.dataclass(frozen=True)
class SwiGLU(_TwoProducts):
    """``(silu(x @ gate) * (x @ up)) @ down`` (arXiv:2002.05202).

    With ``g = x @ gate`` and ``u = x @ up``, gpt-oss computes ``(g * sigmoid(alpha * g) * (u + 1))
    @ down``, where g is at most ``limit`` and u is between ``-limit`` and ``limit``:
    ``SwiGLU(limit=7.0, alpha=1.702, biases=True, interleaved=True)``, as ``GptOssExperts`` of
    transformers. A limit without alpha is DeepSeek-V4's.

    Parameters of an expert: ``gate_up`` ``[H, 2*F]`` and ``down`` ``[F, H]``; with biases
    ``gate_up_bias`` ``[2*F]`` and ``down_bias`` ``[H]``.

    Attributes:
      limit: the largest g, and the largest size of u; None: no limit.
      alpha: None: ``silu(g) * u``. Else ``g * sigmoid(alpha * g) * (u + 1)``.
      biases: whether both products have a bias.
      interleaved: whether the columns of ``gate_up`` are g0, u0, g1, u1, ... (gpt-oss). False: all
        of g, then all of u.

    >>> import jax.numpy as jnp
    >>> from freeio_jax.flax.experts import SwiGLU
    >>> parameters = {"gate_up": jnp.array([[[1.0, 1.0]]]), "down": jnp.array([[[1.0]]])}
    >>> rows = jnp.array([[9.0]])
    >>> f"{SwiGLU(limit=2.0, alpha=1.0)(parameters, rows, jnp.array([1])).item():.4f}"
    '5.2848'
    """

    first = "gate_up"
    columns = 2

    limit: float | None = None
    alpha: float | None = None
    biases: bool = False
    interleaved: bool = False

    def __post_init__(self):
        if self.limit is not None and self.limit <= 0:
            raise ValueError(
                f"SwiGLU: limit must be positive, got {self.limit}. Use None for no limit."
            )

    def hidden(self, product: jax.Array) -> jax.Array:
        if self.interleaved:
            gate, up = product[..., 0::2], product[..., 1::2]
        else:
            gate, up = jnp.split(product, 2, axis=-1)
        if self.limit is not None:
            gate, up = jnp.clip(gate, max=self.limit), jnp.clip(up, -self.limit, self.limit)
        if self.alpha is None:
            return jax.nn.silu(gate) * up
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


#: SwiGLU without limits or biases.
DEFAULT_EXPERTS = SwiGLU()


@dataclasses.dataclass(frozen=True)
class GLU(_TwoProducts):
    """``(activation(x @ gate) * (x @ up)) @ down`` (arXiv:2002.05202); :class:`SwiGLU` with SiLU.

    ``GLU()`` is GeGLU by the approximation of tanh (Gemma-4).

    Parameters of an expert: ``gate_up`` ``[H, 2*F]``, all of the gate's columns first, and ``down``
    ``[F, H]``; with biases ``gate_up_bias`` ``[2*F]`` and ``down_bias`` ``[H]``.

    Attributes:
      activation: a function of each element, by which layers compare: define it once. JAX compiles
        anew for each new ``lambda``.
      biases: whether both products have a bias.
    """

    first = "gate_up"
    columns = 2

    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
    biases: bool = False

    def hidden(self, product: jax.Array) -> jax.Array:
        gate, up = jnp.split(product, 2, axis=-1)
        return self.activation(gate) * up


def squared_relu(x: jax.Array) -> jax.Array:
    """``max(x, 0) ** 2`` (arXiv:2109.08668), the activation of Nemotron-H."""
    return jnp.square(jax.nn.relu(x))


@dataclasses.dataclass(frozen=True)
class MLP(_TwoProducts):
    """``activation(x @ up) @ down``: experts without a gate.

    ``MLP()`` is Switch Transformer's (ReLU), ``MLP(squared_relu)`` Nemotron-H's.

    Parameters of an expert: ``up`` ``[H, F]`` and ``down`` ``[F, H]``; with biases ``up_bias``
    ``[F]`` and ``down_bias`` ``[H]``.

    Attributes:
      activation: a function of each element, by which layers compare: define it once. JAX compiles
        anew for each new ``lambda``.
      biases: whether both products have a bias.

    >>> import jax.numpy as jnp
    >>> from freeio_jax.flax.experts import MLP, squared_relu
    >>> parameters = {"up": jnp.array([[[3.0, -1.0]]]), "down": jnp.array([[[1.0], [1.0]]])}
    >>> MLP(squared_relu)(parameters, jnp.array([[1.0]]), jnp.array([1])).tolist()
    [[9.0]]
    """

    first = "up"
    columns = 1

    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    biases: bool = False

    def hidden(self, product: jax.Array) -> jax.Array:
        return self.activation(product)


def bias_of_rows(bias: jax.Array, group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """The bias of each row's expert, to add to a product of packed rows.

    Args:
      bias: ``[G, N]``.
      group_sizes: int32 ``[G]``.
      num_rows: M, at least the sum of ``group_sizes``.

    Returns:
      ``[M, N]``; rows past ``sum(group_sizes)`` are zero, and what their gradient holds has no
      effect.

    >>> import jax.numpy as jnp
    >>> from freeio_jax.flax.experts import bias_of_rows
    >>> bias_of_rows(jnp.array([[1.0], [2.0]]), jnp.array([1, 2]), 4).tolist()
    [[1.0], [2.0], [2.0], [0.0]]
    """
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    is_member = ((ends - group_sizes)[None] <= row) & (row < ends[None])
    # A product instead of a gather: its gradient is a sum in a fixed order. That of a gather would
    # be a scatter, which a GPU adds up in the order in which its threads come.
    rows = jnp.dot(is_member.astype(bias.dtype), bias, precision=lax.Precision.HIGHEST)
    return jnp.where(row < ends[-1], rows, jnp.zeros((), bias.dtype))


def _with_biases(shapes):
    return shapes | {f"{name}_bias": shape[-1:] for name, shape in shapes.items()}


def _grouped(parameters, group_sizes):
    """``apply(name, rows)``: the product with each group's matrix, and its bias if there is one."""

    def apply(name, rows):
        out = grouped_matmul(rows, parameters[name], group_sizes)
        bias = parameters.get(f"{name}_bias")
        return out if bias is None else out + bias_of_rows(bias, group_sizes, rows.shape[0])

    return apply


def _dense(parameters):
    """``apply(name, rows)``: as :func:`_grouped`, for one expert that sees all rows."""

    def apply(name, rows):
        out = jnp.dot(rows, parameters[name])
        bias = parameters.get(f"{name}_bias")
        return out if bias is None else out + bias[None]

    return apply
