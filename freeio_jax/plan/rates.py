"""What GPUs and networks move at best, each figure with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from freeio_jax.bench.floor import Limits


@dataclasses.dataclass(frozen=True)
class Rate:
    """One figure.

    Attributes:
      value: bytes per second, or seconds.
      source: who measured it, or how it was guessed.
    """

    value: float
    source: str


@dataclasses.dataclass(frozen=True)
class Rates:
    """All figures of one kind of machine.

    Attributes:
      push: bytes per second that a GPU stores to its peers over NVLink, all GPUs at once.
      pull: bytes per second that it loads from them.
      memory: bytes per second, read and written together.
      network: bytes per second of a GPU's network card, in each direction.
      trip: seconds of a flag's way over NVLink.
      network_trip: seconds of a flag's way over the network.
    """

    push: Rate
    pull: Rate
    memory: Rate
    network: Rate
    trip: Rate
    network_trip: Rate

    def __str__(self) -> str:
        figures = {
            "NVLink, stores": f"{self.push.value / 1e9:.0f} GB/s ({self.push.source})",
            "NVLink, loads": f"{self.pull.value / 1e9:.0f} GB/s ({self.pull.source})",
            "memory": f"{self.memory.value / 1e9:.0f} GB/s ({self.memory.source})",
            "network": f"{self.network.value / 1e9:.0f} GB/s ({self.network.source})",
            "flag over NVLink": f"{self.trip.value * 1e6:.2f} us ({self.trip.source})",
            "flag over the network": (
                f"{self.network_trip.value * 1e6:.1f} us ({self.network_trip.source})"
            ),
        }
        return "\n".join(f"{name + ':':24}{figure}" for name, figure in figures.items())


_NOTEBOOK = "measured, notebook 2026-11_figures"
_NETWORK = {
    "network": Rate(
        45e9,
        "a 400 Gb/s card: half of the 90 GB/s that DeepEP's README states for EP 8 x 2, because "
        "half of those bytes stay on the host",
    ),
    "network_trip": Rate(5e-6, "assumed"),
}
_H200 = {
    "memory": Rate(4220e9, _NOTEBOOK),
    "trip": Rate(1.24e-6, _NOTEBOOK),
    **_NETWORK,
}
_SCALED = "not measured: H200's times the data sheets' ratio"


def known(gpu: str, num_gpus: int) -> Rates:
    """The figures of ``"h200"`` or ``"gb200"``, in an NVLink domain of that many GPUs."""
    if num_gpus <= 2:
        # The only peer gets all stores, and each way is free for them.
        h200 = Rates(push=Rate(365e9, _NOTEBOOK), pull=Rate(336e9, _NOTEBOOK), **_H200)
    else:
        of_four = Rate(336e9, f"{_NOTEBOOK}, four GPUs")
        h200 = Rates(push=of_four, pull=of_four, **_H200)
    if gpu == "h200":
        return h200
    # NVLink 5 has 1800 GB/s where NVLink 4 has 900, HBM3e 8.0 TB/s where H200 has 4.8.
    return dataclasses.replace(
        h200,
        push=Rate(2 * h200.push.value, _SCALED),
        pull=Rate(2 * h200.pull.value, _SCALED),
        memory=Rate(8 / 4.8 * h200.memory.value, _SCALED),
    )


GPUS = ("h200", "gb200")


def measured(devices: Sequence[jax.Device], rest: Rates) -> Rates:
    """NVLink and memory as these GPUs are; the network as in ``rest``.

    Raises:
      ValueError: the devices are no GPUs, or fewer than two.
    """
    if devices[0].platform != "gpu" or len(devices) < 2:
        raise ValueError(
            f"--measure takes the rates of two or more GPUs of this machine, and JAX has "
            f"{len(devices)} x {devices[0].device_kind}. The memory of a CPU says nothing of a "
            "GPU's. Leave --measure out, and choose --gpu or give --link, --memory and --network."
        )
    limits = Limits.measure(devices)
    source = f"measured now on {len(devices)} x {devices[0].device_kind}"
    return dataclasses.replace(
        rest,
        push=Rate(limits.link, source),
        pull=Rate(limits.link, source),
        memory=Rate(limits.memory, source),
        trip=Rate(limits.trip, source),
    )
