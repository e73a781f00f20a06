"""A recipe refuses what it does not understand, in one sentence, and says what it is."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from buffer.errors import InvalidSettings
from learner.objectives.recipes import RECIPES, build_objective
from learner.tokens import Column
from tests.learner.objectives.batches import ALL_PARTS, tokens_of

DOCS = Path(__file__).parents[3] / "docs" / "objectives.md"


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("ppo", {}, "there is no objective 'ppo'.*choose one of"),
        ("grpo", {"clip": 0.2}, "objective grpo has no option 'clip'.*clip_low, clip_high"),
        ("grpo", {"clip_low": -0.1}, "clip_low=-0.1: .*greater than or equal to 0"),
        ("grpo", {"clip_low": 1.1}, "clip_low=1.1: .*less than or equal to 1"),
        ("grpo", {"clip_high": True}, "clip_high=True: .*truth value"),
        ("grpo", {"clip_high": "wide"}, "clip_high='wide': .*number"),
        ("grpo", {"advantage": "best"}, "advantage='best': .*'leave_one_out'"),
        ("grpo", {"dual_clip": float("nan")}, "dual_clip=nan"),
        ("reval", {"beta": 0}, "beta=0: .*greater than 0"),
        ("reval", {"beta": float("inf")}, "beta=inf: .*finite"),
        ("r2vpo", {"lambda_start": 0.5, "lambda_max": 0.1}, "lambda_start=0.5 is above lambda_max=0.1"),
        ("r2vpo_fresh", {"lambda_start": 0.5, "lambda_max": 0.1}, "lambda_start=0.5 is above lambda_max=0.1"),
        ("r2vpo_fresh", {"fresh_updates": True}, "fresh_updates=True: .*truth value"),
        ("r2vpo_fresh", {"fresh_updates": -1}, "fresh_updates=-1: .*greater than or equal to 0"),
        ("r2vpo", {"dual_decay": 1}, "dual_decay=1: .*less than 1"),
        ("trm", {"max_k2": "inf"}, "max_k2, mean_k3, max_kl and mean_kl are all off"),
        ("trm", {"max_kl": -1}, "max_kl=-1: .*greater than 0"),
        ("trm", {"kl": "top_k"}, "kl='top_k': .*'exact' or 'lower_bound'"),
        ("trm_ln", {"epsilon": float("inf")}, "epsilon=inf: .*finite"),
        ("stalewise", {"policy_coefficient": 0, "bellman_coefficient": 0}, "nothing would be learnt"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(name: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence) as refusal:
        build_objective(name, options)

    assert "\n" not in str(refusal.value)


def test_stalewise_ships_weight_and_gate_and_each_other_part_is_switched_on_in_one_line() -> None:
    residual_columns = build_objective("reval", {}).columns

    assert parts_of({}) == {"policy"}
    assert build_objective("stalewise", {}).columns == frozenset()
    assert parts_of({"lambda_max": 0.1}) == {"policy", "variance"}
    assert parts_of({"bellman_coefficient": 1}) == {"policy", "bellman"}
    assert build_objective("stalewise", {"bellman_coefficient": 1}).columns == residual_columns


def test_each_part_of_stalewise_is_switched_off_in_one_line() -> None:
    assert parts_of(ALL_PARTS) == {"policy", "variance", "bellman"}
    assert parts_of({**ALL_PARTS, "bellman_coefficient": 0}) == {"policy", "variance"}
    assert parts_of({**ALL_PARTS, "lambda_max": 0}) == {"policy", "bellman"}
    assert parts_of({**ALL_PARTS, "policy_coefficient": 0}) == {"variance", "bellman"}
    assert build_objective("stalewise", {}).initial_multipliers() == {}


def parts_of(options: Mapping[str, object]) -> set[str]:
    multipliers = {"variance": 0.1, "variance_ema": 0.04}
    return set(build_objective("stalewise", options)(tokens_of(), multipliers).parts)


def test_a_reference_kl_asks_for_the_reference() -> None:
    wanted = {Column.UNIT_LOGPROBS, Column.REFERENCE_LOGPROBS}

    assert build_objective("grpo", {}).columns == frozenset()
    assert build_objective("grpo", {"reference_kl": 0.04}).columns == wanted


def test_exact_thresholds_ask_for_the_divergence_that_they_read() -> None:
    assert build_objective("trm", {}).columns == frozenset()
    assert build_objective("trm", {"kl": "lower_bound"}).columns == frozenset()
    assert build_objective("trm", {"max_kl": 0.05}).columns == {Column.EXACT_KL}
    assert build_objective("trm", {"mean_kl": 0.05, "kl": "lower_bound"}).columns == {Column.KL_LOWER_BOUND}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_option_says_its_meaning_and_every_recipe_what_it_is(name: str) -> None:
    recipe, objective = RECIPES[name], build_objective(name, {})

    assert recipe.name == objective.name == name
    assert recipe.denominator == objective.denominator
    assert all(field.description for field in recipe.model_fields.values())
    assert recipe.paper
    assert recipe.sentence
    assert recipe.use


def test_every_recipe_has_its_section_in_the_docs_with_its_sentence_options_and_evidence() -> None:
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.MULTILINE | re.DOTALL))

    assert sections.keys() == RECIPES.keys()
    for name, recipe in RECIPES.items():
        assert recipe.sentence in sections[name], f"the section of {name} does not state its loss"
        assert recipe.paper in sections[name], f"the section of {name} does not state its source"
        assert recipe.denominator in sections[name], f"the section of {name} does not state its denominator"
        assert "Our evidence:" in sections[name], f"the section of {name} does not state our evidence"
        for option in recipe.model_fields:
            assert f"`{option}`" in sections[name], f"the section of {name} does not explain {option}"
