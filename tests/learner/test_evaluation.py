"""What the learner does about evaluations: it writes them down once, and ends a run that gets no better."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from buffer.errors import ServiceUnreachable, StalewiseError, Unauthorized
from buffer.evaluations import ClaimAnswer, Evaluation, EvaluationBoard, EvaluationClaim, best_version
from learner.evaluation import EvaluationWatch
from learner.kept import KeptVersion
from tests.services.test_evaluations import result


@dataclass
class _Board:
    """Evaluations as a service tells them; it can be away, or refuse to."""

    results: list[Evaluation] = field(default_factory=list)
    away: bool = False
    refusal: StalewiseError | None = None

    def claim(self, claim: EvaluationClaim) -> ClaimAnswer:
        raise AssertionError("a learner evaluates nothing")

    def record(self, evaluation: Evaluation) -> None:
        self.results.append(evaluation)

    def read(self) -> EvaluationBoard:
        if self.away:
            raise ServiceUnreachable("nobody answers")
        if self.refusal is not None:
            raise self.refusal
        best = best_version({evaluation.version: evaluation for evaluation in self.results})
        return EvaluationBoard(results=self.results, best_version=best, running=[])


def _watch(
    board: _Board, path: Path, stop: threading.Event, *, patience: int | None = 2, best: KeptVersion | None = None
) -> EvaluationWatch:
    return EvaluationWatch(board, path, patience_evaluations=patience, best_weights=best, stop=stop)


def _versions(path: Path) -> list[int]:
    return [Evaluation.model_validate_json(line).version for line in path.read_text().splitlines()]


def test_a_run_ends_after_so_many_evaluations_without_a_new_best_also_across_a_restart(tmp_path: Path) -> None:
    path, stop = tmp_path / "learner" / "evaluations.jsonl", threading.Event()
    board = _Board([result(0, pass_1=0.3), result(10, pass_1=0.5), result(20, pass_1=0.5)])
    first = _watch(board, path, stop)
    first.look()
    first.look()
    board.away = True
    first.look()
    board.away = False
    assert _versions(path) == [0, 10, 20]
    assert not stop.is_set()
    with path.open("a") as file:
        file.write('{"actor_id":"a","ver')  # the learner was killed here

    resumed = _watch(board, path, stop)
    board.record(result(30, pass_1=0.4))
    resumed.look()

    assert stop.is_set()
    assert path.read_text().splitlines()[3] == '{"actor_id":"a","ver'
    assert Evaluation.model_validate_json(path.read_text().splitlines()[4]).version == 30
    assert len(path.read_text().splitlines()) == 5


def test_without_patience_nothing_ends_and_the_last_look_is_at_the_end(tmp_path: Path) -> None:
    stop, board = threading.Event(), _Board()
    with _watch(board, tmp_path / "evaluations.jsonl", stop, patience=None):
        for version in range(5):
            board.record(result(version, pass_1=0.5 - version / 10))

    assert _versions(tmp_path / "evaluations.jsonl") == [0, 1, 2, 3, 4]
    assert not stop.is_set()


@pytest.mark.parametrize("refusal", [Unauthorized("the token is unknown"), StalewiseError("a defect")])
def test_a_service_that_refuses_is_said_once_and_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refusal: StalewiseError
) -> None:
    path, board = tmp_path / "evaluations.jsonl", _Board([result(0, pass_1=0.5)], refusal=refusal)
    watch = _watch(board, path, threading.Event())

    watch.look()
    watch.look()
    board.refusal = None
    watch.look()

    said = [message for message in caplog.messages if "not written down" in message]
    assert said == [f"evaluations are not written down yet: {refusal}"]
    assert _versions(path) == [0]


def test_results_that_the_disk_refused_are_written_and_counted_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, stop = tmp_path / "evaluations.jsonl", threading.Event()
    board = _Board([result(0, pass_1=0.5), result(1, pass_1=0.4), result(2, pass_1=0.4)])
    watch = _watch(board, path, stop)
    path.mkdir()  # what cannot be written to

    watch.look()
    watch.look()
    stopped_unwritten = stop.is_set()
    path.rmdir()
    watch.look()

    (warning,) = [message for message in caplog.messages if "not written down" in message]
    assert "Is a directory" in warning
    assert not stopped_unwritten
    assert stop.is_set()
    assert _versions(path) == [0, 1, 2]
