"""A service in this process, as most HTTP tests want it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from buffer.rate_limiter import RateLimiterSettings
from services.context import ServiceContext, ServiceSettings
from tests.services.live import make_context, serving


@pytest.fixture
def context(tmp_path: Path) -> ServiceContext:
    """A service with version 0 published to its table, a small body limit, and a limiter that lets two groups in."""
    context = make_context(
        tmp_path,
        settings=ServiceSettings(max_body_bytes=20_000, max_blob_bytes=4096),
        limiter=RateLimiterSettings(min_size=1, error_buffer=2),
    )
    context.table.advance_version(0)
    return context


@pytest.fixture
def http(context: ServiceContext) -> Iterator[httpx.Client]:
    with serving(context) as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def shared_http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service that the tests of a module share: for requests that change nothing."""
    context = make_context(tmp_path_factory.mktemp("shared"), settings=ServiceSettings(max_body_bytes=20_000))
    context.table.advance_version(0)
    with serving(context) as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client
