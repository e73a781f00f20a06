"""One payload over HTTP into a file: ranges side by side, received straight into the mapped file."""

import http.client
import mmap
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

from buffer.connection import ServiceClient
from buffer.errors import ServiceUnreachable

RANGE_BYTES = 64 << 20
"""Bytes of one request: large enough that its round trip does not count, small enough to share among connections."""


class Download:
    """A download of known size. Every range goes on where it was broken off, within the client's retry budget."""

    def __init__(self, client: ServiceClient, route: str, size_bytes: int) -> None:
        self._client = client
        self._route = route
        self._size = size_bytes
        self._ranges = deque(
            (start, min(start + RANGE_BYTES, size_bytes)) for start in range(0, size_bytes, RANGE_BYTES)
        )
        self._failed = threading.Event()

    def to(self, path: Path) -> None:
        """Fill a file. Raises NotFound and what else the service names; ServiceUnreachable."""
        connections = min(self._client.settings.download_connections, len(self._ranges))
        with path.open("w+b") as file:
            file.truncate(self._size)
            memory = memoryview(mmap.mmap(file.fileno(), self._size))  # closed with its last slice
        with ThreadPoolExecutor(connections) as executor:
            for worker in [executor.submit(self._work, memory) for _ in range(connections)]:
                worker.result()

    def _work(self, memory: memoryview) -> None:
        """Fetch ranges over one connection until none is left, or another worker has failed."""
        connection = self._client.raw_connection()
        try:
            while not self._failed.is_set():
                try:
                    start, stop = self._ranges.popleft()
                except IndexError:
                    return
                _Range(self._client, connection, self._route, self._size).fetch(memory[start:stop], start)
        except BaseException:
            self._failed.set()
            raise
        finally:
            connection.close()


class _Range:
    """One range on its way."""

    def __init__(
        self, client: ServiceClient, connection: http.client.HTTPConnection, route: str, size_bytes: int
    ) -> None:
        self._client = client
        self._connection = connection
        self._route = route
        self._size = size_bytes
        self._done = 0

    def fetch(self, target: memoryview, start: int) -> None:
        """Fill the target with the bytes from `start` on."""
        self._client.retry(lambda: self._attempt(target, start), what=f"GET {self._route}")

    def _attempt(self, target: memoryview, start: int) -> None:
        first, last = start + self._done, start + len(target) - 1
        try:
            response = self._client.raw_get(self._connection, self._route, {"Range": f"bytes={first}-{last}"})
            whole = response.status == HTTPStatus.OK and last + 1 - first == self._size  # as good as that range
            if not whole and response.getheader("Content-Range") != f"bytes {first}-{last}/{self._size}":
                raise ServiceUnreachable(
                    f"{self._client.url} answered {response.status} to a request for bytes {first} to {last}",
                    hint="a proxy in between must pass Range requests on",
                )
            while self._done < len(target):
                received = response.readinto(target[self._done :])
                if not received:
                    raise http.client.IncompleteRead(b"", len(target) - self._done)
                self._done += received
        except (OSError, http.client.HTTPException) as error:
            raise ServiceUnreachable(f"{self._client.url} broke off: {error or type(error).__name__}") from error
        finally:
            if self._done < len(target):
                self._connection.close()  # the rest of an answer is not read: the next attempt connects anew
