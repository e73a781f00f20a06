"""The janitor: what is due by the clock, done whether or not anybody calls. Every API worker may have one.

| loop | waits for | produces | unblocked by | on shutdown |
|---|---|---|---|---|
| janitor | a tick | removals by TTL and age gate, closed partial groups, inserts of sealed ones | the clock | nothing |
"""

import asyncio
import logging

from buffer.errors import StoreUnavailable
from buffer.table import ServedTable

log = logging.getLogger(__name__)


async def keep_tidy(table: ServedTable, *, tick_s: float) -> None:
    """Tidy the table every `tick_s` seconds until cancelled. Each step of it is atomic, so none is ever half."""
    while True:
        await asyncio.sleep(tick_s)
        try:
            await asyncio.to_thread(table.tidy)
        except StoreUnavailable as error:
            log.warning("the janitor skips a tick: %s", error)
        except Exception:  # a defect of ours: the janitor would die unseen, and overdue groups would stay for ever
            log.exception("the janitor could not tidy")
