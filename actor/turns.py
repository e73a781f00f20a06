"""Fair turns on an engine's core: a thread that asks between two decode steps gets the next turn."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Who owns the core. The generating thread takes one turn a decode step; a loader waits for one step at most."""

    def __init__(self) -> None:
        # a waiting loader holds the queue, so that a generator in a tight loop cannot take the core again before it
        self._queue = threading.Lock()
        self._core = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the running turn to end, then own the core."""
        with self._queue:
            self._core.acquire()
        try:
            yield
        finally:
            self._core.release()
