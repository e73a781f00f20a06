"""What one process of a service does beside answering: the janitor, the history, and the watch over our own Redis.

| loop | waits for | produces | unblocked by | on shutdown |
|---|---|---|---|---|
| janitor (janitor.py) | a tick | removals of what is overdue | the clock | nothing |
| history (history.py) | a tick | a point of the charts | the clock | nothing |
| watch | a tick | the end of the service when our own Redis has died | the clock | nothing |
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import redis

from buffer.errors import StoreUnavailable
from buffer.redis_client import RedisClient
from services.context import ServiceContext
from services.history import keep_history, observe
from services.janitor import keep_tidy
from services.stats import service_stats

_REDIS_CHECK_S = 1.0
_REDIS_DEAD_AFTER = 3
"""Failed checks in a row after which our own Redis is dead; a supervisor then starts service and Redis anew."""


@asynccontextmanager
async def keeping_house(
    context: ServiceContext, own_redis: RedisClient | None, *, fail: Callable[[StoreUnavailable], None]
) -> AsyncIterator[None]:
    """Run the loops above within a block; `fail` is called once, when `own_redis` (None = not ours) has died."""
    tick_s = context.settings.janitor_tick_s
    loops = [
        asyncio.create_task(keep_tidy(context.table, tick_s=tick_s)),
        asyncio.create_task(keep_history(context.history, lambda: observe(service_stats(context)))),
    ]
    if own_redis is not None:
        loops.append(asyncio.create_task(_watch(own_redis, fail)))
    try:
        yield
    finally:
        for loop in loops:
            loop.cancel()


async def _watch(own_redis: RedisClient, fail: Callable[[StoreUnavailable], None]) -> None:
    """End the service when our own Redis has died: nobody else would start it again."""
    failures = 0
    while failures < _REDIS_DEAD_AFTER:
        await asyncio.sleep(_REDIS_CHECK_S)
        try:
            await asyncio.to_thread(own_redis.ping)
            failures = 0
        except redis.exceptions.TimeoutError:
            continue  # busy is not dead
        except redis.exceptions.ConnectionError as error:
            failures += 1
            if failures == _REDIS_DEAD_AFTER:
                fail(StoreUnavailable(f"our own Redis has died: {error}", hint="start the service again"))
        except redis.exceptions.ResponseError:
            failures = 0  # it lives, and cannot write to its disk: requests are told so
