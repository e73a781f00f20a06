"""The loop over a real table in this process: what it waits for, publishes, drops and leaves behind."""

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from buffer.errors import InvalidSettings
from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import SampleRequest, TableSettings, Wait
from buffer.trained import TrainedGroup
from buffer.types import Group, Sample
from learner.admission import Admission, Refusal
from learner.checkpoint import Checkpoints
from learner.loop import LearnerLoop, take_up
from learner.publisher import Publisher
from learner.sampling import Prefetcher, selector_schedule
from learner.settings import LearnerSettings
from learner.step import Progress, Trainer
from tests.factories import RUN_ID, make_group, make_trajectory
from tests.learner.builders import VOCAB, as_sample, make_trainer
from tests.learner.stores import AtOnce, ListedStore


@dataclass
class _Reporter:
    """Remembers what it was told, and stops the loop when told so."""

    stop: threading.Event
    stop_after: int = 1_000
    stop_at_wait: bool = False
    updates: list[tuple[Progress, Mapping[str, float]]] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    trained: list[TrainedGroup] = field(default_factory=list)
    counts: Mapping[str, float] = field(default_factory=dict)
    """The last that came with a wait or a skipped update."""

    def update(self, progress: Progress, metrics: Mapping[str, float], trained: Sequence[TrainedGroup]) -> None:
        self.updates.append((progress, metrics))
        self.trained.extend(trained)
        if len(self.updates) >= self.stop_after:
            self.stop.set()

    def waiting(self, progress: Progress, wait: Wait, counts: Mapping[str, float]) -> None:
        self.waits.append(wait)
        self.counts = counts
        if self.stop_at_wait:
            self.stop.set()

    def skipped(self, progress: Progress, counts: Mapping[str, float]) -> None:
        self.counts = counts


class LoopRig:
    """A learner over a MemoryTable whose version follows the weight store, as a service's does."""

    def __init__(
        self,
        model_dir: Path,
        tmp_path: Path,
        *,
        settings: LearnerSettings,
        gate: int | None = None,
        table: TableSettings | None = None,
    ) -> None:
        self.settings = settings
        self.stop = threading.Event()
        limiter = RateLimiterSettings(samples_per_insert=4, min_size=2, error_buffer=1_000)
        self.table = MemoryTable(table or TableSettings(), limiter, RUN_ID)
        self.store = ListedStore(published=self.table.advance_version)
        self.trainer: Trainer = make_trainer(model_dir)
        self.publisher = Publisher(
            self.store,
            run_id=RUN_ID,
            model_fingerprint="f" * 64,
            keyframe_every=3,
            executor=AtOnce(),
            unix_time=time.time,
        )
        self.checkpoints = Checkpoints(tmp_path, keep=2, model_fingerprint="f" * 64, resolved_settings={})
        self.reporter = _Reporter(self.stop)
        self.gate = gate
        self.requests: list[SampleRequest] = []

    def insert(self, *groups: Group) -> None:
        assert {result.outcome.value for result in self.table.insert(groups)} == {"accepted"}

    def draw(self, request: SampleRequest) -> list[Sample]:
        self.requests.append(request)
        return self.table.sample(request)

    def loop(self) -> LearnerLoop:
        prefetcher = Prefetcher(
            self.draw,
            self.table.stats,
            self.settings,
            clock=lambda: self.trainer.progress.clock,
            schedule=selector_schedule(self.settings, updates_done=self.trainer.progress.updates),
            request_prefix=uuid.uuid4().hex,  # another learner process
            now=time.monotonic,
        )
        return LearnerLoop(
            trainer=self.trainer,
            prefetcher=prefetcher,
            admission=Admission(max_age_updates=self.gate, vocab_size=VOCAB, max_positions=64),
            publisher=self.publisher,
            checkpoints=self.checkpoints,
            reporter=self.reporter,
            settings=self.settings,
            stop=self.stop,
            now=time.monotonic,
        )


def loop_settings(**changes: object) -> LearnerSettings:
    return LearnerSettings.model_validate(
        {
            "groups_per_update": 2,
            "total_updates": 4,
            "optimizer": {"warmup_updates": 0},
            "selector": {"kind": "uniform"},
        }
        | changes
    )


