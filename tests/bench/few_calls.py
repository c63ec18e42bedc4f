"""The benchmark with few calls of each program, as a program: `python few_calls.py ARGUMENT...`.

Tests look at what the benchmark says, not at how exact its times are. Its programs have so many
calls, and run so often, that a GPU's times are exact.
"""

import sys

from freeio_jax.bench import shapes, timing

#: What to set, and to what.
FEW = ((shapes.Case, "calls", 2), (timing, "MOST_RUNS", 2))

if __name__ == "__main__":
    from freeio_jax.bench.__main__ import main

    for where, name, value in FEW:
        setattr(where, name, value)
    sys.exit(main())
