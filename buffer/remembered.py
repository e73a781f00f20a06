"""Ids of groups that left a MemoryTable, so that a late retry is known."""

from buffer.table import TableSettings


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
