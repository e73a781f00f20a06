"""Finished groups on disk while the service is away: bounded, in order, safe against kill -9.

{directory}/{number:012d}.group   one encoded group (buffer.codec); the rename that names it is the commit
{directory}/{number:012d}.refused one that the service refused for good, or that is no group any more: kept outside the
                                  bound until somebody has looked at it and removes it
{directory}/lock                  held by the actor that owns the directory

Group ids make resubmission idempotent: a file that was accepted just before a kill is a `duplicate` the next time.
"""

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from buffer.codec import decode_group, encode_group
from buffer.disk import sync
from buffer.errors import InvalidRecord, StalewiseError, StoreUnavailable
from buffer.types import Group

log = logging.getLogger(__name__)


class SpoolInUse(StalewiseError):
    """Another process owns the spool directory."""

    exit_code = 2


class Spool:
    """A queue of groups in a directory that one actor owns.

    Raises StoreUnavailable when the disk refuses, with every group still where it was; `append` says how many it took.
    """

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        """Take up what a former process left. Raises SpoolInUse when that process still lives."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._refusal: OSError | None = None  # of the disk, at the last append
        with self._disk_errors("used"):
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise SpoolInUse(
                f"the spool {directory} belongs to a running actor", hint="give this actor another --actor-id"
            ) from error
        with self._disk_errors("used"):
            for partial in directory.glob("*.partial"):
                partial.unlink()
            self._sizes = {path: path.stat().st_size for path in sorted(directory.glob("*.group"))}
        self._files = list(self._sizes)  # oldest first
        self._next = 1 + max((int(path.stem) for path in directory.glob("*.*")), default=0)
        if refused := len(list(directory.glob("*.refused"))):
            log.warning("%d refused groups lie in %s: look at them, and remove them", refused, directory)

    def close(self) -> None:
        """Give the directory up."""
        self._lock.close()

    @property
    def num_groups(self) -> int:
        """Groups waiting."""
        return len(self._files)

    @property
    def num_bytes(self) -> int:
        """Bytes waiting."""
        return sum(self._sizes.values())

    @property
    def why_full(self) -> str:
        """Why the last append took less than it was given."""
        if self._refusal is not None:
            return f"the spool {self._directory} cannot be written: {self._refusal}"
        return f"the spool is full: {self.num_bytes} bytes"

    def append(self, groups: Sequence[Group]) -> int:
        """Write groups in order while they fit and the disk takes them; return how many are in the queue, synced.

        A disk that refuses is said once, until it takes groups again.
        """
        written = 0
        try:
            try:
                for group in groups:
                    encoded = encode_group(group)
                    if self.num_bytes + len(encoded) > self._max_bytes:
                        break
                    self._write(encoded)
                    written += 1
            finally:
                if written:
                    sync(self._directory)
        except OSError as error:
            if self._refusal is None:
                log.warning("the spool %s cannot be written, groups wait: %s", self._directory, error)
            self._refusal = error
        else:
            self._refusal = None
        return written

    def oldest(self, count: int) -> list[Group]:
        """Read the oldest groups, without removing them; a file that holds none is set aside."""
        groups: list[Group] = []
        while len(groups) < min(count, len(self._files)):
            path = self._files[len(groups)]
            with self._disk_errors("read", "repair the disk, or move the file away and start the actor again"):
                content = path.read_bytes()
            try:
                groups.append(decode_group(content, max_bytes=self._sizes[path]))
            except InvalidRecord as error:
                log.error("set aside %s, which cannot be read: %s", path, error)
                self._remove(len(groups), refused=True)
        return groups

    def pop(self, *, refused: bool = False) -> None:
        """Remove the oldest group: it was answered. A refused one stays on disk under another name."""
        self._remove(0, refused=refused)

    def _remove(self, index: int, *, refused: bool) -> None:
        path = self._files[index]
        with self._disk_errors("changed"):
            if refused:
                path.rename(path.with_suffix(".refused"))
            else:
                path.unlink()
        del self._files[index], self._sizes[path]

    def _write(self, encoded: bytes) -> None:
        path = self._directory / f"{self._next:012d}.group"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._next += 1
        self._files.append(path)
        self._sizes[path] = len(encoded)

    @contextmanager
    def _disk_errors(self, done: str, hint: str = "check the disk") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(f"the spool {self._directory} cannot be {done}: {error}", hint=hint) from error
