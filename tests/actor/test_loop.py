import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from actor.engine import Completion, GenerationRequest
from actor.evaluate import Evaluator
from actor.judge import Judge
from actor.loop import ActorLoop
from actor.receiver import FollowingReceiver
from actor.rollout import Rollouts
from actor.settings import ActorSettings, EvaluationSettings
from actor.spool import Spool
from actor.status import Activity, Status
from actor.tasks import RunningSums
from actor.torch_engine import TorchEngine
from actor.weight_sync import WeightSync
from buffer.client import Submission
from buffer.codec import encode_group
from buffer.errors import CorruptWeights, EngineUnreachable, ServiceUnreachable, StalewiseError
from buffer.fingerprint import model_fingerprint
from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import SampleRequest, TableSettings
from buffer.types import Group, InsertOutcome, Split
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.follower import Follower
from services.evaluations import BoardEvaluations
from services.presence import MemoryBoard
from tests.actor.publishing import WrongEngine, publish, wait_until
from tests.factories import RUN_ID, make_group

SETTINGS = ActorSettings(
    group_size=3, groups_per_batch=2, max_new_tokens=6, poll_s=0.2, retry_s=0.02, heartbeat_s=0.05, stall_s=0.2
)


class TableInbox:
    """A service without HTTP: it can be away, and it can lose its answer after it stored."""

    def __init__(self, table: MemoryTable) -> None:
        self.table = table
        self.away = False
        self.lost_answers = 0
        self.offered: list[str] = []

    def submit(self, groups: Sequence[Group]) -> Submission:
        if self.away:
            raise ServiceUnreachable("nobody answers")
        results = self.table.insert(groups)
        self.offered += [r.group_id for r in results if r.outcome is not InsertOutcome.FULL]
        if self.lost_answers:
            self.lost_answers -= 1
            raise ServiceUnreachable("the answer was lost")
        return Submission(results=results, retry_after_s=0.02)

    @property
    def inserted(self) -> int:
        return self.table.stats().inserted_total


