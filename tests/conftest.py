"""Collaborators that several packages of tests need: a clock that stands still, and a real Redis."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer.redis_server import RedisSettings, redis_server


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
