"""Several batches drawn at once: each is handed on as soon as it is done, while the engine goes on with the others.

| thread | waits for | does |
|---|---|---|
| main | the first batch that is done | delivers it, starts another in its place |
| one for each batch | the engine, the rewards | draws and scores one batch |

While the main loop waits for admission nothing new is started, so that a full table holds every thread.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from types import TracebackType
from typing import Self

from buffer.types import Group

log = logging.getLogger(__name__)


class BatchesInFlight:
    """Keeps `num_batches` calls of `draw` running from the first `next_batch` to the end of the block.

    At its end `stop` is set, whatever ended it, and what is still in flight is delivered as far as it is whole.
    """

    def __init__(
        self,
        draw: Callable[[], list[Group]],
        *,
        num_batches: int,
        deliver: Callable[[list[Group]], None],
        stop: threading.Event,
    ) -> None:
        self._draw = draw
        self._num_batches = num_batches
        self._deliver = deliver
        self._stop = stop
        self._pool = ThreadPoolExecutor(num_batches, thread_name_prefix="generate")
        self._futures: list[Future[list[Group]]] = []  # oldest first

    def next_batch(self) -> list[Group]:
        """Wait for a batch to be done and return it; raises what its `draw` raised."""
        while len(self._futures) < self._num_batches:
            self._futures.append(self._pool.submit(self._draw))
        wait(self._futures, return_when=FIRST_COMPLETED)
        done = next(future for future in self._futures if future.done())
        self._futures.remove(done)
        return done.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raise the first error of the batches in flight, unless another one has ended the block."""
        self._stop.set()
        first: BaseException | None = None
        for future in as_completed(self._futures):
            failed = future.exception()
            if failed is None:
                self._deliver(future.result())
            elif error is None and first is None:
                first = failed
            else:
                log.error("another batch in flight failed: %s: %s", type(failed).__name__, failed)
        self._pool.shutdown()
        if first is not None:
            raise first
