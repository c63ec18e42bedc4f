"""What the processes of a benchmark tell each other, by JAX's coordinator.

All processes run the same parts, and the first one tells of them. What decides how often a program
runs must be the same in all of them, or one would wait for exchanges that the others never make.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import distributed

#: The longest that a process waits for another one, which may be compiling.
_SECONDS = 1800

_taking_part: tuple[int, ...] | None = None  # None: all
_calls: dict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)


def is_first() -> bool:
    return jax.process_index() == 0


def local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Those of this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


@contextlib.contextmanager
def among(devices: Sequence[jax.Device]) -> Iterator[bool]:
    """While it lasts, :func:`share` is among the processes of these devices.

    Gives whether this process is one of them. Others have nothing to do.
    """
    global _taking_part
    before = _taking_part
    _taking_part = tuple(sorted({device.process_index for device in devices}))
    try:
        yield jax.process_index() in _taking_part
    finally:
        _taking_part = before


def share(value: Any) -> list[Any]:
    """What each process gives, in order of process. All of them must call it; it also is a barrier.

    Args:
      value: anything that JSON has.
    """
    taking_part = _taking_part or tuple(range(jax.process_count()))
    if len(taking_part) == 1:
        return [value]
    client = distributed.global_state.client
    place = f"freeio_jax.bench/{taking_part}/{next(_calls[taking_part])}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(value))
    return [
        json.loads(client.blocking_key_value_get(f"{place}/{process}", _SECONDS * 1000))
        for process in taking_part
    ]
