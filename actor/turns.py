"""Fair turns on an engine's core: a thread that asks between two decode steps gets the next turn."""

import threading
from collections.abc import Callable, Iterator
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


class SharedSteps:
    """Decode steps that several threads need: one of them steps at a time, for all.

    A step after which something has ended wakes all who wait in `until`. So the core has one generator in its queue,
    however many there are, and a thread whose responses have ended does not wait for those of another.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = False

    def until(self, done: Callable[[], bool], step: Callable[[], bool]) -> None:
        """Return once `done`, after steps of this thread or of others; raises what this thread's `step` raises.

        `step` says whether something has ended by it.
        """
        while self._take_over(done):
            try:
                while not done() and not step():
                    pass
            finally:
                with self._changed:
                    self._running = False
                    self._changed.notify_all()

    def _take_over(self, done: Callable[[], bool]) -> bool:
        """Whether the next steps are this thread's; False once it needs none."""
        with self._changed:
            self._changed.wait_for(lambda: done() or not self._running)
            if done():
                return False
            self._running = True
            return True
