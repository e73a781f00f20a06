"""What evaluations mean for the learner: results in the run's directory, the best version kept, an end without better.

| waits for | produces | unblocked by | on shutdown |
|---|---|---|---|
| a tick | lines of evaluations.jsonl; the best weights; the stop of a run without progress | the clock | a last look |
"""

import logging
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from buffer.errors import ServiceUnreachable, StalewiseError, StoreUnavailable
from buffer.evaluations import Evaluation, EvaluationBoard, Evaluations, best_version
from buffer.types import PolicyVersion
from learner.kept import KeptVersion
from learner.lines import append_lines, read_lines

log = logging.getLogger(__name__)

POLL_S = 2.0
"""Seconds between two looks; evaluations take longer than that."""


class EvaluationWatch:
    """A thread that follows the evaluations of a run. Entered and left by the learner's main thread."""

    def __init__(
        self,
        evaluations: Evaluations,
        path: Path,
        *,
        patience_evaluations: int | None,
        best_weights: KeptVersion | None,
        stop: threading.Event,
    ) -> None:
        """`best_weights` None = they stay in the weight store alone."""
        self._evaluations = evaluations
        self._path = path
        self._patience = patience_evaluations
        self._best_weights = best_weights
        self._not_kept: PolicyVersion | None = None  # the version that could not be kept, which was said
        self._stop = stop
        self._left = threading.Event()
        self._not_taken = ""  # why the last look came to nothing, which was said
        self._results = {
            evaluation.version: evaluation for evaluation in read_lines(path, Evaluation.model_validate_json)
        }
        self._thread = threading.Thread(target=self._run, name="evaluations", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()  # its clients give up on a service that is silent

    def _run(self) -> None:
        while True:
            left = self._left.wait(POLL_S)
            self.look()
            if left:
                return

    def look(self) -> None:
        """Write down what is new, keep the best version, and stop the run if nothing better came for long enough.

        What fails is said once, and tried again at the next look: results wait on the board.
        """
        try:
            self._take(self._evaluations.read())
            self._not_taken = ""
        except (ServiceUnreachable, StoreUnavailable):
            return  # the loop says so
        except (StalewiseError, OSError) as error:
            if str(error) != self._not_taken:
                log.warning("evaluations are not written down yet: %s", error)
                self._not_taken = str(error)
        if self._best_weights is not None and self._results:
            self._keep_best(self._best_weights)

    def _take(self, board: EvaluationBoard) -> None:
        """Write down what is new, and judge the run by it."""
        new = [evaluation for evaluation in board.results if evaluation.version not in self._results]
        if new:
            _append(self._path, new)
            self._results |= {evaluation.version: evaluation for evaluation in new}
            self._judge()

    def _keep_best(self, weights: KeptVersion) -> None:
        """Keep the best version; what fails is tried again at the next look."""
        best = best_version(self._results)
        assert best is not None
        try:
            weights.keep(best, self._results[best])
        except (StalewiseError, OSError) as error:
            if best != self._not_kept:
                log.warning("version %d, the best one, is not kept yet: %s", best, error)
                self._not_kept = best

    def _judge(self) -> None:
        best = best_version(self._results)
        assert best is not None
        later = sum(version > best for version in self._results)
        latest = self._results[max(self._results)]
        log.info(
            "version %d: pass@1 %.3f +- %.3f over %d prompts; best version %d with %.3f, %d evaluations ago",
            latest.version,
            latest.pass_at["1"],
            latest.pass_1_standard_error,
            latest.num_prompts,
            best,
            self._results[best].pass_at["1"],
            later,
        )
        if self._patience is not None and later >= self._patience and not self._stop.is_set():
            log.warning("no better evaluation than that of version %d in %d: the run ends", best, later)
            self._stop.set()


def _append(path: Path, evaluations: list[Evaluation]) -> None:
    with append_lines(path) as file:
        for evaluation in evaluations:
            file.write(evaluation.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
