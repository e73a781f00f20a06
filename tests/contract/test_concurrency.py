"""Many callers at once: each call is whole, and the counters are what the calls add up to."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from buffer.rate_limiter import RateLimiterSettings
from buffer.selectors import Weighted
from buffer.table import TableSettings
from buffer.weighting import PriorityWeighting
from tests.contract.conftest import TableFactory
from tests.contract.helpers import draw, insert
from tests.factories import make_group

CALLERS = 8


def test_one_id_inserted_by_many_at_once_is_accepted_once(make_table: TableFactory) -> None:
    table = make_table(limiter=RateLimiterSettings(min_size=1, error_buffer=2))
    insert(table, *map(make_group, "abc"))  # the limiter holds every further insert

    with ThreadPoolExecutor(CALLERS) as pool:
        held = list(pool.map(lambda _: insert(table, make_group("x")), range(CALLERS)))
        draw(table, 1)
        outcomes = list(pool.map(lambda _: insert(table, make_group("x")), range(CALLERS)))

    assert held == [["full"]] * CALLERS
    assert Counter(outcome for (outcome,) in outcomes) == {"accepted": 1, "duplicate": CALLERS - 1}
    assert table.stats().num_groups == 4


def test_inserts_draws_and_priorities_by_many_at_once_are_all_done_and_counted(make_table: TableFactory) -> None:
    table = make_table(TableSettings(weighting=PriorityWeighting()))
    insert(table, make_group("first"))

    def live(number: int) -> tuple[list[str], int, int]:
        outcomes = insert(table, make_group(f"g{number}"))
        drawn = draw(table, 1, Weighted(by="priority"))
        return outcomes, len(drawn), table.update_priorities({f"g{number}": float(number)}).updated

    with ThreadPoolExecutor(CALLERS) as pool:
        lives = list(pool.map(live, range(40)))

    assert lives == [(["accepted"], 1, 1)] * 40
    stats = table.stats()
    assert (stats.num_groups, stats.inserted_total, stats.sampled_total) == (41, 41, 40)
    assert sum(uses * groups for uses, groups in stats.stored_uses.items()) == 40
