"""`stalewise stats`: the live numbers of a running service in the terminal."""

import time

from rich.console import Console
from rich.live import Live

from buffer.client import ServiceClient
from services.progress import Snapshot, screen

POLL_S = 1.0
_HISTORY = 60


def show_stats(client: ServiceClient, *, title: str, total_updates: int, console: Console) -> None:
    """Redraw the numbers every second until Ctrl-C. Raises ServiceUnreachable when the service goes away.

    `total_updates` is shown until the run's learner says how many it will do.
    """
    started_s = time.monotonic()
    history: list[Snapshot] = []
    with Live(console=console, auto_refresh=False) as live:
        while True:
            stats = client.stats()
            total_updates = (stats["learner"] or {}).get("total_updates") or total_updates
            history = [*history, Snapshot.from_stats(stats, seconds=time.monotonic() - started_s)][-_HISTORY:]
            live.update(screen(history, title=title, total_updates=total_updates, events=()), refresh=True)
            time.sleep(POLL_S)
