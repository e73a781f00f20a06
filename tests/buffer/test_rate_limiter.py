"""The limiter's arithmetic, against Reverb's definition and against every state it can be in."""

import hypothesis.strategies as st
import pytest
from hypothesis import assume, example, given, settings
from pydantic import ValidationError

from buffer.errors import InvalidRequest
from buffer.rate_limiter import Pace, RateLimiterSettings, check_request, draw_blocked, may_insert
from buffer.selectors import Fifo, Fresh, Mix, Selector, Uniform, draw_ranks, num_fresh
from buffer.table import SampleRequest

profile = settings(max_examples=500, deadline=None, derandomize=True, database=None)


def request(num_groups: int, selector: Selector) -> SampleRequest:
    return SampleRequest(num_groups=num_groups, learner_version=0, request_id="r", selector=selector)


class ReverbSampleToInsertRatio:
    """Reverb's limiter (reverb/cc/rate_limiter.cc): the cursor inserts x ratio - samples stays between two bounds."""

    def __init__(self, ratio: float, min_size: int, error_buffer: float) -> None:
        self._ratio, self._min_size = ratio, min_size
        offset = ratio * min_size
        self._min_diff, self._max_diff = offset - error_buffer, offset + error_buffer

    def can_insert(self, size: int, inserts: int, samples: int) -> bool:
        return size < self._min_size or (inserts + 1) * self._ratio - samples <= self._max_diff

    def can_sample(self, size: int, inserts: int, samples: int, num_samples: int) -> bool:
        return size >= self._min_size and inserts * self._ratio - samples - num_samples >= self._min_diff


@profile
@given(
    ratio=st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.0]),
    min_size=st.integers(1, 9),
    slack=st.floats(0, 20),
    size=st.integers(0, 20),
    inserts=st.integers(0, 60),
    samples=st.integers(0, 300),
    num_groups=st.integers(1, 9),
)
def test_both_sides_decide_as_reverb_does(
    ratio: float, min_size: int, slack: float, size: int, inserts: int, samples: int, num_groups: int
) -> None:
    assume(num_groups <= min_size)
    buffer = 2 * max(1.0, ratio) + slack
    limiter = RateLimiterSettings(samples_per_insert=ratio, min_size=min_size, error_buffer=buffer)
    reverb = ReverbSampleToInsertRatio(ratio, min_size, buffer)
    pace = Pace(sampleable=size, fresh=size, inserted=inserts, sampled=samples)

    assert may_insert(limiter, pace) == reverb.can_insert(size, inserts, samples)
    blocked = draw_blocked(limiter, pace, num_groups, 0, num_eligible=size)
    assert (blocked == "") == reverb.can_sample(size, inserts, samples, num_groups)


@profile
@given(
    ratio=st.floats(0.1, 9),
    min_size=st.integers(1, 20),
    slack=st.floats(0, 20),
    sampleable=st.integers(0, 40),
    used=st.integers(0, 40),
    inserted=st.integers(-50, 200),
    sampled=st.integers(0, 900),
    num_groups=st.integers(1, 20),
    selector=st.sampled_from([Fifo(), Uniform(), Fresh(), Mix(fresh=0.3), Mix(fresh=0.9, rest=Fifo())]),
)
@example(2.0, 4, 0.0, 4, 4, 16, 16, 4, Mix(fresh=0.5))
def test_a_blocked_legal_draw_always_leaves_the_insert_open(
    ratio: float,
    min_size: int,
    slack: float,
    sampleable: int,
    used: int,
    inserted: int,
    sampled: int,
    num_groups: int,
    selector: Selector,
) -> None:
    limiter = RateLimiterSettings(samples_per_insert=ratio, min_size=min_size, error_buffer=2 * max(1.0, ratio) + slack)
    try:
        check_request(request(num_groups, selector), limiter)
    except InvalidRequest:
        assume(False)
    wanted = num_fresh(selector, num_groups)
    pace = Pace(sampleable=sampleable, fresh=max(0, sampleable - used), inserted=inserted, sampled=sampled)

    blocked = draw_blocked(limiter, pace, num_groups, wanted, num_eligible=sampleable)

    if blocked:
        assert may_insert(limiter, pace._replace(wanted_fresh=wanted if blocked == "fresh" else 0))


@pytest.mark.parametrize(("ratio", "error_buffer", "smallest"), [(1.0, 1.9, "2"), (0.25, 1.0, "2"), (4.0, 7.5, "8")])
def test_error_buffer_that_could_block_both_sides_is_refused(ratio: float, error_buffer: float, smallest: str) -> None:
    with pytest.raises(ValidationError, match=f"error_buffer={error_buffer:g} must be at least {smallest} "):
        RateLimiterSettings(samples_per_insert=ratio, error_buffer=error_buffer)


@pytest.mark.parametrize("setting", [{"min_size": 0}, {"min_size": -1}, {"samples_per_insert": 0.0}])
def test_a_limiter_that_could_never_let_anything_pass_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="greater than"):
        RateLimiterSettings.model_validate(setting)


@pytest.mark.parametrize(
    ("selector", "num_groups", "expected"),
    [
        (Fifo(), 8, 0),
        (Uniform(), 8, 0),
        (Fresh(), 8, 8),
        (Mix(fresh=0.25), 8, 2),
        (Mix(fresh=0.01), 8, 1),
        (Mix(fresh=0.5), 1, 1),
        (Mix(fresh=0.5), 3, 2),
    ],
)
def test_fresh_share_is_whole_groups_and_at_least_one(selector: Selector, num_groups: int, expected: int) -> None:
    assert num_fresh(selector, num_groups) == expected


def test_ranks_by_hand() -> None:
    # ranks 0 1 2 3 4; the taken 1 swaps to the front: 1 0 2 3 4; lot 0.5 of the last four picks 3, which swaps with 0:
    # 1 3 2 0 4; lot 0 of the last three picks 2, lot 0.4 the 0
    assert draw_ranks([1], 5, [0.5, 0.0, 0.4]) == [3, 2, 0]
    assert draw_ranks([], 4, [0.99, 0.99, 0.99, 0.99]) == [3, 0, 1, 2]


@profile
@given(data=st.data(), total=st.integers(1, 30))
def test_ranks_are_distinct_and_never_the_taken_ones(data: st.DataObject, total: int) -> None:
    taken = sorted(data.draw(st.sets(st.integers(0, total - 1))))
    lots = data.draw(st.lists(st.floats(0, 1, exclude_max=True), max_size=total - len(taken)))

    drawn = draw_ranks(taken, total, lots)

    assert len({*drawn, *taken}) == len(lots) + len(taken)
    assert all(0 <= rank < total for rank in drawn)


def test_every_ordered_pair_is_drawn_once_over_a_grid_of_lots() -> None:
    grid = [((i + 0.5) / 4, (j + 0.5) / 3) for i in range(4) for j in range(3)]

    pairs = [tuple(draw_ranks([2], 5, lots)) for lots in grid]

    others = [0, 1, 3, 4]
    assert sorted(pairs) == [(one, other) for one in others for other in others if one != other]
