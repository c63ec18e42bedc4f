"""The floor of an exchange: the bytes that must move, over what the GPUs move at best."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np

from freeio_jax import _native
from freeio_jax.bench import processes
from freeio_jax.engines import ENGINES
from freeio_jax.launch import pod

#: The exchanges that are timed, and the kernels that they are: patterns of names in a profile.
KERNELS = {
    "dispatch": "dispatch_(small|large)_kernel",
    "combine": "combine_(small|large)_kernel",
    "combine_transpose": "combine_transpose_kernel",
    "dispatch_along": "dispatch_along_kernel",
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one exchange, each moved once, on the rank that moves most.

    Attributes:
      link_bytes: over the links, out or in, whichever is more: a row for each (token, remote rank).
      loaded_bytes: from memory: rows read once, landed rows read for replication; or the same
        backwards.
      stored_bytes: to memory or to a peer's: packed rows and the zeros behind them; or sums.
      zero_bytes: of the stored ones, the zeros.
    """

    link_bytes: int
    loaded_bytes: int
    stored_bytes: int
    zero_bytes: int = 0

    @property
    def hbm_bytes(self) -> int:
        """In memory, read and written."""
        return self.loaded_bytes + self.stored_bytes


def traffic(
    topk_idx: np.ndarray,
    *,
    num_experts: int,
    capacity: int,
    row_bytes: int,
    zero_tail: bool = True,
) -> dict[str, Traffic]:
    """What each operation of :data:`KERNELS` must move for the routing ``[R, T, K]``."""
    num_ranks, num_tokens, _ = topk_idx.shape
    dest = topk_idx // (num_experts // num_ranks)
    # pairs[s, d]: tokens of rank s that have a row on rank d
    pairs = np.stack([(dest == rank).any(-1).sum(-1) for rank in range(num_ranks)], axis=-1)
    rows = np.stack([(dest == rank).sum() for rank in range(num_ranks)])
    remote = pairs * (1 - np.eye(num_ranks, dtype=int))
    out, landed = remote.sum(1), remote.sum(0)
    link = max(out.max(), landed.max())
    kept = np.minimum(rows, capacity)
    written = np.full_like(kept, capacity) if zero_tail else kept
    loaded_and_stored = {
        "dispatch": (num_tokens + landed, written),
        "combine": (kept + out, landed + num_tokens),
        # Both gradients: every row of expert_out is read, too.
        "combine_transpose": (num_tokens + landed + kept, written),
    }
    loaded_and_stored["dispatch_along"] = loaded_and_stored["dispatch"]
    moved = {}
    for op, (loaded, stored) in loaded_and_stored.items():
        busiest = int(np.argmax(loaded + stored))
        zeros = 0 if op == "combine" else (written - kept)[busiest]
        rows = link, loaded[busiest], stored[busiest], zeros
        moved[op] = Traffic(*(int(number * row_bytes) for number in rows))
    return moved


#: What one SM of an H200 stores at most, bytes per second, by any instruction.
_SM_STORES = 59e9
#: What it loads at most, by the number of SMs that load.
_SM_LOADS = {1: 149e9, 8: 137e9, 16: 123e9, 24: 108e9, 32: 98e9, 64: 63e9, 132: 31e9}


def floor_of_sms(moved: Traffic, num_sms: int, device_kind: str) -> float:
    """Seconds that so many SMs need to load and store; NaN for GPUs that were not measured."""
    if "H200" not in device_kind:
        return math.nan
    loads = np.interp(num_sms, list(_SM_LOADS), list(_SM_LOADS.values()))
    return max(
        moved.stored_bytes / (num_sms * _SM_STORES), moved.loaded_bytes / (num_sms * float(loads))
    )


#: Operations that load over the link, but for small calls: these store to their peers, as all other
#: operations do.
_PULLS = ("dispatch", "combine_transpose", "dispatch_along")