def test_version_0_is_published_before_anything_and_each_update_after_it(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings())
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))

    rig.loop().run()

    assert sorted(rig.store.manifests) == [0, 1, 2, 3, 4]
    assert rig.store.events[1] == "manifest 0"
    assert [progress.updates for progress, _ in rig.reporter.updates] == [1, 2, 3, 4]
    assert rig.checkpoints.newest() == tmp_path / "update-00000004"


def test_versions_may_have_gaps_but_the_last_one_is_always_published(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(publish_every=3, checkpoint_every=2))
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))

    rig.loop().run()

    assert sorted(rig.store.manifests) == [0, 3, 4]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["update-00000002", "update-00000004"]


def test_a_learner_without_data_says_what_it_waits_for_and_stops_when_told(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings())
    rig.reporter.stop_at_wait = True

    rig.loop().run()

    (wait,) = rig.reporter.waits
    assert wait.who == "learner"
    assert wait.since_s >= 1
    assert "a batch of 2 groups" in wait.reason
    assert "0 groups stored" in wait.reason
    assert rig.checkpoints.newest() == tmp_path / "update-00000000"


def test_a_wait_longer_than_stall_s_is_a_warning_and_is_counted(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(stall_s=1.0))
    rig.reporter.stop_at_wait = True

    rig.loop().run()

    assert rig.reporter.counts == {"stall/warnings_total": 1}
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "0 groups stored" in warning.getMessage()


def test_a_stop_finishes_the_step_publishes_and_saves(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=1_000, publish_every=100))
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))
    rig.reporter.stop_after = 3

    rig.loop().run()

    assert rig.trainer.progress == Progress(3, 3)
    assert sorted(rig.store.manifests) == [0, 3]
    assert rig.checkpoints.newest() == tmp_path / "update-00000003"


def test_groups_that_aged_over_the_gate_while_prefetched_are_dropped_and_counted(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The third batch was drawn within the gate of 1 update; when its turn comes its data are 2 updates old."""
    rig = LoopRig(
        model_dir, tmp_path, settings=loop_settings(prefetch_batches=2, groups_per_update=1, total_updates=3), gate=1
    )
    rig.table.advance_version(0)
    rig.insert(*(make_group(f"g{number}", version=0) for number in range(8)))
    loop = rig.loop()
    original = rig.reporter.update

    def update(progress: Progress, metrics: Mapping[str, float], trained: Sequence[TrainedGroup]) -> None:
        original(progress, metrics, trained)
        if progress.updates == 2:
            rig.insert(make_group("fresh", version=2))

    rig.reporter.update = update  # type: ignore[method-assign]  # the table gets fresh data at a certain update
    loop.run()

    ages = [metrics["age/updates_max"] for _, metrics in rig.reporter.updates]
    assert ages[:2] == [0, 1]
    assert all(age <= 1 for age in ages)
    dropped = rig.reporter.updates[-1][1]["dropped/over_age_groups_total"]
    assert dropped >= 1
    assert "2 updates old, the gate is at 1" in caplog.text


def test_a_draw_that_is_lost_for_good_is_counted_and_made_anew(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first answer does not arrive, its groups left when other ones took their room."""
    table = TableSettings(capacity_groups=2, repeat_max_bytes=1)
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=1), table=table)
    rig.table.advance_version(0)
    rig.insert(*(make_group(name) for name in "ab"))
    answer = rig.table.sample

    def lossy(request: SampleRequest) -> list[Sample]:
        samples = answer(request)
        if len(rig.requests) > 1:
            return samples
        rig.insert(*(make_group(name) for name in "cd"))
        return answer(request)

    rig.table.sample = lossy  # type: ignore[method-assign]  # a network that loses an answer
    rig.loop().run()

    (update,) = (metrics for _, metrics in rig.reporter.updates)
    assert update["dropped/lost_draws_total"] == 1
    assert rig.requests[1].request_id == f"{rig.requests[0].request_id}-after-1-lost"
    assert "drawing anew" in caplog.text


