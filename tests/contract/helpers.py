"""Short forms of the calls that the contract suite makes again and again."""

import itertools

from buffer.codec import encode_group
from buffer.selectors import Fifo, Selector
from buffer.table import ReplayTable, SampleRequest
from buffer.types import Group, Sample
from tests.factories import make_group

FIFO = Fifo()
_request_numbers = itertools.count()


def insert(table: ReplayTable, *groups: Group) -> list[str]:
    """Insert groups in one call and return the outcomes."""
    return [result.outcome.value for result in table.insert(groups)]


def draw(
    table: ReplayTable,
    num_groups: int,
    selector: Selector = FIFO,
    *,
    learner_version: int = 0,
    request_id: str | None = None,
) -> list[Sample]:
    """Ask for one draw, under a request id of its own unless one is given."""
    request = SampleRequest(
        num_groups=num_groups,
        learner_version=learner_version,
        request_id=request_id or f"request-{next(_request_numbers)}",
        selector=selector,
    )
    return table.sample(request)


def ids(samples: list[Sample]) -> list[str]:
    """Return the group ids of a draw, in its order."""
    return [sample.group.group_id for sample in samples]


def size_bytes(group_id: str) -> int:
    """Return the encoded size of make_group(group_id)."""
    return len(encode_group(make_group(group_id)))
