"""Processes that take turns on a GPU, where there are fewer GPUs than processes.

The GPU gives each process a slice of time. So all of them come on, but nothing is fast.
"""

from __future__ import annotations

from collections.abc import Sequence


def take_turns(gpus: Sequence[str], num_processes: int) -> dict[str, str]:
    """The variables with which the launcher gives each of its processes one of ``gpus`` in turn.

    Each process gets its share of a GPU's memory.
    """
    processes_of_gpu = -(-num_processes // len(gpus))
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus[rank % len(gpus)] for rank in range(num_processes)),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(0.7 / processes_of_gpu),
    }