def test_data_that_the_model_cannot_read_is_refused_by_name() -> None:
    admission = Admission(max_age_updates=None, vocab_size=VOCAB, max_positions=6)
    groups = [
        make_group("good", trajectories=[make_trajectory(prompt_ids=[5], response_ids=[VOCAB - 1])]),
        make_group("token", trajectories=[make_trajectory(prompt_ids=[5], response_ids=[VOCAB])]),
        make_group("long", trajectories=[make_trajectory(prompt_ids=[5, 5, 5, 5], response_ids=[8, 9, 2])]),
        make_group("future", version=9, trajectories=[make_trajectory(version=9, prompt_ids=[5], response_ids=[2])]),
    ]

    admitted, refused, sentences = admission.split([as_sample(group) for group in groups], clock=4)

    assert [sample.group.group_id for sample in admitted] == ["good"]
    assert refused == {Refusal.UNKNOWN_TOKEN: 1, Refusal.TOO_LONG: 1, Refusal.FROM_THE_FUTURE: 1}
    assert sentences == [
        "group token is not trained on: token id 24, the model has 24",
        "group long is not trained on: 7 tokens, the model has 6 positions",
        "group future is not trained on: it claims version 9, the learner is at 4",
    ]


def test_one_fresh_batch_is_followed_by_replayed_ones_also_after_a_resume() -> None:
    settings = loop_settings(selector={"kind": "fresh"}, replay_updates=2, replay_selector={"kind": "uniform"})

    begun, resumed = selector_schedule(settings, updates_done=0), selector_schedule(settings, updates_done=4)

    assert [next(begun).kind for _ in range(7)] == ["fresh", "uniform", "uniform"] * 2 + ["fresh"]
    assert [next(resumed).kind for _ in range(3)] == ["uniform", "uniform", "fresh"]


def test_replay_cannot_ask_for_groups_that_were_never_handed_out() -> None:
    with pytest.raises(ValueError, match="replay_selector is `fresh`"):
        loop_settings(replay_selector={"kind": "fresh"}, replay_updates=1)


def test_every_draw_has_its_own_request_and_keeps_it_while_it_waits(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=2, prefetch_batches=0))
    rig.reporter.stop_at_wait = True
    rig.loop().run()
    assert len({(request.request_id, request.learner_version) for request in rig.requests}) == 1 < len(rig.requests)


def test_without_prefetch_a_batch_is_drawn_when_the_step_before_is_done(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=3, prefetch_batches=0))
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))

    rig.loop().run()

    assert [request.learner_version for request in rig.requests] == [0, 1, 2]
    assert len({request.request_id for request in rig.requests}) == 3


def test_a_run_goes_on_above_the_latest_version_and_publishes_at_once(model_dir: Path, tmp_path: Path) -> None:
    first = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=5, checkpoint_every=2))
    first.table.advance_version(0)
    first.insert(make_group("a"), make_group("b"))
    first.reporter.stop_after = 3
    first.loop().run()
    for path in tmp_path.glob("update-00000003/*"):
        path.unlink()
    (tmp_path / "update-00000003").rmdir()  # as if it had been killed before the last checkpoint

    second = LoopRig(model_dir, tmp_path, settings=first.settings)
    second.table, second.store = first.table, first.store
    second.publisher = first.publisher
    with pytest.raises(InvalidSettings, match=r"begun before: latest published version 3.*--resume"):
        take_up(second.trainer, second.checkpoints, second.publisher, resume=False)
    take_up(second.trainer, second.checkpoints, second.publisher, resume=True)
    assert second.trainer.progress == Progress(updates=2, clock=4)
    second.loop().run()

    assert sorted(first.store.manifests) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert second.reporter.updates[0][0] == Progress(updates=3, clock=5)
    assert second.trainer.progress == Progress(updates=5, clock=7)
    assert first.store.manifests[4].checksum == first.store.manifests[2].checksum != first.store.manifests[3].checksum


def test_a_resumed_run_that_gets_no_further_leaves_its_checkpoint_as_it_is(model_dir: Path, tmp_path: Path) -> None:
    first = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=1))
    first.table.advance_version(0)
    first.insert(make_group("a"), make_group("b"))
    first.loop().run()
    state = tmp_path / "update-00000001" / "state.json"
    written = state.stat()

    second = LoopRig(model_dir, tmp_path, settings=first.settings)
    take_up(second.trainer, second.checkpoints, second.publisher, resume=True)
    second.loop().run()

    assert (state.stat().st_ino, state.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_a_new_run_starts_at_0_whether_or_not_it_may_resume(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings())
    for resume in (False, True):
        take_up(rig.trainer, rig.checkpoints, rig.publisher, resume=resume)
    assert rig.trainer.progress == Progress(0, 0)
