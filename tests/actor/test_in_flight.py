import itertools
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from actor.engine import Completion, GenerationRequest
from actor.status import Activity
from buffer.rate_limiter import RateLimiterSettings
from tests.actor.publishing import WrongEngine, publish, wait_until
from tests.actor.test_loop import SETTINGS, Actor, inserted_while_drawing, stored


class Gated(WrongEngine):
    """An engine whose calls of `generate` wait for a gate or fail, by their number."""

    def __init__(self, model_dir: Path, *, seed: int) -> None:
        super().__init__(model_dir, seed=seed)
        self.gates: dict[int, threading.Event] = {}
        self.failures: dict[int, Exception] = {}
        self.begun: list[Sequence[GenerationRequest]] = []
        self.ended: list[int] = []
        self._numbers = itertools.count()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        number = next(self._numbers)
        self.begun.append(requests)
        if number in self.failures:
            raise self.failures[number]
        assert number not in self.gates or self.gates[number].wait(30)
        drawn = super().generate(requests)
        self.ended.append(number)
        return drawn


@pytest.fixture
def several(
    tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, keyframes: list[Path]
) -> tuple[Actor, Gated]:
    """An actor with three batches in flight."""
    settings = SETTINGS.model_copy(update={"batches_in_flight": 3})
    actor = Actor(tmp_path, model_dir, tokenizer, settings=settings, engine_class=Gated)
    publish(actor.store, model_dir, keyframes[0], 0)
    assert isinstance(actor.engine, Gated)
    return actor, actor.engine


def test_a_long_batch_holds_up_no_other_and_each_is_submitted_once(several: tuple[Actor, Gated]) -> None:
    actor, engine = several
    engine.gates[0] = threading.Event()

    with actor.running():
        wait_until(lambda: actor.inbox.inserted >= 8)
        assert 0 not in engine.ended
        engine.gates[0].set()
        wait_until(lambda: 0 in engine.ended)

    assert len(set(actor.inbox.offered)) == len(actor.inbox.offered)
    assert actor.inbox.inserted == len(engine.ended) * SETTINGS.groups_per_batch
    prompts = {tuple(group.trajectories[0].prompt_ids) for group in stored(actor)}
    assert {tuple(request.prompt_ids) for request in engine.begun[0]} <= prompts


@pytest.mark.parametrize("away", [False, True])
def test_a_stop_submits_or_spools_every_batch_in_flight_that_is_whole(several: tuple[Actor, Gated], away: bool) -> None:
    actor, engine = several
    engine.gates = dict.fromkeys(range(3), actor.stop)
    actor.inbox.away = away

    with actor.running():
        wait_until(lambda: len(engine.begun) == 3)
        assert actor.inbox.inserted == 0

    spooled = len(list((actor.directory / "spool").glob("*.group")))
    assert (actor.inbox.inserted, spooled) == ((0, 6) if away else (6, 0))
    assert len(engine.begun) == 3
    assert actor.status.outcomes["dropped"] == 0


def test_a_batch_that_fails_ends_the_actor_with_its_error_and_the_others_are_delivered(
    several: tuple[Actor, Gated],
) -> None:
    actor, engine = several
    engine.gates = {0: actor.stop, 2: actor.stop}
    engine.failures[1] = MemoryError("out of memory")

    def run_to_its_end() -> None:
        with actor.running():
            wait_until(lambda: actor.ended_with is not None)

    with pytest.raises(MemoryError, match="out of memory"):
        run_to_its_end()

    assert actor.inbox.inserted == 4


def test_a_full_table_holds_every_batch_in_flight(
    tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, keyframes: list[Path]
) -> None:
    settings = SETTINGS.model_copy(update={"batches_in_flight": 3})
    limiter = RateLimiterSettings(min_size=1, error_buffer=3)
    actor = Actor(tmp_path, model_dir, tokenizer, settings=settings, limiter=limiter, engine_class=Gated)
    publish(actor.store, model_dir, keyframes[0], 0)
    assert isinstance(actor.engine, Gated)
    engine = actor.engine

    with actor.running():
        wait_until(lambda: actor.inbox.table.stats().outcomes.get("full", 0) >= 5)
        wait_until(lambda: len(engine.ended) == len(engine.begun))
        admitted, begun = actor.inbox.inserted, len(engine.begun)
        refused_before = actor.inbox.table.stats().outcomes["full"]
        wait_until(lambda: actor.inbox.table.stats().outcomes["full"] >= refused_before + 5)
        assert (actor.inbox.inserted, len(engine.begun), actor.state) == (admitted, begun, Activity.WAITING_ADMISSION)
        wait_until(lambda: inserted_while_drawing(actor) >= admitted + 8)

    assert len(set(actor.inbox.offered)) == len(actor.inbox.offered) == actor.inbox.inserted