def pulls(op: str, is_small: bool) -> bool:
    """Whether a call's rows are loaded over the link; else they are stored."""
    return op in _PULLS and not is_small


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the GPUs can do at best: bytes per second, and seconds. NaN: not measured.

    Attributes:
      push: out of each GPU and into it, all to all, where stores use the link.
      pull: where loads do.
      memory: read and written, of a copy.
      write: of memory that is set, and not read.
      trip: of a flag from GPU to GPU.
    """

    push: float
    pull: float
    memory: float
    write: float
    trip: float

    @property
    def link(self) -> float:
        """The better one of push and pull."""
        return max(self.push, self.pull)

    @classmethod
    def measure(cls, devices: Sequence[jax.Device]) -> Limits:
        """On these devices, by CTAs on all SMs."""
        if devices[0].platform != "gpu":
            return cls(*5 * [math.nan])
        own = processes.local(devices)
        if len(own) == len(devices):
            # The engine lets the GPUs reach each other's memory.
            ENGINES["cuda"].start()
            return cls.of([device.local_hardware_id for device in devices])
        gpus = pod.visible_gpus()
        named = processes.share([gpus[device.local_hardware_id] for device in own])
        found = None
        if processes.is_first():
            found = _measure_elsewhere([gpu for of_process in named for gpu in of_process])
        return cls(**processes.share(found)[0])

    @classmethod
    def of(cls, ordinals: Sequence[int]) -> Limits:
        """Of GPUs of this process that can reach each other's memory."""
        size = 256 << 20
        memory = _native.cuda.memory_bandwidth(ordinals[0], 4 * size)
        write = _native.cuda.write_bandwidth(ordinals[0], 4 * size)
        if len(ordinals) == 1:
            return cls(math.inf, math.inf, memory, write, 0.0)
        best = {}
        for name in ("push", "pull"):
            rates = {
                ctas: _native.cuda.link_bandwidth(ordinals, size, ctas, name == "pull")
                for ctas in (8, 16, 32, 64, 132)
            }
            gigabytes = {ctas: round(rate / 1e9) for ctas, rate in rates.items()}
            print(f"# {name}, GB/s by CTAs: {gigabytes}", flush=True)
            best[name] = max(rates.values())
        trip = _native.cuda.flag_trip(ordinals[0], ordinals[1])
        return cls(**best, memory=memory, write=write, trip=trip)

    def floor(self, moved: Traffic, *, pulls: bool) -> float:
        """Seconds: the slower of link and memory, and a flag's trip before and after.

        Each access has the rate of its kind: ``pulls`` says that rows are loaded over the link, and
        zeros are only written.
        """
        link = moved.link_bytes / (self.pull if pulls else self.push)
        copied = moved.hbm_bytes - moved.zero_bytes
        memory = copied / self.memory + moved.zero_bytes / self.write
        return max(link, memory) + 2 * self.trip

    def __str__(self) -> str:
        return (
            f"link {self.push / 1e9:.0f} GB/s by stores, {self.pull / 1e9:.0f} by loads, memory "
            f"{self.memory / 1e9:.0f} GB/s copied, {self.write / 1e9:.0f} written, flag trip "
            f"{self.trip * 1e6:.2f} us"
        )


def _measure_elsewhere(gpus: Sequence[str]) -> dict[str, float]:
    """The limits of GPUs that belong to several processes, by a process that sees all of them."""
    command = [sys.executable, "-m", "freeio_jax.bench.floor", str(len(gpus))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)} on the GPUs {', '.join(gpus)} ended with status "
            f"{done.returncode}: {done.stderr.strip()[-1000:]}"
        )
    *said, figures = done.stdout.splitlines()
    print(*said, sep="\n", flush=True)
    return json.loads(figures)


def _main(num_gpus: int) -> None:
    """Measures on the first GPUs that this process sees. The last line has the limits in JSON."""
    ordinals = list(range(num_gpus))
    _native.cuda.start(ordinals)
    print(json.dumps(dataclasses.asdict(Limits.of(ordinals))))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
