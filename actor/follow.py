"""The loop of an actor that keeps a vLLM server at the newest version while agents of one's own draw from it.

| waits for | produces | unblocked by | on shutdown |
|---|---|---|---|
| a look every LOOK_S | what it is at; a server that was started again is found out | `stop` | end |
"""

import logging
import threading
from typing import Protocol

from actor.status import Activity, Status
from actor.weight_sync import WeightSync
from buffer.errors import EngineUnreachable
from buffer.types import PolicyVersion

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks at what the server says that its weights are."""


class Server(Protocol):
    """What holds the weights: actor.vllm.remote.RemoteVllmEngine."""

    @property
    def version(self) -> PolicyVersion:
        """The version of the weights in use; -1 when there is none."""
        ...

    def notice_loss(self) -> None:
        """Make `version` -1 when the weights were lost. Raises EngineUnreachable."""
        ...


class FollowLoop:
    """Runs until `stop` is set, or the weight sync ends with an error."""

    def __init__(self, *, server: Server, sync: WeightSync, status: Status, stop: threading.Event) -> None:
        self._server = server
        self._sync = sync
        self._status = status
        self._stop = stop
        self._is_away = False

    def run(self) -> None:
        """Look after the server. Raises what ended the weight sync."""
        while not self._stop.wait(LOOK_S):
            self._sync.wait_ready(0.0)
            self._look()
            if self._sync.quarantine_reason:
                self._status.enter(Activity.QUARANTINED, self._sync.quarantine_reason)
            elif self._server.version < 0:
                self._status.enter(Activity.WAITING_WEIGHTS, "the server holds no version")
            else:
                self._status.enter(Activity.FOLLOWING)

    def _look(self) -> None:
        try:
            self._server.notice_loss()
        except EngineUnreachable as error:
            if not self._is_away:
                log.warning("%s", error)
            self._is_away = True
        else:
            self._is_away = False
