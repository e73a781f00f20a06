"""One payload over HTTP into a file: ranges side by side, straight into the mapped file, taken up after a restart."""

import hashlib
import http.client
import mmap
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import numpy as np

from buffer.connection import ServiceClient
from buffer.errors import CorruptWeights, ServiceUnreachable
from buffer.weights.manifest import Payload
from buffer.weights.progress import Progress

RANGE_BYTES = 64 << 20
"""Bytes of one request: large enough that its round trip does not count, small enough to share among connections."""


_PIECE_BYTES = 4 << 20  # received at a time: so much is received twice when the process dies


class Download:
    """A download of known size and hash. Every range goes on where it broke off, within the client's retry budget."""

    def __init__(self, client: ServiceClient, route: str, payload: Payload) -> None:
        self._client = client
        self._route = route
        self._payload = payload
        self._ranges: deque[tuple[int, int, int]] = deque()
        self._failed = threading.Event()

    def to(self, path: Path) -> None:
        """Fill a file; what an earlier call, or a process that was killed, left there of this payload is not fetched
        again, and the whole is then proven by its sha256.

        Raises NotFound and what else the service names; ServiceUnreachable, after which another call goes on;
        CorruptWeights when what was left is damaged, after which another call begins anew.
        """
        progress = Progress.open(path, self._payload, range_bytes=RANGE_BYTES)
        self._ranges.extend(progress.missing())
        with path.open("r+b") as file:
            memory = memoryview(mmap.mmap(file.fileno(), self._payload.size_bytes))  # closed with its last slice
        connections = min(self._client.settings.download_connections, len(self._ranges))
        with ThreadPoolExecutor(max(1, connections)) as executor:
            for worker in [executor.submit(self._work, memory, progress) for _ in range(connections)]:
                worker.result()
        progress.path.unlink()
        if progress.taken_up_bytes and hashlib.sha256(memory).hexdigest() != self._payload.sha256:
            path.unlink()
            raise CorruptWeights(f"what was left of an earlier download to {path} is damaged", hint="fetch it again")

    def _work(self, memory: memoryview, progress: Progress) -> None:
        """Fetch ranges over one connection until none is left, or another worker has failed."""
        connection = self._client.raw_connection()
        try:
            while not self._failed.is_set():
                try:
                    number, start, stop = self._ranges.popleft()
                except IndexError:
                    return
                target = _Range(memory[start:stop], start, progress, number)
                self._client.retry(lambda: self._attempt(connection, target), what=f"GET {self._route}")  # noqa: B023
        except BaseException:
            self._failed.set()
            raise
        finally:
            connection.close()

    def _attempt(self, connection: http.client.HTTPConnection, target: "_Range") -> None:
        """Ask for what is missing of a range, and take what comes of it."""
        first, last = target.start + target.done, target.start + len(target.memory) - 1
        headers = {"Range": f"bytes={first}-{last}", "If-Range": f'"{self._payload.sha256}"'}
        try:
            response = self._client.raw_get(connection, self._route, headers)
            size = self._payload.size_bytes
            whole = response.status == HTTPStatus.OK and last + 1 - first == size  # as good as that range
            if not whole and response.getheader("Content-Range") != f"bytes {first}-{last}/{size}":
                raise ServiceUnreachable(
                    f"{self._client.url} answered {response.status} to a request for bytes {first} to {last}",
                    hint="a proxy in between must pass Range requests on",
                )
            while target.done < len(target.memory):
                received = response.readinto(target.memory[target.done : target.done + _PIECE_BYTES])
                if not received:
                    raise http.client.IncompleteRead(b"", len(target.memory) - target.done)
                target.advance(received)
        except (OSError, http.client.HTTPException) as error:
            raise ServiceUnreachable(f"{self._client.url} broke off: {error or type(error).__name__}") from error
        finally:
            if target.done < len(target.memory):
                connection.close()  # the rest of an answer is not read: the next attempt connects anew


@dataclass(frozen=True, slots=True)
class _Range:
    """One range on its way."""

    memory: memoryview
    """Its bytes in the target."""
    start: int
    """Where it begins in the payload."""
    progress: Progress
    number: int

    @property
    def done(self) -> int:
        """Bytes received, from its beginning on."""
        return int(self.progress.counts[self.number])

    def advance(self, num_bytes: int) -> None:
        """Count bytes that are in the target."""
        self.progress.counts[self.number] += np.uint64(num_bytes)
