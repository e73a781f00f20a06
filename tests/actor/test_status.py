import threading

import pytest

from actor.status import Activity, Pulse, Status
from buffer.errors import ServiceUnreachable
from buffer.wire import Heartbeat, Load


class Listener:
    """A service that hears heartbeats, or is away."""

    def __init__(self) -> None:
        self.heard: list[Heartbeat] = []
        self.away = False

    def heartbeat(self, actor_id: str, heartbeat: Heartbeat) -> None:
        if self.away:
            raise ServiceUnreachable("nobody answers")
        self.heard.append(heartbeat)


def test_heartbeats_say_what_the_actor_does_and_the_log_warns_of_long_waits(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [100.0]
    status, listener = Status(lambda: now_s[0]), Listener()
    pulse = Pulse(
        status=status,
        version=lambda: 4,
        loads=lambda: (Load(version=4, publish_to_loaded_s=0.5),),
        unscored_groups_total=lambda: 6,
        monitor=listener,
        actor_id="a",
        heartbeat_s=2.0,
        stall_s=30.0,
        stop=threading.Event(),
    )

    status.enter(Activity.GENERATING)
    status.drew(50)
    now_s[0] += 2.0
    pulse.beat()
    status.enter(Activity.WAITING_ADMISSION, "the limiter")
    now_s[0] += 31.0
    listener.away = True
    pulse.beat()
    pulse.beat()
    listener.away = False
    now_s[0] += 1.0
    pulse.beat()

    first, last = listener.heard
    assert (first.version, first.tokens_per_s, first.state, first.detail) == (4, 25.0, "generating", "")
    assert (last.state, last.detail) == ("waiting_admission", "the limiter (for 32 s)")
    assert last.unscored_groups_total == 6
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["waiting_admission: the limiter (for 31 s)", "heartbeats are not heard: nobody answers"]
