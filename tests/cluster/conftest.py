"""The tests on a cluster run when asked for: `make test-cluster`."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.cluster.nodes import Cluster
from tests.factories import RUN_ID
from tests.services.live import ServeProcess

NUM_SHARDS = 3


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Skip them otherwise."""
    if not config.getoption("cluster"):
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="run `make test-cluster`"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with closing(Cluster(tmp_path / "cluster", RUN_ID, NUM_SHARDS)) as cluster:
        yield cluster


@pytest.fixture
def serve(cluster: Cluster, tmp_path: Path) -> Iterator[ServeProcess]:
    process = ServeProcess(
        tmp_path,
        f"service.redis_url={cluster.url}",
        "service.workers=2",
        f"table.shards={NUM_SHARDS}",
        'table.weighting={"by": "priority", "exponent": 1.0}',
        "limiter.min_size=4",
        "learner.groups_per_update=4",
        "limiter.error_buffer=1e9",
    )
    yield process
    process.stop()
