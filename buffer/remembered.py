"""What a MemoryTable remembers so that a late retry is known: ids of groups that left, and its last draws."""

import heapq
from dataclasses import dataclass

from buffer.errors import Conflict
from buffer.table import SampleRequest, TableSettings
from buffer.types import Sample


class RememberedIds:
    """group_id -> content hash, '' for a partial group that was dropped; oldest first."""

    def __init__(self, settings: TableSettings) -> None:
        self._settings = settings
        self._ids: dict[str, tuple[str, float]] = {}  # with the time of removal
        self.forgotten_total = 0
        """Ids forgotten because there were more than `dedup_max_ids`."""

    def content(self, group_id: str) -> str | None:
        """Return the content of a group that left; None = not known."""
        return self._ids[group_id][0] if group_id in self._ids else None

    def add(self, group_id: str, content: str, now_s: float) -> None:
        """Remember a group that leaves now."""
        self._ids.pop(group_id, None)
        self._ids[group_id] = (content, now_s)
        if len(self._ids) > self._settings.dedup_max_ids:
            del self._ids[next(iter(self._ids))]
            self.forgotten_total += 1

    def forget_overdue(self, now_s: float) -> None:
        """Forget what left before `dedup_window_s`."""
        overdue_s = now_s - self._settings.dedup_window_s
        for group_id in list(self._ids):
            if self._ids[group_id][1] > overdue_s:
                return
            del self._ids[group_id]


REREAD_S = 5.0
"""What a repeat at the end of its window has to read the groups."""


class KeptForRepeats:
    """Removed groups that were handed out, by sequence number: who repeats the draw can still have them."""

    def __init__(self, settings: TableSettings) -> None:
        self._settings = settings
        self._leaving: list[tuple[float, int, int]] = []  # a heap: when it goes, sequence number, bytes
        self.sequences: set[int] = set()
        self.bytes = 0
        self.dropped_total = 0
        """Groups dropped early because there were more than `repeat_max_bytes`."""

    def add(self, sequence: int, size_bytes: int, used_s: float, now_s: float) -> None:
        """Keep a group that is removed now; if there are too many bytes, drop those first that would go first.

        What was handed out at this very moment stays: nobody has read it yet.
        """
        life_s = self._settings.repeat_window_s + REREAD_S
        if used_s + self._settings.repeat_window_s <= now_s:
            return
        heapq.heappush(self._leaving, (used_s + life_s, sequence, size_bytes))
        self.sequences.add(sequence)
        self.bytes += size_bytes
        while self.bytes > self._settings.repeat_max_bytes and self._leaving[0][0] < now_s + life_s:
            self._drop_first()
            self.dropped_total += 1

    def drop_overdue(self, now_s: float) -> None:
        """Drop the groups that no repeat can ask for any more."""
        while self._leaving and self._leaving[0][0] <= now_s:
            self._drop_first()

    def _drop_first(self) -> None:
        _, sequence, size_bytes = heapq.heappop(self._leaving)
        self.sequences.discard(sequence)
        self.bytes -= size_bytes


@dataclass(frozen=True, slots=True)
class RememberedDraw:
    """A draw that was handed out."""

    request: SampleRequest
    drawn_s: float
    sequences: list[int]
    samples: list[Sample]


class RememberedDraws:
    """Draws that were handed out, by request_id, for `repeat_window_s`."""

    def __init__(self, settings: TableSettings) -> None:
        self._settings = settings
        self._draws: dict[str, RememberedDraw] = {}

    def repeated(self, request: SampleRequest, now_s: float) -> RememberedDraw | None:
        """Return the draw that a request repeats, None for a new one. Raises Conflict for a reused request_id."""
        window_s = self._settings.repeat_window_s
        self._draws = {key: draw for key, draw in self._draws.items() if now_s - draw.drawn_s < window_s}
        draw = self._draws.get(request.request_id)
        if draw is None:
            return None
        if draw.request != request:
            raise Conflict(f"request_id {request.request_id!r} was used for another draw", hint="use a new request_id")
        return draw

    def add(self, draw: RememberedDraw) -> None:
        """Remember a draw."""
        self._draws[draw.request.request_id] = draw
