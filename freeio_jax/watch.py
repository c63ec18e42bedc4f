"""The thread that brings messages of the engines to the log while the program runs."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable

from freeio_jax import log

_WATCH_SECONDS = 0.1

_sources: list[tuple[Callable[[], str], int]] = []
_starting = threading.Lock()
_telling = threading.Lock()  # held from taking a message until it is logged


def watch(take: Callable[[], str], level: int) -> None:
    """From now on logs at ``level`` what ``take()`` returns: a message, or "" if there is none."""
    with _starting:
        first = not _sources
        _sources.append((take, level))
        if first:
            _start()


def tell() -> None:
    """Logs the messages that there are now."""
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
        tell()  # messages that came after the watcher's last look

    watcher.start()
    # The watcher must end before the interpreter does. A thread that returns from C++ later than
    # that ends the whole process ("terminate called without an active exception").
    atexit.register(end)
    # A forked child has no watcher, and no messages of its own.
    os.register_at_fork(after_in_child=lambda: atexit.unregister(end))
