"""The thread that brings what the engines say to the log, while the program goes on."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable

from freeio_jax import log

_WATCH_SECONDS = 0.1

_sources: list[tuple[Callable[[], str], int]] = []
_starting = threading.Lock()
_telling = threading.Lock()  # held until what was taken is logged


def watch(take: Callable[[], str], level: int) -> None:
    """Logs at ``level`` what ``take()`` returns, from now on; empty: there is nothing."""
    with _starting:
        first = not _sources
        _sources.append((take, level))
        if first:
            _start()


def tell() -> None:
    """Logs what the engines have said since the last time."""
    with _telling:
        for take, level in tuple(_sources):
            while text := take():
                log.logger.log(level, "%s", text)


def _run(stop: threading.Event) -> None:
    while not stop.wait(_WATCH_SECONDS):
        tell()


def _start() -> None:
    stop = threading.Event()
    watcher = threading.Thread(target=_run, args=(stop,), name="freeio_jax log", daemon=True)

    def end() -> None:
        stop.set()
        watcher.join()
        tell()  # the watcher may not have come to it

    watcher.start()
    # While the interpreter is still there: a thread that comes back to it from C++ later than that
    # ends the whole process ("terminate called without an active exception").
    atexit.register(end)
    # A forked child has no such thread, and nothing of its own to say.
    os.register_at_fork(after_in_child=lambda: atexit.unregister(end))
