"""What a client was told, in the hands of the kernel the moment it was told: a kill -9 takes nothing back."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON lines that outlives the process that writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_entries = len(self.entries())
        """Entries there are, as far as this object knows: a journal has one writer at a time."""

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add entries, all of them or none: one write is not split by a kill."""
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
        finally:
            os.close(file)
        self.num_entries += len(entries)

    def entries(self) -> list[dict[str, Any]]:
        """Return everything that was ever appended."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def size_bytes(self) -> int:
        """Return how much was written: it grows while the client gets answers."""
        return self._path.stat().st_size if self._path.exists() else 0
