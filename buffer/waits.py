"""Who waits for whom, since when: set by each refusal, cleared by the next success."""

from dataclasses import dataclass, field

from buffer.outcomes import wait_reason
from buffer.table import Wait

FORGET_AFTER_S = 30.0
"""A side that has not asked for this long has stopped, it does not wait."""


def report_wait(who: str, code: str, since_s: float, last_s: float, now_s: float) -> list[Wait]:
    """Return the wait of one side, or nothing when its last refused attempt is too long ago."""
    if now_s - last_s > FORGET_AFTER_S:
        return []
    return [Wait(who=who, since_s=max(0.0, now_s - since_s), reason=wait_reason(code))]


@dataclass(slots=True)
class _Side:
    who: str
    code: str = ""
    since_s: float = 0.0
    last_s: float = 0.0

    def blocked(self, code: str, now_s: float) -> None:
        if not self.code or now_s - self.last_s > FORGET_AFTER_S:
            self.since_s = now_s
        self.code, self.last_s = code, now_s

    def clear(self) -> None:
        self.code = ""

    def report(self, now_s: float) -> list[Wait]:
        return report_wait(self.who, self.code, self.since_s, self.last_s, now_s) if self.code else []


@dataclass(slots=True)
class Waits:
    """Both sides of a table in memory."""

    learner: _Side = field(default_factory=lambda: _Side("learner"))
    actors: _Side = field(default_factory=lambda: _Side("actors"))

    def report(self, now_s: float) -> list[Wait]:
        return self.learner.report(now_s) + self.actors.report(now_s)
