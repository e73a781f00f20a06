"""Whose turn an evaluation is, on both boards, and what is kept of it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer.errors import Conflict, NotFound
from buffer.evaluations import ClaimAnswer, Evaluation, EvaluationClaim
from buffer.redis_client import connect
from buffer.types import SamplingSettings
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.store import WeightStoreSettings
from services.evaluations import KEPT_INTERVALS, MAX_ATTEMPTS, BoardEvaluations
from services.presence import Board, MemoryBoard, RedisBoard
from tests.conftest import Clock
from tests.factories import PAYLOAD, make_manifest


@pytest.fixture(params=["memory", "redis"])
def board(request: pytest.FixtureRequest) -> Iterator[Board]:
    if request.param == "memory":
        yield MemoryBoard()
        return
    with connect(request.getfixturevalue("redis_url")) as client:
        yield RedisBoard(client, key="evaluations")
        client.flushall()


@pytest.fixture
def store(tmp_path: Path) -> DirectoryWeightStore:
    """Keeps one version, and those that are pinned."""
    return DirectoryWeightStore(tmp_path / "weights", settings=WeightStoreSettings(keep_versions=1))


def publish(store: DirectoryWeightStore, version: int) -> None:
    content = PAYLOAD + str(version).encode()
    manifest = make_manifest(version, payload=content)
    store.put_blob(manifest.payloads[0].sha256, [content])
    store.publish(manifest)


def claim(evaluations: BoardEvaluations, version: int, actor_id: str = "a", every_updates: int = 10) -> ClaimAnswer:
    return evaluations.claim(
        EvaluationClaim(actor_id=actor_id, version=version, every_updates=every_updates, lease_s=60.0)
    )


def result(version: int, *, actor_id: str = "a", pass_1: float = 0.5) -> Evaluation:
    return Evaluation(
        actor_id=actor_id,
        version=version,
        oldest_version=version,
        newest_version=version,
        num_prompts=2,
        samples_per_prompt=2,
        sampling=SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0),
        pass_at={"1": pass_1, "2": 1.0},
        pass_1_standard_error=0.1,
        reward_mean=pass_1,
        response_tokens_mean=3.0,
        finished_s=1.0,
        seconds=2.0,
    )


def test_of_many_actors_that_ask_at_once_one_evaluates_an_interval(board: Board, store: DirectoryWeightStore) -> None:
    publish(store, 3)
    granted: list[str] = []
    barrier = threading.Barrier(8)

    def ask(actor_id: str) -> None:
        barrier.wait()
        if claim(BoardEvaluations(board, store), 3, actor_id).granted:
            granted.append(actor_id)

    threads = [threading.Thread(target=ask, args=(f"actor-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(granted) == 1
    assert [running.actor_id for running in BoardEvaluations(board, store).read().running] == granted


def test_an_interval_is_evaluated_once_and_the_next_one_again(board: Board, store: DirectoryWeightStore) -> None:
    evaluations = BoardEvaluations(board, store)
    publish(store, 13)
    assert claim(evaluations, 13).granted
    evaluations.record(result(13))
    evaluations.record(result(13))  # the answer was lost
    publish(store, 19)
    publish(store, 20)

    refused, next_interval = claim(evaluations, 19, "b"), claim(evaluations, 20, "b")

    assert (refused.granted, refused.ask_again_s) == (False, None)
    assert "the interval from version 10 has been evaluated" in refused.reason
    assert next_interval.granted
    assert [evaluation.version for evaluation in evaluations.read().results] == [13]


def test_a_claim_without_result_expires_and_its_result_is_refused(
    board: Board, store: DirectoryWeightStore, clock: Clock
) -> None:
    evaluations = BoardEvaluations(board, store, clock=clock)
    publish(store, 0)
    assert claim(evaluations, 0).granted
    clock.advance(20)
    waits = claim(evaluations, 0, "b")
    clock.advance(40)
    assert claim(evaluations, 0, "b").granted

    with pytest.raises(Conflict, match="actor a has no claim on version 0"):
        evaluations.record(result(0))
    evaluations.record(result(0, actor_id="b"))

    assert (waits.granted, waits.ask_again_s, waits.reason) == (False, 40.0, "actor a evaluates version 0")
    assert [evaluation.actor_id for evaluation in evaluations.read().results] == ["b"]
    assert evaluations.read().running == []


def test_after_three_claims_that_came_to_nothing_an_interval_is_given_up(
    board: Board, store: DirectoryWeightStore, clock: Clock
) -> None:
    evaluations = BoardEvaluations(board, store, clock=clock)
    publish(store, 0)
    for _ in range(MAX_ATTEMPTS):
        assert claim(evaluations, 0).granted
        clock.advance(61)

    answer = claim(evaluations, 0)

    assert (answer.granted, answer.ask_again_s) == (False, None)
    assert answer.reason == "3 evaluations of the interval from version 0 came to nothing"


def test_the_best_version_and_the_one_under_evaluation_keep_their_weights(
    board: Board, store: DirectoryWeightStore
) -> None:
    evaluations = BoardEvaluations(board, store)
    for version, pass_1 in ((0, 0.2), (10, 0.6), (20, 0.6), (30, 0.4)):
        publish(store, version)
        assert claim(evaluations, version).granted
        evaluations.record(result(version, pass_1=pass_1))
    publish(store, 40)
    assert claim(evaluations, 40).granted
    publish(store, 41)
    publish(store, 42)

    assert evaluations.read().best_version == 10
    assert store.status().versions == [10, 40, 42]
    assert b"".join(store.blob(store.manifest(10).payloads[0].sha256)) == PAYLOAD + b"10"
    with pytest.raises(NotFound):
        store.manifest(20)


def test_a_claim_may_be_asked_for_again_when_its_answer_was_lost(board: Board, store: DirectoryWeightStore) -> None:
    evaluations = BoardEvaluations(board, store)
    publish(store, 0)

    answers = [claim(evaluations, 0, actor_id).granted for actor_id in ("a", "a", "b", "a")]

    assert answers == [True, True, False, True]


def test_evaluations_that_come_to_nothing_keep_no_weights(
    board: Board, store: DirectoryWeightStore, clock: Clock
) -> None:
    evaluations = BoardEvaluations(board, store, clock=clock)
    for interval in range(KEPT_INTERVALS + 5):
        publish(store, 10 * interval)
        assert claim(evaluations, 10 * interval).granted
        clock.advance(61)
    publish(store, 10_000)
    assert claim(evaluations, 10_000).granted
    publish(store, 10_001)

    assert store.status().versions == [10_000, 10_001]
    assert len(board.notes()) == KEPT_INTERVALS


def test_a_version_that_is_gone_cannot_be_claimed_and_the_interval_stays_free(
    board: Board, store: DirectoryWeightStore
) -> None:
    evaluations = BoardEvaluations(board, store)
    publish(store, 1)
    publish(store, 2)

    gone, there = claim(evaluations, 1), claim(evaluations, 2)

    assert (gone.granted, gone.ask_again_s) == (False, 0.0)
    assert "its weights could not be kept: version 1 is not stored" in gone.reason
    assert there.granted


def test_the_board_remembers_the_newest_intervals_and_the_best_one(board: Board, store: DirectoryWeightStore) -> None:
    evaluations = BoardEvaluations(board, store)
    for number in range(KEPT_INTERVALS + 5):
        publish(store, number)
        assert claim(evaluations, number, every_updates=1).granted
        evaluations.record(result(number, pass_1=0.9 if number == 2 else 0.5))

    board_now = evaluations.read()

    assert board_now.best_version == 2
    assert [evaluation.version for evaluation in board_now.results] == [2, *range(5, KEPT_INTERVALS + 5)]
    assert len(board.notes()) == 2 * (KEPT_INTERVALS + 1)
