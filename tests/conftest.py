"""Collaborators that several packages of tests need: a clock that stands still, a real Redis, object storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer.redis_server import RedisSettings, redis_server
from tests.object_storage import object_storage


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that make the long tests longer than in `make test`; budgets are counted, never timed."""
    parser.addoption("--chaos-kills", type=int, default=5, help="kills of each chaos test (make test-chaos: 100)")
    parser.addoption("--chaos-seed", type=int, default=1, help="whom they hit, and when")
    parser.addoption("--cluster", action="store_true", help="the tests on a Redis Cluster, too (make test-cluster)")
    parser.addoption("--compile", action="store_true", help="run what starts a C++ compiler (make test-compile)")
    parser.addoption("--distributed", action="store_true", help="run what starts torchrun (make test-distributed)")
    parser.addoption("--fuzz-scale", type=float, default=1.0, help="executions of the fuzzers (make test-fuzz: 60)")


class Clock:
    """A time that moves when a test says so; seconds since 1970."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a Redis that all tests of the session share; each test leaves it empty."""
    directory: Path = tmp_path_factory.mktemp("redis")
    with redis_server(directory, RedisSettings(appendfsync="everysec")) as url:
        yield url


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The url of an object storage that all tests of the session share; each takes a prefix of its own."""
    with object_storage() as url:
        yield url
