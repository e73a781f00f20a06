"""Every shipped recipe loads, and its parts fit together."""

from pathlib import Path

import pytest

from buffer.rate_limiter import check_request, check_settings
from buffer.table import SampleRequest
from learner.objectives.recipes import build_objective
from services.settings import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_loads_and_neither_objective_nor_limiter_refuses_it(path: Path) -> None:
    config = load_config(path)

    objective = build_objective(config.learner.objective.name, config.learner.objective.options)
    check_settings(config.table, config.limiter)
    check_request(
        SampleRequest(
            num_groups=config.learner.groups_per_update,
            learner_version=0,
            request_id="first",
            selector=config.learner.selector,
        ),
        config.limiter,
    )

    assert objective.name == config.learner.objective.name


def test_the_demo_asks_for_data_that_is_old_by_its_buffer_settings() -> None:
    config = load_config(ROOT / "recipes" / "demo.toml")

    age_updates = config.limiter.min_size / config.learner.groups_per_update * config.limiter.samples_per_insert

    assert config.learner.selector.kind == "fifo"
    assert age_updates >= 16
    assert (ROOT / config.run.model / "model.safetensors").is_file()
