"""Who was heard of last: actors' heartbeats and the learner's report, shared by all API workers."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from pydantic import FiniteFloat, ValidationError

from buffer.redis_client import RedisClient, store_errors
from buffer.types import Record
from buffer.wire import ActorStatus, Heartbeat, LearnerProgress, LearnerReport, LearnerStatus

log = logging.getLogger(__name__)

FORGET_AFTER_S = 600.0
"""An actor that was silent for so long is no longer listed."""

_LEARNER = "learner"
_ACTOR = "actor:"


class Board(Protocol):
    """Named notes that every API worker sees; a note replaces its previous one."""

    def put(self, name: str, note: str) -> None:
        """Keep a note."""
        ...

    def claim(self, name: str, note: str) -> bool:
        """Keep a note unless there is one of this name; whether it was kept. One step: of many, one succeeds."""
        ...

    def notes(self) -> dict[str, str]:
        """Return all notes by name."""
        ...

    def drop(self, names: Sequence[str]) -> None:
        """Forget notes."""
        ...


class MemoryBoard:
    """A Board of one process."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}

    def put(self, name: str, note: str) -> None:
        """See Board."""
        self._notes[name] = note

    def claim(self, name: str, note: str) -> bool:
        """See Board."""
        return self._notes.setdefault(name, note) is note

    def notes(self) -> dict[str, str]:
        """See Board."""
        return dict(self._notes)

    def drop(self, names: Sequence[str]) -> None:
        """See Board."""
        for name in names:
            self._notes.pop(name, None)


class RedisBoard:
    """A Board in one Redis hash, name -> note."""

    def __init__(self, client: RedisClient, *, key: str) -> None:
        self._redis = client
        self._key = key

    def put(self, name: str, note: str) -> None:
        """See Board. Raises StoreUnavailable."""
        with store_errors():
            self._redis.hset(self._key, name, note)

    def claim(self, name: str, note: str) -> bool:
        """See Board. Raises StoreUnavailable."""
        with store_errors():
            return bool(self._redis.hsetnx(self._key, name, note))

    def notes(self) -> dict[str, str]:
        """See Board. Raises StoreUnavailable."""
        with store_errors():
            stored = self._redis.hgetall(self._key)
        return {_text(name): _text(note) for name, note in stored.items()}

    def drop(self, names: Sequence[str]) -> None:
        """See Board. Raises StoreUnavailable."""
        with store_errors():
            self._redis.hdel(self._key, *names)


class _Heard(Record):
    """A message, and the Unix time at which it arrived."""

    received_s: FiniteFloat
    message: Heartbeat | LearnerProgress


class Presence:
    """The last message of each process, on a board. Nothing waits here."""

    def __init__(self, board: Board, *, clock: Callable[[], float] = time.time) -> None:
        self._board = board
        self._clock = clock

    def heartbeat(self, actor_id: str, heartbeat: Heartbeat) -> None:
        """Keep an actor's heartbeat in place of its previous one."""
        self._put(_ACTOR + actor_id, heartbeat)

    def report(self, report: LearnerReport) -> None:
        """Keep the learner's report, its groups apart, in place of its previous one."""
        progress = {name: getattr(report, name) for name in LearnerProgress.model_fields}
        self._put(_LEARNER, LearnerProgress(**progress))

    def read(self) -> tuple[LearnerStatus | None, list[ActorStatus]]:
        """Return the learner's last report, None before the first, and the actors heard of lately, by id."""
        now_s = self._clock()
        learner: LearnerStatus | None = None
        actors: list[ActorStatus] = []
        silent: list[str] = []
        for name, note in sorted(self._board.notes().items()):
            try:
                heard = _Heard.model_validate_json(note)
            except ValidationError:  # of a service of another version; the next heartbeat replaces it
                log.warning("the last message of %s is not one of this version of the service: it is forgotten", name)
                silent.append(name)
                continue
            age_s = max(0.0, now_s - heard.received_s)
            if isinstance(heard.message, LearnerProgress):
                learner = LearnerStatus(**dict(heard.message), age_s=age_s)
            elif age_s > FORGET_AFTER_S:
                silent.append(name)
            else:
                actors.append(ActorStatus(**dict(heard.message), actor_id=name.removeprefix(_ACTOR), age_s=age_s))
        if silent:
            self._board.drop(silent)
        return learner, actors

    def _put(self, name: str, message: Heartbeat | LearnerProgress) -> None:
        self._board.put(name, _Heard(received_s=self._clock(), message=message).model_dump_json())


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
