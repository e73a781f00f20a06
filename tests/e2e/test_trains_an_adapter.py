"""LoRA through the whole loop: the learner trains and publishes adapters, the actors draw with them."""

from pathlib import Path

import pytest

from buffer.weights.directory_store import DirectoryWeightStore
from tests.e2e.demo_process import demo_process

UPDATES = 40
SETTINGS = {"learner.total_updates": UPDATES, "learner.lora.rank": 16, "learner.optimizer.lr": 4e-3}


@pytest.mark.e2e
@pytest.mark.timeout(200)
def test_actors_draw_with_the_adapters_that_the_learner_publishes(tmp_path: Path) -> None:
    with demo_process(tmp_path, SETTINGS) as demo:
        summary = demo.finish(timeout_s=180)
        latest = DirectoryWeightStore(demo.directory / "weights").latest()
    assert summary.updates == UPDATES
    assert summary.accuracy_after > summary.accuracy_before + 0.1
    assert latest is not None
    assert latest.version == UPDATES
    assert latest.adapter is not None
    assert latest.adapter.rank == 16
