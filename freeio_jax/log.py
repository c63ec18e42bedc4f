"""The log: the logger ``freeio_jax`` of Python's logging.

ERROR: an exchange failed on a GPU. WARNING: a rank has waited long for another one, or the product
of experts is slow. INFO: what was chosen when something started. DEBUG: each exchange that is
compiled.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("freeio_jax")

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _Stderr(logging.Handler):
    """Writes to stderr, unless the program has set up Python's logging."""

    def emit(self, record):
        if not logging.root.handlers and logger.handlers == [self]:
            print(self.format(record), file=sys.stderr, flush=True)


_stderr = _Stderr()
_stderr.setFormatter(logging.Formatter("freeio_jax: %(message)s"))
logger.addHandler(_stderr)


def set_verbosity(verbosity: int) -> None:
    """0: warnings and errors, 1: also what was chosen when something started, 2: everything."""
    logger.setLevel(_LEVELS[verbosity])


def parse_verbosity(value: object) -> int:
    """``value`` as a verbosity; raises ValueError where it is none."""
    verbosity = int(value)
    if verbosity not in range(len(_LEVELS)):
        raise ValueError(f"it must be 0 to {len(_LEVELS) - 1}")
    return verbosity
