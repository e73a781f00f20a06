"""Where the learner's batches come from."""

from contextlib import ExitStack, closing

import pytest

from buffer.connection import ServiceClient
from buffer.errors import InvalidSettings, StoreUnavailable
from buffer.redis_client import connect
from buffer.redis_shards import open_table
from buffer.table import SampleRequest
from services.learner_service import sample_source
from services.settings import load_config
from tests.factories import RUN_ID, make_group
from tests.services.live import NO_RETRY

REQUEST = SampleRequest(num_groups=1, learner_version=0, request_id="r")
DIRECT = [f"run.name={RUN_ID}", "service.samples_from_redis=true", "limiter.min_size=16"]


def test_a_learner_on_a_trusted_network_draws_from_redis_itself(redis_url: str) -> None:
    config = load_config(None, overrides=[*DIRECT, f"service.redis_url={redis_url}"])
    with connect(redis_url) as client, ExitStack() as stack:
        client.flushdb()
        table = open_table(client, config.table, config.limiter, RUN_ID)
        table.advance_version(0)
        unused = stack.enter_context(closing(ServiceClient("http://127.0.0.1:1", settings=NO_RETRY)))
        source = sample_source(config, unused, stack)

        before = source.draw(REQUEST)
        table.insert([make_group(f"g{i}") for i in range(16)])
        drawn = source.draw(REQUEST)

        assert before == []
        assert [sample.group.group_id for sample in drawn] == ["g0"]
        assert source.stats().sampled_total == 1


def test_a_lost_redis_is_a_named_error_once_the_budget_is_spent() -> None:
    config = load_config(None, overrides=[*DIRECT, "service.redis_url=redis://127.0.0.1:1/0"])
    with ExitStack() as stack:
        client = stack.enter_context(closing(ServiceClient("http://127.0.0.1:1", settings=NO_RETRY)))

        with pytest.raises(StoreUnavailable, match="Redis does not answer"):
            sample_source(config, client, stack).draw(REQUEST)


def test_the_own_redis_of_a_service_cannot_be_read_from() -> None:
    config = load_config(None, overrides=DIRECT)
    with ExitStack() as stack:
        client = stack.enter_context(closing(ServiceClient("http://127.0.0.1:1", settings=NO_RETRY)))

        with pytest.raises(InvalidSettings, match="redis_url is not"):
            sample_source(config, client, stack)
