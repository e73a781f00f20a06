"""Evaluations on a board that all API workers share: one result an interval, and the best version's weights kept.

claim:<first version of the interval>:<attempt>   a claim: who, which version, until when it counts
result:<first version of the interval>            the evaluation
"""

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from pydantic import FiniteFloat

from buffer.errors import Conflict, NotFound
from buffer.evaluations import (
    ClaimAnswer,
    Evaluation,
    EvaluationBoard,
    EvaluationClaim,
    RunningEvaluation,
    best_version,
)
from buffer.types import PolicyVersion, Record
from services.presence import Board

MAX_ATTEMPTS = 3
"""Claims of one interval: where three actors failed, a fourth will not be lucky."""
KEPT_INTERVALS = 64
"""Intervals that are remembered; the learner's directory has every result."""

_CLAIM, _RESULT = "claim:", "result:"


class PinnedWeights(Protocol):
    """A weight store that keeps some versions beyond its retention."""

    def pin(self, version: PolicyVersion) -> None:
        """Keep a stored version until it is unpinned. Raises NotFound."""
        ...

    def unpin(self, version: PolicyVersion) -> None:
        """Let retention take a version; one that is not pinned stays as it is."""
        ...


class _Claim(Record):
    actor_id: str
    version: PolicyVersion
    claimed_s: FiniteFloat
    lease_s: FiniteFloat


class BoardEvaluations:
    """Evaluations on a Board. Nothing waits here; every check-then-set is one `claim` of the board."""

    def __init__(self, board: Board, weights: PinnedWeights, *, clock: Callable[[], float] = time.time) -> None:
        self._board = board
        self._weights = weights
        self._clock = clock

    def claim(self, claim: EvaluationClaim) -> ClaimAnswer:
        """See Evaluations. A granted version is pinned: if it turns out to be the best, its weights are there.

        Repeating a granted claim is harmless: a retry after a lost answer.
        """
        interval = claim.version // claim.every_updates * claim.every_updates
        notes = self._board.notes()
        if f"{_RESULT}{interval}" in notes:
            return _refused(f"the interval from version {interval} has been evaluated")
        attempts = {name: note for name, note in notes.items() if name.startswith(f"{_CLAIM}{interval}:")}
        for note in attempts.values():
            other = _Claim.model_validate_json(note)
            left_s = other.claimed_s + other.lease_s - self._clock()
            if left_s > 0 and (other.actor_id, other.version) == (claim.actor_id, claim.version):
                return ClaimAnswer(granted=True, reason="")
            if left_s > 0:
                return _refused(f"actor {other.actor_id} evaluates version {other.version}", ask_again_s=left_s)
        if len(attempts) >= MAX_ATTEMPTS:
            return _refused(f"{len(attempts)} evaluations of the interval from version {interval} came to nothing")
        granted = _Claim(actor_id=claim.actor_id, version=claim.version, claimed_s=self._clock(), lease_s=claim.lease_s)
        name = f"{_CLAIM}{interval}:{len(attempts)}"
        if not self._board.claim(name, granted.model_dump_json()):
            return _refused("another actor was faster", ask_again_s=claim.lease_s)
        try:
            self._weights.pin(claim.version)
        except NotFound as error:
            self._board.drop([name])
            return _refused(f"its weights could not be kept: {error}", ask_again_s=0.0)
        self._let_go()  # of claims that came to nothing, too
        return ClaimAnswer(granted=True, reason="")

    def record(self, evaluation: Evaluation) -> None:
        """See Evaluations. Repeating the same result is harmless: a retry after a lost answer."""
        notes = self._board.notes()
        interval = self._interval_claimed_by(evaluation, notes)
        note = evaluation.model_dump_json()
        if not self._board.claim(f"{_RESULT}{interval}", note):
            if self._board.notes().get(f"{_RESULT}{interval}") != note:
                raise Conflict(f"the interval from version {interval} has been evaluated by another actor")
            return
        self._let_go()

    def read(self) -> EvaluationBoard:
        """See Evaluations."""
        notes = self._board.notes()
        results = _results(notes)
        return EvaluationBoard(
            results=[results[version] for version in sorted(results)],
            best_version=best_version(results),
            running=[
                RunningEvaluation(
                    actor_id=claim.actor_id, version=claim.version, age_s=max(0.0, self._clock() - claim.claimed_s)
                )
                for claim in _claims(notes).values()
                if self._is_running(claim.version, notes)
            ],
        )

    def _interval_claimed_by(self, evaluation: Evaluation, notes: Mapping[str, str]) -> int:
        """Return the interval whose newest claim is this actor's and this version's."""
        newest: dict[int, _Claim] = {}
        for (interval, _), claim in sorted(_claims(notes).items()):
            newest[interval] = claim
        for interval, claim in newest.items():
            if (claim.version, claim.actor_id) == (evaluation.version, evaluation.actor_id):
                return interval
        raise Conflict(
            f"actor {evaluation.actor_id} has no claim on version {evaluation.version}",
            hint="it took longer than its lease, and another actor has the claim now",
        )

    def _is_running(self, version: PolicyVersion, notes: Mapping[str, str]) -> bool:
        return any(
            claim.version == version
            and f"{_RESULT}{interval}" not in notes
            and self._clock() < claim.claimed_s + claim.lease_s
            for (interval, _), claim in _claims(notes).items()
        )

    def _let_go(self) -> None:
        """Unpin every version that is neither the best nor being evaluated, and forget old intervals."""
        notes = self._board.notes()
        best = best_version(_results(notes))
        for claimed in {claim.version for claim in _claims(notes).values()} | set(_results(notes)):
            if claimed != best and not self._is_running(claimed, notes):
                self._weights.unpin(claimed)
        self._forget(notes)

    def _forget(self, notes: Mapping[str, str]) -> None:
        """Drop the notes of intervals beyond KEPT_INTERVALS, but for the best one's."""
        results = {name: Evaluation.model_validate_json(note) for name, note in notes.items() if _is_result(name)}
        best = best_version({evaluation.version: evaluation for evaluation in results.values()})
        intervals = sorted({interval for interval, _ in _claims(notes)})[:-KEPT_INTERVALS]
        kept = {_number(name) for name, evaluation in results.items() if evaluation.version == best}
        old = [name for name in notes if _number(name) in set(intervals) - kept]
        if old:
            self._board.drop(old)


def _refused(reason: str, *, ask_again_s: float | None = None) -> ClaimAnswer:
    return ClaimAnswer(granted=False, reason=reason, ask_again_s=ask_again_s)


def _is_result(name: str) -> bool:
    return name.startswith(_RESULT)


def _number(name: str) -> int:
    return int(name.split(":")[1])


def _claims(notes: Mapping[str, str]) -> dict[tuple[int, int], _Claim]:
    """Return the claims by interval and attempt."""
    return {
        (_number(name), int(name.split(":")[2])): _Claim.model_validate_json(note)
        for name, note in notes.items()
        if name.startswith(_CLAIM)
    }


def _results(notes: Mapping[str, str]) -> dict[PolicyVersion, Evaluation]:
    found = [Evaluation.model_validate_json(note) for name, note in notes.items() if _is_result(name)]
    return {evaluation.version: evaluation for evaluation in found}
