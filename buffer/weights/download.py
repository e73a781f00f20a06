"""One payload over HTTP into a file: ranges side by side, taken up again after a restart."""

import hashlib
import http.client
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import numpy as np

from buffer.connection import ServiceClient
from buffer.errors import CorruptWeights, ServiceUnreachable, StoreUnavailable
from buffer.weights.manifest import Payload
from buffer.weights.progress import Progress

RANGE_BYTES = 64 << 20
"""Bytes of one request: large enough that its round trip does not count, small enough to share among connections."""
_PIECE_BYTES = 1 << 20
"""Received and written at a time, through a buffer that stays in the cache: a mapped file would cost twice the CPU, in
page faults. So much of a connection is received twice when the process dies."""


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

        Raises NotFound and what else the service names; ServiceUnreachable, and StoreUnavailable for a full disk, after
        which another call goes on; CorruptWeights when what was left is damaged, after which another call begins anew.
        """
        progress = Progress.open(path, self._payload, range_bytes=RANGE_BYTES)
        self._ranges.extend(progress.missing())
        connections = min(self._client.settings.download_connections, len(self._ranges))
        with path.open("r+b", buffering=0) as file, ThreadPoolExecutor(max(1, connections)) as executor:
            for worker in [executor.submit(self._work, file.fileno(), progress) for _ in range(connections)]:
                worker.result()
        progress.path.unlink()
        if progress.taken_up_bytes and _sha256_of(path) != self._payload.sha256:
            path.unlink()
            raise CorruptWeights(f"what was left of an earlier download to {path} is damaged", hint="fetch it again")

    def _work(self, descriptor: int, progress: Progress) -> None:
        """Fetch ranges over one connection until none is left, or another worker has failed."""
        connection, buffer = self._client.raw_connection(), memoryview(bytearray(_PIECE_BYTES))
        try:
            while not self._failed.is_set():
                try:
                    number, start, stop = self._ranges.popleft()
                except IndexError:
                    return
                target = _Range(descriptor, start, stop, progress, number)
                self._client.retry(lambda: self._attempt(connection, target, buffer), what=f"GET {self._route}")  # noqa: B023
        except BaseException:
            self._failed.set()
            raise
        finally:
            connection.close()

    def _attempt(self, connection: http.client.HTTPConnection, target: "_Range", buffer: memoryview) -> None:
        """Ask for what is missing of a range, and take what comes of it."""
        first, last = target.position, target.stop - 1
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
            while target.position < target.stop:
                received = response.readinto(buffer[: target.stop - target.position])
                if not received:
                    raise http.client.IncompleteRead(b"", target.stop - target.position)
                target.write(buffer[:received])
        except (OSError, http.client.HTTPException) as error:
            raise ServiceUnreachable(f"{self._client.url} broke off: {error or type(error).__name__}") from error
        finally:
            if target.position < target.stop:
                connection.close()  # the rest of an answer is not read: the next attempt connects anew


@dataclass(frozen=True, slots=True)
class _Range:
    """One range on its way."""

    descriptor: int
    """Of the target."""
    start: int
    stop: int
    progress: Progress
    number: int

    @property
    def position(self) -> int:
        """Of the first byte that is missing."""
        return self.start + int(self.progress.counts[self.number])

    def write(self, piece: memoryview) -> None:
        """Write what comes next, and then count it. Raises StoreUnavailable when the disk does not take it."""
        try:
            written = os.pwrite(self.descriptor, piece, self.position)
        except OSError as error:
            raise StoreUnavailable(
                f"a download cannot be written: {error.strerror}", hint="make room where the run's directory is"
            ) from error
        self.progress.counts[self.number] += np.uint64(written)
        if written < len(piece):
            self.write(piece[written:])


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
