"""docs/metrics.md names every metric of an update, and nothing else."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from buffer.staleness import AGE_BUCKETS
from learner.admission import Refusal
from learner.collate import collate
from learner.objectives.acceptance import THRESHOLDS
from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import RECIPES, build_objective
from learner.step import SKIPPED
from learner.tokens import DIVERGENCES, Column, Tokens
from tests.learner.builders import make_trainer, plain_samples
from tests.learner.documented import never_seen, parts, patterns, undocumented
from tests.learner.objectives.batches import ALL_PARTS, tokens_of

MULTIPLIERS = {"variance": 0.1, "variance_ema": 0.04}
VARIANTS: dict[str, dict[str, object]] = {
    "stalewise": ALL_PARTS,
    "trm": {"mean_k3": 0.1, "max_kl": 0.1, "mean_kl": 0.1},
    "grpo": {"dual_clip": 3.0, "reference_kl": 0.04},
}

EMITTED_BY_THE_PROCESS = {
    *(f"time/{name}_s" for name in ("sample_wait", "publish", "checkpoint", "report")),
    "dropped/lost_draws_total",
    *(f"dropped/{refusal.value}_groups_total" for refusal in Refusal),
    *(f"skipped/{name}_updates_total" for name in SKIPPED.values()),
    "stall/warnings_total",
    "report/lost_total",
    "request/retries_total",
    *(f"publish/{name}" for name in ("payload_bytes", "background_s", "coalesced_versions_total")),
}
"""By the loop and the service around an update: tests/services holds the lines of a real learner against the table."""


def without(tokens: Tokens, columns: frozenset[Column]) -> Tokens:
    return replace(tokens, columns={name: value for name, value in tokens.columns.items() if name not in columns})


def of_all_recipes() -> Iterator[str]:
    exact = tokens_of()
    batches = [exact, without(exact, DIVERGENCES), without(exact, DIVERGENCES - {Column.KL_LOWER_BOUND})]
    for name in RECIPES:
        for options in ({}, VARIANTS.get(name, {})):
            objective = build_objective(name, options)
            loss = objective(exact, MULTIPLIERS)
            yield from (f"loss/{part}" for part in loss.parts)
            for tokens in batches:
                yield from diagnose(tokens, loss)
    lower = build_objective("trm", {"max_kl": 0.1, "mean_kl": 0.1, "kl": "lower_bound"})
    yield from diagnose(exact, lower(exact, {}))


def test_every_metric_of_every_recipe_and_of_an_update_is_documented_and_no_other(model_dir: Path) -> None:
    update = make_trainer(model_dir, objective="stalewise").update(collate(plain_samples(0), clock=1))
    names = {*of_all_recipes(), *update}

    assert undocumented(names) == []
    assert undocumented(EMITTED_BY_THE_PROCESS) == []
    assert never_seen(names | EMITTED_BY_THE_PROCESS) == []


def test_every_documented_part_of_a_name_occurs() -> None:
    names = set(of_all_recipes())

    for part, pattern in (
        ("gate", "gate/{}_closed_share"),
        ("part", "loss/{}"),
        ("watched", "watched/{}_mean"),
        ("statistic", "trust_region/{}_p50"),
        ("bound", "trust_region/bound_{}"),
    ):
        proofs = parts()["proof"] if part == "statistic" else [""]
        for value in parts()[part]:
            assert names & {pattern.format(value) + proof for proof in proofs}, f"{part} {value} is documented only"
    assert parts()["threshold"] == [f"{threshold:g}".replace(".", "_") for threshold in THRESHOLDS]
    assert parts()["refusal"] == [refusal.value for refusal in Refusal]
    assert parts()["skip"] == list(SKIPPED.values())
    assert parts()["bucket"] == list(AGE_BUCKETS)
    assert parts()["age"] == ["", *(f"age_{age}_" for age in AGE_BUCKETS)]


def test_a_name_that_is_not_in_the_table_is_found() -> None:
    assert len(patterns()) > 40
    assert undocumented(["ratio/median", "ratio/age_2_mean", "ratio/mean"]) == ["ratio/age_2_mean", "ratio/median"]
