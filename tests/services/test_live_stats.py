"""What `stalewise stats` shows comes from the service, not from the settings of whoever looks."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from buffer.connection import ServiceClient
from buffer.wire import LearnerReport
from services.live_stats import show_stats
from tests.services.live import NO_RETRY, make_context, serving


class OneLook(ServiceClient):
    """A client whose user presses Ctrl-C after the first look."""

    looks = 0

    def stats(self) -> dict[str, Any]:
        self.looks += 1
        if self.looks > 1:
            raise KeyboardInterrupt
        return super().stats()


def test_total_updates_are_the_run_s_own(tmp_path: Path) -> None:
    console = Console(width=120, record=True)
    with serving(make_context(tmp_path)) as url, closing(OneLook(url, settings=NO_RETRY)) as client:
        client.post_learner_metrics(LearnerReport(updates=7, total_updates=400, version=9, metrics={}))

        with pytest.raises(KeyboardInterrupt):
            show_stats(client, title="run", total_updates=1_000, console=console)

    assert "7 of 400" in console.export_text()
