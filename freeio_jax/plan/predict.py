"""How long an operation would take: the floor, and what the kernels of today add to it.

Between hosts no kernel exists yet. There the prediction is of a design: the network works at the
same time as NVLink and memory, and costs two more trips of a flag.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from freeio_jax import _native
from freeio_jax.plan.rates import Rates
from freeio_jax.plan.routing import Pod
from freeio_jax.plan.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Large:
    """What a kernel of large calls adds, as two H200s show it.

    Attributes:
      fixed: seconds that do not grow with the tokens.
      memory: share of a device copy's rate that its loads and stores reach.
      pushes: whether it stores over NVLink; else it loads.
    """

    fixed: float
    memory: float
    pushes: bool


#: Fitted to T=1024 to 8192 with rows of 14336 bytes on two GPUs (notebook 2026-11_figures).
#: Kernels that store more than they load are further from a copy's rate.
LARGE = {
    "dispatch": Large(9e-6, 0.84, False),
    "combine": Large(21e-6, 0.95, True),
    "combine_transpose": Large(14e-6, 0.85, False),
    "dispatch_along": Large(8e-6, 0.86, False),
}
#: Share of NVLink's rate that they all reach.
LINK = 0.945


@dataclasses.dataclass(frozen=True)
class Small:
    """What a kernel of small calls adds, as two and four H200s show it.

    Attributes:
      fixed: seconds of a call with one peer.
      each: seconds for each further peer. (Seen from two GPUs to four; beyond that it is a guess.)
      exposed: share of memory's time that is not hidden behind the link's.
    """

    fixed: float
    each: float
    exposed: float


SMALL = {"dispatch": Small(8.2e-6, 0.2e-6, 0.0), "combine": Small(6.1e-6, 0.2e-6, 0.3)}
#: In lines, each 15 accesses of 16 bytes bring one with their flag.
LINES = 16 / 15


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one operation, in seconds, on the rank that takes longest.

    Attributes:
      floor: the bytes over the rates, and two trips of a flag.
      limit: what decides the floor: "NVLink", "network", "memory".
      seconds: the predicted time.
      small: whether the rows are sent in lines.
    """

    floor: float
    limit: str
    seconds: float
    small: bool


def predict(op: str, moved: Traffic, rates: Rates, pod: Pod, row_bytes: int) -> Prediction:
    """The times of ``op``, one of :data:`freeio_jax.plan.traffic.OPERATIONS`."""
    large = LARGE[op]
    best = max(rates.push.value, rates.pull.value)
    network = moved.network / rates.network.value
    times = {
        "NVLink": moved.link / best,
        "network": network,
        "memory": moved.memory / rates.memory.value,
    }
    limit = max(times, key=lambda name: times[name].max())
    crosses = bool(moved.network.any())
    trips = 2 * (rates.network_trip.value if crosses else rates.trip.value)
    trips *= pod.num_ranks > 1
    floor = max(float(time.max()) for time in times.values()) + trips
    memory = times["memory"] / large.memory
    is_small = op in SMALL and _native.cuda_sizes.is_small_call(
        pod.num_ranks, pod.num_tokens, pod.top_k, row_bytes
    )
    if is_small:
        small = SMALL[op]
        link = LINES * moved.link / rates.push.value + small.exposed * times["memory"]
        fixed = small.fixed + small.each * max(0, pod.num_ranks - 2)
    else:
        link = moved.link / (LINK * (rates.push if large.pushes else rates.pull).value)
        fixed = large.fixed
    seconds = float(np.maximum.reduce([link, memory, network]).max()) + fixed
    if crosses:
        seconds += 2 * rates.network_trip.value
    return Prediction(floor, limit, seconds, is_small)
