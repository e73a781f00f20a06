"""What a MemoryTable remembers so that a late retry is known: ids of groups that left, and its last draws."""

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


@dataclass(frozen=True, slots=True)
class _Draw:
    request: SampleRequest
    drawn_s: float
    samples: list[Sample]


class RememberedDraws:
    """Draws that were handed out, by request_id, for `repeat_window_s`."""

    def __init__(self, settings: TableSettings) -> None:
        self._settings = settings
        self._draws: dict[str, _Draw] = {}

    def repeated(self, request: SampleRequest, now_s: float) -> list[Sample] | None:
        """Return the draw that a request repeats, None for a new one. Raises Conflict for a reused request_id."""
        window_s = self._settings.repeat_window_s
        self._draws = {key: draw for key, draw in self._draws.items() if now_s - draw.drawn_s < window_s}
        draw = self._draws.get(request.request_id)
        if draw is None:
            return None
        if draw.request != request:
            raise Conflict(f"request_id {request.request_id!r} was used for another draw", hint="use a new request_id")
        return draw.samples

    def add(self, request: SampleRequest, samples: list[Sample], now_s: float) -> None:
        """Remember a draw."""
        self._draws[request.request_id] = _Draw(request, now_s, samples)