@dataclass
class Actor:
    """One actor in this process, on a real engine, store and table."""

    directory: Path
    model_dir: Path
    tokenizer: PreTrainedTokenizerFast
    settings: ActorSettings = SETTINGS
    limiter: RateLimiterSettings = field(default_factory=lambda: RateLimiterSettings(error_buffer=1e9))
    table_settings: TableSettings = field(default_factory=TableSettings)
    engine_class: type[WrongEngine] = WrongEngine
    task_class: type[RunningSums] = RunningSums

    def __post_init__(self) -> None:
        self.inbox = TableInbox(MemoryTable(self.table_settings, self.limiter, RUN_ID))
        self.inbox.table.advance_version(10)
        self.store = DirectoryWeightStore(self.directory / "weights")
        self.status = Status(time.monotonic)
        self.stop = threading.Event()
        self.engine = self.engine_class(self.model_dir, seed=5)
        self.evaluations = BoardEvaluations(MemoryBoard(), self.store)
        self.task = self.task_class(self.tokenizer, num_digits=4)
        self.judge = Judge(self.task, run_id=RUN_ID, max_unscored_groups=3)
        self.ended_with: Exception | None = None
        self.sync = WeightSync(
            store=self.store,
            engine=self.engine,
            run_id=RUN_ID,
            model_fingerprint=model_fingerprint(self.model_dir),
            receiver=FollowingReceiver(Follower(self.store, self.directory), self.engine),
            settings=self.settings,
            stop=self.stop,
            jitter=random.Random(0),
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the loop and the weight sync in threads, and stop them at the end."""
        spool = Spool(self.directory / "spool", max_bytes=self.settings.spool_bytes)
        self.spool = spool
        loop = ActorLoop(
            evaluator=Evaluator(
                engine=self.engine,
                judge=self.judge,
                evaluations=self.evaluations,
                settings=self.settings,
                actor_id="a",
                solved_reward=1.0,
                stop=self.stop,
            ),
            rollouts=Rollouts(
                engine=self.engine,
                judge=self.judge,
                settings=self.settings,
                rng=np.random.default_rng(0),
            ),
            inbox=self.inbox,
            spool=spool,
            sync=self.sync,
            status=self.status,
            settings=self.settings,
            stop=self.stop,
            now=time.monotonic,
            jitter=random.Random(0),
        )

        def run() -> None:
            try:
                loop.run()
            except Exception as error:  # noqa: BLE001  raised by running()
                self.ended_with = error

        main = threading.Thread(target=run)
        self.sync.start()
        main.start()
        try:
            yield
        finally:
            self.stop.set()
            main.join(30.0)
            self.sync.join(30.0)
            spool.close()
            assert not main.is_alive()
            if self.ended_with is not None:
                raise self.ended_with

    @property
    def state(self) -> str:
        return self.status.heartbeat(0).state


@pytest.fixture
def actor(tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> Actor:
    return Actor(tmp_path, model_dir, tokenizer)


def inserted_while_drawing(actor: Actor) -> int:
    """Draw one group if the limiter lets us, as a learner would; return how many were inserted so far."""
    request = SampleRequest(num_groups=1, learner_version=10, request_id=f"r{time.monotonic_ns()}")
    actor.inbox.table.sample(request)
    return actor.inbox.inserted


def stored(actor: Actor) -> list[Group]:
    """Return all groups that were accepted."""
    return [actor.inbox.table.get(group_id) for group_id in dict.fromkeys(actor.inbox.offered)]


def test_groups_arrive_whole_with_their_version_and_their_own_ids(actor: Actor, keyframes: list[Path]) -> None:
    publish(actor.store, actor.model_dir, keyframes[0], 3)

    with actor.running():
        wait_until(lambda: actor.inbox.inserted >= 6)

    groups = stored(actor)
    assert len(groups) == actor.inbox.inserted
    for group in groups:
        digits = group.prompt_id.removeprefix("running_sums:")
        assert len(group.trajectories) == SETTINGS.group_size
        for trajectory in group.trajectories:
            assert actor.tokenizer.decode(trajectory.prompt_ids) == f"{digits}="
            assert [span.version for span in trajectory.spans] == [3]
            assert trajectory.sampling == SETTINGS.sampling
    assert actor.status.outcomes == {InsertOutcome.ACCEPTED: actor.inbox.inserted}


def test_a_full_table_pauses_generation_and_nothing_is_spooled_or_lost(
    tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, keyframes: list[Path]
) -> None:
    actor = Actor(tmp_path, model_dir, tokenizer, limiter=RateLimiterSettings(min_size=1, error_buffer=3))
    publish(actor.store, model_dir, keyframes[0], 0)

    with actor.running():
        wait_until(lambda: actor.state == Activity.WAITING_ADMISSION)
        admitted = actor.inbox.inserted
        refused_before = actor.inbox.table.stats().outcomes["full"]
        wait_until(lambda: actor.inbox.table.stats().outcomes["full"] >= refused_before + 5)
        assert actor.inbox.inserted == admitted
        assert actor.spool.num_groups == 0
        assert actor.status.heartbeat(0).tokens_per_s == 0
        wait_until(lambda: inserted_while_drawing(actor) >= admitted + 3)

    assert len(set(actor.inbox.offered)) == len(actor.inbox.offered) == actor.inbox.inserted


def test_groups_of_an_outage_are_spooled_and_drained_in_order_without_doubles(
    actor: Actor, keyframes: list[Path]
) -> None:
    publish(actor.store, actor.model_dir, keyframes[0], 0)

    with actor.running():
        wait_until(lambda: actor.inbox.inserted >= 2)
        actor.inbox.away = True
        wait_until(lambda: actor.spool.num_groups >= 6)
        assert actor.state in (Activity.SPOOLING, Activity.WAITING_SERVICE)
        spooled = [group.group_id for group in list(actor.spool.oldest(6))]
        before = len(actor.inbox.offered)
        actor.inbox.lost_answers = 2
        actor.inbox.away = False
        wait_until(lambda: actor.spool.num_groups == 0 and actor.inbox.inserted > before + 8)

    order = list(dict.fromkeys(actor.inbox.offered[before:]))
    assert order[:6] == spooled
    assert actor.inbox.inserted == len(set(actor.inbox.offered))
    assert actor.status.outcomes[InsertOutcome.DUPLICATE] > 0  # stored, but the answer was lost
    assert actor.status.outcomes["dropped"] == 0


def test_a_full_spool_pauses_generation(
    tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, keyframes: list[Path]
) -> None:
    settings = SETTINGS.model_copy(update={"spool_bytes": 8000})
    actor = Actor(tmp_path, model_dir, tokenizer, settings=settings)
    publish(actor.store, model_dir, keyframes[0], 0)
    actor.inbox.away = True

    with actor.running():
        wait_until(lambda: actor.state == Activity.WAITING_SERVICE)
        actor.status.heartbeat(0)
        time.sleep(0.2)
        assert actor.status.heartbeat(0).tokens_per_s == 0
        assert 0 < actor.spool.num_bytes <= 8000
        actor.inbox.away = False
        wait_until(lambda: actor.spool.num_groups == 0 and actor.inbox.inserted > 8)

    assert actor.inbox.inserted == len(set(actor.inbox.offered))


def test_what_a_killed_actor_left_in_its_spool_is_delivered_first(actor: Actor, keyframes: list[Path]) -> None:
    left = Spool(actor.directory / "spool", max_bytes=1 << 20)
    left.append([make_group(f"left{i}") for i in range(5)])
    left.close()

    with actor.running():
        wait_until(lambda: actor.inbox.inserted == 5)  # before any weights came
        publish(actor.store, actor.model_dir, keyframes[0], 0)
        wait_until(lambda: actor.inbox.inserted > 5)

    assert actor.inbox.offered[:5] == [f"left{i}" for i in range(5)]
    assert encode_group(actor.inbox.table.get("left0")) == encode_group(make_group("left0"))


def test_a_spool_that_meets_a_full_table_waits_and_loses_nothing(
    tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    left = Spool(tmp_path / "spool", max_bytes=1 << 20)
    left.append([make_group(f"left{i}") for i in range(9)])
    left.close()
    actor = Actor(tmp_path, model_dir, tokenizer, limiter=RateLimiterSettings(min_size=1, error_buffer=3))

    with actor.running():
        wait_until(lambda: actor.state == Activity.WAITING_ADMISSION)
        assert 0 < actor.inbox.inserted < 9
        wait_until(lambda: inserted_while_drawing(actor) == 9)
        wait_until(lambda: actor.spool.num_groups == 0)

    assert [group.group_id for group in stored(actor)] == [f"left{i}" for i in range(9)]


def test_a_refused_group_of_the_spool_does_not_block_the_rest(actor: Actor) -> None:
    left = Spool(actor.directory / "spool", max_bytes=1 << 20)
    left.append([make_group("other", run_id="another-run"), make_group("mine")])
    left.close()

    with actor.running():
        wait_until(lambda: actor.inbox.inserted == 1)

    assert actor.status.outcomes == {InsertOutcome.INVALID: 1, InsertOutcome.ACCEPTED: 1}
    assert len(list((actor.directory / "spool").glob("*.refused"))) == 1


def test_nothing_is_submitted_while_the_engine_is_quarantined(actor: Actor, keyframes: list[Path]) -> None:
    publish(actor.store, actor.model_dir, keyframes[0], 0)
    actor.engine.wrong_file = keyframes[2]

    with actor.running():
        wait_until(lambda: actor.inbox.inserted >= 2)
        actor.engine.wrong_loads = 10_000
        publish(actor.store, actor.model_dir, keyframes[1], 1)
        wait_until(lambda: actor.state == Activity.QUARANTINED)
        submitted = len(actor.inbox.offered)
        failures = actor.sync.failures_total
        wait_until(lambda: actor.sync.failures_total >= failures + 2)
        assert len(actor.inbox.offered) == submitted
        actor.engine.wrong_loads = 0
        wait_until(lambda: len(actor.inbox.offered) > submitted)

    drawn = [trajectory for group in stored(actor) for trajectory in group.trajectories]
    assert {span.version for trajectory in drawn for span in trajectory.spans} == {0, 1}
    clean = TorchEngine(actor.model_dir, seed=0)
    for version in (0, 1):
        clean.load(keyframes[version], version)
        for trajectory in drawn:
            if {span.version for span in trajectory.spans} == {version}:
                scores = clean.score(np.concatenate([trajectory.prompt_ids, trajectory.response_ids]))
                expected = scores[len(trajectory.prompt_ids) - 1 :]
                np.testing.assert_allclose(trajectory.behavior_logprobs, expected, atol=3e-5)


def test_a_stop_while_waiting_drops_whole_groups_and_ends(
    tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, keyframes: list[Path]
) -> None:
    settings = SETTINGS.model_copy(update={"spool_bytes": 0})
    actor = Actor(tmp_path, model_dir, tokenizer, settings=settings)
    publish(actor.store, model_dir, keyframes[0], 0)
    actor.inbox.away = True

    with actor.running():
        wait_until(lambda: actor.state == Activity.WAITING_SERVICE)

    assert actor.status.outcomes == {"dropped": SETTINGS.groups_per_batch}
    assert actor.inbox.inserted == 0


def test_an_evaluation_is_of_one_version_whatever_is_published_meanwhile(
    tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, keyframes: list[Path]
) -> None:
    evaluation = EvaluationSettings(every_updates=2, num_prompts=24, samples_per_prompt=3)
    actor = Actor(tmp_path, model_dir, tokenizer, settings=SETTINGS.model_copy(update={"evaluation": evaluation}))

    with actor.running():
        for version in range(8):
            publish(actor.store, model_dir, keyframes[version % 3], version)
        wait_until(lambda: len(actor.evaluations.read().results) >= 2 and actor.inbox.inserted > 0)

    results = actor.evaluations.read().results
    assert [(r.oldest_version, r.newest_version) for r in results] == [(r.version, r.version) for r in results]
    assert len({result.version // 2 for result in results}) == len(results)
    assert {(r.num_prompts, r.samples_per_prompt, tuple(r.pass_at)) for r in results} == {(24, 3, ("1", "2"))}
    evaluated = [group for group in stored(actor) if group.split is Split.EVAL]
    assert len(evaluated) == actor.inbox.table.stats().num_eval == 24 * len(results)


@pytest.mark.parametrize("error", [EngineUnreachable("it is gone"), CorruptWeights("it was started again")])
def test_an_engine_that_fails_in_an_evaluation_costs_the_actor_that_evaluation_alone(
    tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, keyframes: list[Path], error: StalewiseError
) -> None:
    evaluation = EvaluationSettings(every_updates=1, num_prompts=2, samples_per_prompt=5)
    failures = [error]

    class Failing(WrongEngine):
        """An engine that fails at the first evaluation: two prompts five times."""

        def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
            if len(requests) == 10 and failures:
                raise failures.pop()
            return super().generate(requests)

    settings = SETTINGS.model_copy(update={"evaluation": evaluation})
    actor = Actor(tmp_path, model_dir, tokenizer, settings=settings, engine_class=Failing)
    publish(actor.store, model_dir, keyframes[0], 0)

    with actor.running():
        wait_until(lambda: actor.inbox.inserted >= 2)
        publish(actor.store, model_dir, keyframes[1], 1)
        wait_until(lambda: len(actor.evaluations.read().results) == 1)

    assert not failures
    assert [result.version for result in actor.evaluations.read().results] == [1]
