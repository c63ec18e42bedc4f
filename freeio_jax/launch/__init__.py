"""``python -m freeio_jax.launch -n 4 script.py``: a program in several processes of this host.

Each process is a member of a local pod: ``jax.distributed.initialize()`` needs no arguments, every
line of output starts with the process's number, and when one process fails the others are stopped.
"""

from freeio_jax.launch.pod import Pod

__all__ = ["Pod"]
