"""MemoryTable and RedisTable, driven by the same random history, answer the same; and somebody may always move."""

import random
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from buffer.codec import encode_group
from buffer.errors import InvalidRequest, StalewiseError
from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings, check_request
from buffer.redis_client import connect
from buffer.redis_table import RedisTable
from buffer.selectors import Fifo, Fresh, Lifo, Mix, Selector, Uniform, Weighted
from buffer.table import SampleRequest, ServedTable, TableSettings
from buffer.types import SampleInfo, Split
from buffer.weighting import DifficultyWeighting, PriorityWeighting, RankWeighting, RecencyWeighting, Weighting
from tests.conftest import Clock
from tests.factories import RUN_ID, make_group, parts_of

GROUP_BYTES = len(encode_group(make_group("g000", rewards=(0.0,))))

limiters = st.builds(
    lambda spi, min_size, slack: RateLimiterSettings(
        samples_per_insert=spi, min_size=min_size, error_buffer=2 * max(1.0, spi) + slack
    ),
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]),
    st.integers(1, 5),
    st.sampled_from([0.0, 1.5, 8.0]),
)
selectors: st.SearchStrategy[Selector] = st.sampled_from(
    [Fifo(), Lifo(), Uniform(), Fresh(), Mix(fresh=0.25), Mix(fresh=0.5, rest=Fifo()), Mix(fresh=0.5, rest=Lifo())]
)
weightings: st.SearchStrategy[Weighting | None] = st.sampled_from(
    [
        None,
        PriorityWeighting(),
        RecencyWeighting(half_life_updates=0.05),
        RecencyWeighting(half_life_updates=3.0),
        DifficultyWeighting(),
        RankWeighting(decay_per_use=0.25),
        RankWeighting(cool_down_updates=2),
    ]
)


