"""The last message of each process, in memory and in Redis."""

from collections.abc import Iterator

import pytest

from buffer.errors import StoreUnavailable
from buffer.redis_client import connect
from buffer.wire import ActorStatus, Heartbeat, LearnerReport, LearnerStatus
from services.presence import FORGET_AFTER_S, Board, MemoryBoard, Presence, RedisBoard
from tests.conftest import Clock
from tests.services.trained import make_trained


@pytest.fixture(params=["memory", "redis"])
def board(request: pytest.FixtureRequest) -> Iterator[Board]:
    if request.param == "memory":
        yield MemoryBoard()
        return
    with connect(request.getfixturevalue("redis_url")) as client:
        client.flushdb()
        yield RedisBoard(client, key="presence")
        client.flushdb()


def beat(groups_total: int) -> Heartbeat:
    return Heartbeat(version=1, tokens_per_s=2.5, groups_total=groups_total, state="generating", detail="é")


def test_last_message_of_each_is_read_with_its_age_by_any_worker(board: Board, clock: Clock) -> None:
    writer, reader = Presence(board, clock=clock), Presence(board, clock=clock)
    assert reader.read() == (None, [])
    report = LearnerReport(updates=5, total_updates=400, version=4, metrics={"reward/mean": 0.5})
    posted = report.model_copy(update={"trained": (make_trained("g"),)})

    writer.heartbeat("b", beat(1))
    writer.heartbeat("learner", beat(2))  # an actor may have any name
    clock.advance(2)
    writer.heartbeat("b", beat(3))
    writer.report(posted)
    clock.advance(1)

    assert reader.read() == (
        LearnerStatus(**report.model_dump(exclude={"trained"}), age_s=1.0),  # groups go to the ring
        [
            ActorStatus(**dict(beat(3)), actor_id="b", age_s=1.0),
            ActorStatus(**dict(beat(2)), actor_id="learner", age_s=3.0),
        ],
    )


def test_silent_actor_is_forgotten_and_the_learner_is_not(board: Board, clock: Clock) -> None:
    presence = Presence(board, clock=clock)
    presence.heartbeat("a", beat(1))
    presence.report(LearnerReport(updates=5, version=4, metrics={}))

    clock.advance(FORGET_AFTER_S + 1)

    learner, actors = presence.read()
    assert learner is not None
    assert actors == []
    assert list(board.notes()) == ["learner"]


def test_absent_redis_is_a_named_error(clock: Clock) -> None:
    with (
        connect("redis://127.0.0.1:1/0") as client,
        pytest.raises(StoreUnavailable, match=r"Redis does not answer: .*refused"),
    ):
        Presence(RedisBoard(client, key="presence"), clock=clock).read()


def test_a_message_of_another_version_of_the_service_is_forgotten_and_the_others_are_read(board: Board) -> None:
    presence = Presence(board)
    presence.heartbeat("a", beat(1))
    board.put("actor:b", '{"received_s": 1.0, "message": {"a field": "that this version does not know"}}')

    assert [[actor.actor_id for actor in presence.read()[1]] for _ in range(2)] == [["a"], ["a"]]
    assert list(board.notes()) == ["actor:a"]
