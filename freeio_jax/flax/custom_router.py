"""CustomRouter: a router of the user's own, with parameters of its own."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from freeio_jax.flax.router import Choice, Routing, check_top_k, routing_of


class CustomRouter(abc.ABC):
    """A router of the user's own: which experts each token takes, and with which weights.

    A subclass must be hashable and compare by value, because a layer's settings are known at trace
    time: a frozen dataclass is. Pass an object of it as ``router=``. A parameter ``name`` of the
    router is the layer's ``router_name``. All of them are float32.

    The layer reports ``load`` and drops as with :class:`Router`. ``load_balance_loss`` and
    ``z_loss`` are zero where the router returns no shares or no logits.

    Attributes:
      load_balance_coef: factor of the load-balance loss in the auxiliary loss.
      z_loss_coef: factor of the z-loss in the auxiliary loss.
      bias_update_rate: as in :class:`Router`. If it is not None, the router gets the bias as
        ``parameters["bias"]``, float32 ``[E]``, and the layer moves it after each training step.
      weights_on: ``"output"`` or ``"input"``, as in :class:`Router`.
      needs_key: whether the router gets a PRNG key in training, of the random stream ``jitter``.

    >>> import dataclasses, jax, jax.numpy as jnp
    >>> from freeio_jax.flax import CustomRouter
    >>> from freeio_jax.flax.linen import MoE
    >>> @dataclasses.dataclass(frozen=True)
    ... class Normalized(CustomRouter):
    ...     def parameters(self, width, num_experts):
    ...         return {"scale": (width,), "kernel": (width, num_experts)}
    ...
    ...     def initializer(self, name):
    ...         return jax.nn.initializers.ones if name == "scale" else None
    ...
    ...     def __call__(self, parameters, x, top_k, key=None):
    ...         x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    ...         scores = jax.nn.softmax(x * parameters["scale"] @ parameters["kernel"])
    ...         weights, ids = jax.lax.top_k(scores, top_k)
    ...         return ids, weights
    >>> layer = MoE(num_experts=4, top_k=2, expert_width=16, router=Normalized())
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 8)))
    >>> variables["params"]["router_scale"].value.tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    load_balance_coef = 0.0
    z_loss_coef = 0.0
    bias_update_rate = None
    weights_on = "output"
    needs_key = False

    @abc.abstractmethod
    def parameters(self, width: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter, by name.

        Args:
          width: features of the router's input: H, or the layer's ``router_width``.
          num_experts: experts to choose from, zero experts among them.
        """

    @abc.abstractmethod
    def __call__(
        self,
        parameters: dict[str, jax.Array],
        x: Any,
        top_k: int,
        key: jax.Array | None = None,
    ) -> Choice | tuple[jax.Array, jax.Array]:
        """Chooses the experts of one shard's tokens.

        Args:
          parameters: by name.
          x: float32 ``[T, H]``, or the layer's ``router_input``: each array of it with T instead of
            the dimensions that the tokens had. Its floating arrays are float32. Masked tokens are
            zero.
          top_k: K.
          key: PRNG key of this shard, in training and if ``needs_key``; else None.

        Returns:
          ``ids, weights``: int ``[T, K]``, distinct within a token (-1: no expert), and floating
          ``[T, K]``. Or a :class:`Choice` of these with what the losses need.
        """

    def initializer(self, name: str) -> Callable[..., jax.Array] | None:
        """How a parameter starts: ``initializer(key, shape, dtype)``.

        None, the default: a matrix by the layer's ``kernel_init``, a vector as zeros.
        """
        return None

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises ValueError where the settings do not fit together, with the fix."""
        if self.weights_on not in ("output", "input"):
            raise ValueError(
                f"router: weights_on must be 'output' or 'input', got {self.weights_on!r}."
            )
        check_top_k(top_k, num_experts)


def route_by(
    router: CustomRouter,
    parameters: dict[str, jax.Array],
    x: Any,
    *,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    token_mask: jax.Array | None = None,
    token_axes: tuple[str, ...] = (),
    key: jax.Array | None = None,
) -> Routing:
    """As :func:`freeio_jax.flax.router.route`, by a router of the user's own.

    Raises:
      ValueError, TypeError: what the router returned is not what the layer needs, with the fix.
    """

    def prepared(a):
        if jnp.issubdtype(a.dtype, jnp.floating):
            a = a.astype(jnp.float32)
        if token_mask is None:
            return a
        mask = token_mask.reshape(-1, *(1,) * (a.ndim - 1))
        return jnp.where(mask, a, jnp.zeros((), a.dtype))

    result = router(parameters, jax.tree.map(prepared, x), top_k, key)
    if not isinstance(result, tuple) or not 2 <= len(result) <= 4:
        raise TypeError(
            f"MoE: router={router!r} returned {result!r}. Return ids and weights, or a "
            "freeio_jax.flax.router.Choice."
        )
    choice = Choice(*result)
    _check_array(router, "ids", choice.topk_idx, (num_tokens, top_k), jnp.integer)
    _check_array(router, "weights", choice.topk_weights, (num_tokens, top_k), jnp.floating)
    for name, coefficient in (
        ("shares", router.load_balance_coef),
        ("logits", router.z_loss_coef),
    ):
        value = getattr(choice, name)
        if value is not None:
            _check_array(router, name, value, (num_tokens, num_experts), jnp.floating)
        elif coefficient:
            loss = "load_balance" if name == "shares" else "z_loss"
            raise ValueError(
                f"MoE: router={router!r} has {loss}_coef={coefficient}, but returns no {name}, of "
                f"which this loss is made. Return a Choice with {name}, or set the factor to 0.0."
            )
    choice = Choice(
        choice.topk_idx.astype(jnp.int32),
        *(None if a is None else a.astype(jnp.float32) for a in choice[1:]),
    )
    return routing_of(choice, num_experts, token_mask, token_axes)


def _check_array(router, name, array, shape, kind):
    if array.shape == shape and jnp.issubdtype(array.dtype, kind):
        return
    wrong = ValueError if array.shape != shape else TypeError
    raise wrong(
        f"MoE: router={router!r} returned {name} {array.dtype}{list(array.shape)}, but they must "
        f"be {kind.__name__}{list(shape)}: one row for each of this rank's tokens."
    )
