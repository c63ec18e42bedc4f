"""What freeio_jax says of itself: the logger ``freeio_jax`` of Python's logging.

ERROR: an exchange that failed on a GPU. WARNING: a rank that waits for another one for long. INFO:
what was chosen when something started. DEBUG: each exchange that is compiled.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("freeio_jax")

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _Stderr(logging.Handler):
    """Writes to stderr, as long as the program has not said where its log goes."""

    def emit(self, record):
        if not logging.root.handlers and logger.handlers == [self]:
            print(self.format(record), file=sys.stderr, flush=True)


_stderr = _Stderr()
_stderr.setFormatter(logging.Formatter("freeio_jax: %(message)s"))
logger.addHandler(_stderr)


def set_verbosity(verbosity: int) -> None:
    """0: warnings and errors, 1: what was chosen when something started, too, 2: all."""
    logger.setLevel(_LEVELS[verbosity])


def parse_verbosity(value: object) -> int:
    """Raises ValueError where ``value`` is no verbosity."""
    verbosity = int(value)
    if verbosity not in range(len(_LEVELS)):
        raise ValueError(f"it must be 0 to {len(_LEVELS) - 1}")
    return verbosity
