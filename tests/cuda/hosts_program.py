"""All operations between emulated hosts, checked against the oracle, with a fault of the network.

    python hosts_program.py LIBRARY SEED FAULT [KIND]

It prints "right", or what went wrong. A process of its own, because a kernel that does not wait for
what it needs may write anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
from emulated import Emulator, EngineError, capacity_of  # noqa: E402
from helpers import Geometry, assert_combined, power_of_two_weights, values  # noqa: E402
from operations import (  # noqa: E402
    check_transposed,
    combine,
    combine_transpose,
    run_dispatch,
)


def exchange(machine, rng):
    """Two hosts of two GPUs, and five rounds and more of each call."""
    machine.set_hosts(4, 2, window_bytes=1 << 11)
    geometry = Geometry(4, 90, 3, 8)
    hosts = np.array([0, 0, 1, 1])
    _, out, placement = run_dispatch(machine, rng, geometry, width=8)
    expert_out = values(rng, (4, capacity_of(geometry), 12), "float32")
    weights = power_of_two_weights(rng, geometry.topk_shape)
    z = combine(machine, geometry, out, expert_out, weights)
    machine.synchronize()
    assert_combined(
        np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True, hosts=hosts
    )
    x = values(rng, (4, 90, 12), "float32")
    grads = combine_transpose(machine, geometry, out, x, weights=weights, expert_out=expert_out)
    machine.synchronize()
    check_transposed(grads, geometry, placement, x, weights, expert_out)


def main(library, seed, fault, *kinds):
    machine = Emulator(library, seed=int(seed), num_gpus=4, num_sms=3, timeout=5)
    if fault == "ignores_fences":
        machine.set_network_faults(ignores_fences=True)
    elif fault != "none":
        machine.set_network_faults(**{fault: kinds})
    try:
        exchange(machine, np.random.default_rng(int(seed)))
    except (AssertionError, EngineError) as error:
        # Of each GPU that has failed.
        failures = list(iter(machine.take_failure, None))
        print("\n".join(failures) or f"wrong: {type(error).__name__}")
    else:
        print("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
