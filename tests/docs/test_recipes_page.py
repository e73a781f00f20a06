"""docs/recipes.md: its numbers are the study's, its settings load, its own objective is one."""

import math
import re

import pytest

from learner.objectives import recipes
from learner.objectives.pieces import pieces
from learner.objectives.recipe import Recipe
from services.settings import load_config
from tests.docs.conftest import REPOSITORY
from tests.learner.objectives.batches import one_batch

PAGE = (REPOSITORY / "docs/recipes.md").read_text()
STUDY = (REPOSITORY / "docs/staleness.md").read_text()


def table(name: str) -> dict[str, list[str]]:
    """Return the rows of a table of the study by their methods."""
    found = re.search(rf"<!-- results: {name} -->\n(.*?)<!-- /results -->", STUDY, re.DOTALL)
    assert found is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines() if line]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_what_the_page_calls_measured_is_what_the_study_says() -> None:
    lags = table("main")
    column = lags.pop("method").index("lag 128")
    cells = {name: row[column] for name, row in lags.items()} | {name: row[2] for name, row in table("others").items()}

    quoted = re.findall(r"`(\w+)` (\d+\.\d)(\*?)", PAGE.split("Why `stalewise`")[0])

    assert len(quoted) > 20
    for name, median, star in quoted:
        final, _, _, _, runs = cells[name].replace(",", "").replace("(", "").replace(")", "").split()
        assert (median, star) == (final, "*" if runs == "1" else ""), f"{name}: copy it from docs/staleness.md"


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.selector={kind = 'fresh'}", "limiter.samples_per_insert=1"],
        [
            "table.weighting={by = 'recency', half_life_updates = 8}",
            "learner.selector={kind = 'weighted', by = 'recency'}",
        ],
        [
            "learner.selector={kind = 'fresh'}",
            "learner.replay_updates=3",
            "limiter.samples_per_insert=4",
            "table.reuse_limit=4",
        ],
    ],
    ids=["fresh", "recency", "reval"],
)
def test_the_knobs_of_the_page_go_with_the_demo(overrides: list[str]) -> None:
    load_config(REPOSITORY / "recipes/demo.toml", overrides=overrides)


def test_the_objective_of_the_page_computes_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"<!-- test:objective -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    namespace: dict[str, object] = {"__name__": "example"}
    exec(found[1], namespace)
    recipe = namespace["CappedBad"]
    assert isinstance(recipe, type)
    assert issubclass(recipe, Recipe)
    monkeypatch.setitem(recipes.RECIPES, recipe.name, recipe)
    objective = recipes.build_objective("capped_bad", {"cap": 0.5})
    tokens = one_batch(policy=[[0.5], [0.9, 0.2]], behavior=[[0.25], [0.3, 0.4]], rewards=[1.0, 0.0], group=[0, 0])

    loss = objective(tokens, {})

    advantage = 0.5 / (math.sqrt(0.5) + 1e-6)
    bad = -advantage * (1.5 * math.log(0.9) + 0.5 * math.log(0.2))
    assert loss.total.item() == pytest.approx(-(advantage * math.log(0.5) + bad) / 3, rel=1e-5)
    assert "tapered_score" in pieces(objective)[0]