@st.composite
def tables(draw: st.DrawFn, limiter: RateLimiterSettings) -> TableSettings:
    """Draw settings that are legal together with `limiter`."""
    reuse = draw(st.one_of(st.none(), st.integers(0, 2)))
    return TableSettings(
        capacity_groups=limiter.min_size + draw(st.integers(0, 4)),
        capacity_bytes=GROUP_BYTES * draw(st.sampled_from([3, 7, 1000])),
        max_age_updates=draw(st.sampled_from([None, 0, 2])),
        reuse_limit=None if reuse is None else int(-(-limiter.samples_per_insert // 1)) + reuse,
        ttl_s=draw(st.sampled_from([None, 50.0])),
        foreign_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        dedup_window_s=draw(st.sampled_from([20.0, 1e6])),
        repeat_window_s=15.0,
        repeat_max_bytes=GROUP_BYTES * draw(st.sampled_from([1, 3, 1000])),
        partial_group_timeout_s=40.0,
        partial_max_groups=draw(st.sampled_from([2, 100])),
        partial_max_bytes=GROUP_BYTES * draw(st.sampled_from([4, 1000])),
        weighting=draw(weightings),
        max_prompts=draw(st.sampled_from([2, 1000])),
    )


def rounded(info: SampleInfo) -> SampleInfo:
    """Return an info whose probability is the same on any libm."""
    return info.model_copy(update={"probability": float(f"{info.probability:.9g}")})


def outcome_of(call: Callable[[], Any]) -> Any:
    """Return what a call answers, or the error that it raises, as a value that two tables can be compared by."""
    try:
        return call()
    except StalewiseError as error:
        return type(error), str(error)


class Tables(RuleBasedStateMachine):
    """One history, two tables."""

    redis_url: str

    @initialize(data=st.data(), limiter=limiters)
    def start(self, data: st.DataObject, limiter: RateLimiterSettings) -> None:
        self.limiter, self.clock, self.version, self.number, self.requests = limiter, Clock(), 0, 0, 0
        self.settings = data.draw(tables(limiter))
        self.client = connect(self.redis_url)
        self.client.flushdb()
        self.memory = MemoryTable(self.settings, limiter, RUN_ID, clock=self.clock, rng=random.Random(3))
        self.redis = RedisTable(self.client, self.settings, limiter, RUN_ID, clock=self.clock, rng=random.Random(3))
        self.both(lambda table: table.advance_version(0))

    def teardown(self) -> None:
        self.client.close()

    def both(self, call: Callable[[ServedTable], Any]) -> Any:
        memory, on_redis = outcome_of(lambda: call(self.memory)), outcome_of(lambda: call(self.redis))
        assert memory == on_redis
        return memory

    def insert_new(self, **fields: Any) -> str:
        self.number += 1
        prompt_id = f"p{self.number % 4}"
        values: dict[str, Any] = {"rewards": (0.5,), "version": self.version, "prompt_id": prompt_id} | fields
        group = make_group(f"g{self.number:03}", **values)
        result: str = self.both(lambda table: table.insert([group]))[0].outcome.value
        return result

    def draw(self, num_groups: int, selector: Selector, *, ahead: int = 0) -> Any:
        self.requests += 1
        request = SampleRequest(
            num_groups=num_groups,
            learner_version=self.version + ahead,
            request_id=f"r{self.requests}",
            selector=selector,
        )
        self.last = request
        return self.both(lambda table: [(s.group.group_id, rounded(s.info)) for s in table.sample(request)])

    @rule(times=st.integers(1, 4))
    def insert(self, times: int) -> None:
        for _ in range(times):
            self.insert_new()

    @rule(rewards=st.sampled_from([(0.25,), (1.0, -0.5), (0.0,) * 6]), behind=st.integers(-1, 3))
    def insert_other_sizes_and_versions(self, rewards: tuple[float, ...], behind: int) -> None:
        self.insert_new(rewards=rewards, version=max(0, self.version - behind))

    @rule(split=st.sampled_from(Split))
    def insert_foreign(self, split: Split) -> None:
        self.insert_new(version=None, split=split)

    @rule()
    def insert_eval(self) -> None:
        self.insert_new(split=Split.EVAL)

    @precondition(lambda self: self.number > 0)
    @rule(back=st.integers(0, 6), reward=st.sampled_from([0.5, 0.75]))
    def insert_known_id(self, back: int, reward: float) -> None:
        group = make_group(f"g{max(1, self.number - back):03}", rewards=(reward,), version=self.version)
        self.both(lambda table: table.insert([group]))

    @rule(
        name=st.sampled_from(["p0", "p1", "p2", "g001"]),
        size=st.integers(1, 4),
        member=st.integers(0, 3),
        behind=st.integers(-1, 2),
    )
    def insert_part(self, name: str, size: int, member: int, behind: int) -> None:
        part = parts_of(name, size=size, version=max(0, self.version - behind))[member % size]
        self.both(lambda table: table.insert_parts([part]))

    @rule()
    def tidy(self) -> None:
        self.both(lambda table: table.tidy())

    @rule(name=st.sampled_from(["p0", "p1", "p2"]))
    def get_assembled(self, name: str) -> None:
        self.both(lambda table: encode_group(table.get(name)))

    @rule(num_groups=st.integers(1, 6), selector=selectors, ahead=st.integers(0, 2))
    def sample(self, num_groups: int, selector: Selector, ahead: int) -> None:
        drawn = self.draw(num_groups, selector, ahead=ahead)
        if isinstance(drawn, list):
            assert len({group_id for group_id, _ in drawn}) == len(drawn)
            assert len(drawn) in (0, num_groups)

    @precondition(lambda self: self.requests > 0)
    @rule()
    def repeat_the_last_request(self) -> None:
        self.both(lambda table: [(s.group.group_id, rounded(s.info)) for s in table.sample(self.last)])

    @rule(num_groups=st.integers(1, 4), fresh=st.sampled_from([None, 0.5]), ahead=st.integers(0, 2))
    def sample_by_weight(self, num_groups: int, fresh: float | None, ahead: int) -> None:
        by = "priority" if self.settings.weighting is None else self.settings.weighting.by
        rest = Weighted(by=by)
        self.sample(num_groups=num_groups, selector=rest if fresh is None else Mix(fresh=fresh, rest=rest), ahead=ahead)

    @rule(back=st.lists(st.integers(0, 8), max_size=4), priority=st.sampled_from([0.0, 1e-6, 0.5, 2.0, 1e12, -1.0]))
    def post_priorities(self, back: list[int], priority: float) -> None:
        posted = {f"g{max(1, self.number - i):03}": priority for i in back}
        self.both(lambda table: table.update_priorities(posted))

    @rule(cursor=st.sampled_from(["", "p1", "p9"]), limit=st.integers(0, 3))
    def browse_prompts(self, cursor: str, limit: int) -> None:
        self.both(lambda table: table.prompts(cursor, limit))

    @rule(updates=st.sampled_from([0, 1, 2, 3, 40]))
    def publish(self, updates: int) -> None:
        self.version += updates
        self.both(lambda table: table.advance_version(self.version))

    @rule(seconds=st.sampled_from([1, 10, 31, 60]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(back=st.integers(0, 6))
    def get(self, back: int) -> None:
        self.both(lambda table: encode_group(table.get(f"g{max(1, self.number - back):03}")))

    @rule(num_groups=st.integers(1, 5), selector=selectors, weighted=st.booleans())
    def somebody_may_move(self, num_groups: int, selector: Selector, weighted: bool) -> None:
        if weighted and self.settings.weighting is not None:
            selector = Weighted(by=self.settings.weighting.by)
        request = SampleRequest(num_groups=num_groups, learner_version=0, request_id="x", selector=selector)
        try:
            check_request(request, self.limiter)
        except InvalidRequest:
            return
        if self.draw(num_groups, selector) == [] and self.insert_new() == "full":
            assert self.draw(num_groups, selector) != [], "both sides are blocked"

    @invariant()
    def counters_agree(self) -> None:
        if self.number or self.requests:
            stats = self.both(lambda table: table.stats())
            waiting = {wait.who for wait in stats.waits}
            assert waiting != {"learner", "actors"}


@pytest.mark.timeout(300)
def test_memory_and_redis_agree_and_never_block_both_sides(redis_url: str) -> None:
    machine = type("TablesOnRedis", (Tables,), {"redis_url": redis_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
