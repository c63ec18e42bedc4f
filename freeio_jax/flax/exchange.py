"""How a layer calls its exchanges: beside compute, or each to its end where it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from freeio_jax import collective
from freeio_jax.flax import weights_gradient
from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.experts import Experts
from freeio_jax.overlap import pending


class Complete:
    """What a start returns that has run the exchange to its end."""

    def __init__(self, result: Any):
        self._result = result

    def done(self) -> Any:
        return self._result


class Synchronous:
    """Exchanges of ``api`` that run to their end where they begin.

    Args:
      api: what has the functions ``dispatch`` and ``combine``.
    """

    def __init__(self, api: Any):
        self.api = api

    def first_dispatch(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        """A dispatch with nothing to run beside it: (what :meth:`multiply` takes, handle)."""
        return self.arrived(self.api.dispatch(*args, **options))

    def dispatch_start(self, *args: Any, **options: Any) -> Any:
        return Complete(self.api.dispatch(*args, **options))

    def combine_start(self, *args: Any) -> Any:
        return Complete(self.api.combine(*args))

    def last_combine(self, *args: Any) -> jax.Array:
        """A combine with nothing to run beside it."""
        return self.api.combine(*args)

    @staticmethod
    def arrived(out: Any) -> tuple[Any, Any]:
        """(what :meth:`multiply` takes, handle) of what a dispatch has returned."""
        return (out.tokens, out.group_sizes), out.handle

    def multiply(
        self, pendings: list[Any], experts: Experts, parameters: dict[str, jax.Array], arrived: Any
    ) -> jax.Array:
        """The experts' rows ``[capacity, H]``, computed while ``pendings`` are under way."""
        return self.between(pendings, experts, parameters, *arrived)

    def between(self, pendings: list[Any], fn: Callable, *args: Any) -> Any:
        """``fn(*args)``, computed while ``pendings`` are under way."""
        return fn(*args)


class Started(Synchronous):
    """Exchanges of ``api`` that run beside compute.

    Args:
      api: what has ``dispatch_start`` and ``combine_start``, too. They return
        :class:`freeio_jax.Pending`.
    """

    def dispatch_start(self, *args, **options):
        return self.api.dispatch_start(*args, **options)

    def combine_start(self, *args):
        return self.api.combine_start(*args)

    def between(self, pendings, fn, *args):
        return pending.between(pendings, fn, *args)[0] if pendings else fn(*args)


class _Package:
    """This package's exchanges."""

    dispatch, combine = staticmethod(collective.dispatch), staticmethod(collective.combine)
    dispatch_start = staticmethod(pending.dispatch_start)
    combine_start = staticmethod(pending.combine_start)


class OfThisPackage(Started):
    """This package's exchanges, that of the weights' gradients among what runs beside compute."""

    def __init__(self):
        super().__init__(_Package)

    def first_dispatch(self, *args, **options):
        return weights_gradient.dispatch(*args, **options)

    def multiply(self, pendings, experts, parameters, arrived):
        if not isinstance(arrived, weights_gradient.Arrived):
            return super().multiply(pendings, experts, parameters, arrived)

        def multiply(arrived):
            # The weights do not pass through ``between``: the exchange of the tokens' gradient
            # hides their gradients, and the pendings need not wait for these.
            return weights_gradient.multiply(experts, parameters, arrived)

        return self.between(pendings, multiply, arrived)


def exchange_of(config: MoEConfig) -> Synchronous:
    """The exchange of a layer."""
    api = config.exchange
    if not config.overlap:
        return Synchronous(collective if api is None else api)
    if api is None:
        return OfThisPackage()
    starts = hasattr(api, "dispatch_start") and hasattr(api, "combine_start")
    return Started(api) if starts else Synchronous(api)
