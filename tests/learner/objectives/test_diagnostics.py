"""What a step reports of each age, against sums made by hand."""

import math
import re
import statistics
from dataclasses import replace

import pytest

from buffer.staleness import AGE_BUCKETS
from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import RECIPES, build_objective
from tests.learner.objectives.batches import ROWS, tokens_of

MULTIPLIERS = {"variance": 0.1, "variance_ema": 0.04}

LOG_RATIOS_BY_AGE = {
    "foreign": [0.01, 0.02],
    "0": [0.05, -0.02, 0.03, 0.01, 0.02],
    "1_3": [0.4, -0.7, 0.15, 0.1, -0.2, 0.35],
    "4_15": [0.02, -0.3, 0.1, 0.25, -0.05],
    "16_63": [-2.5, 0.3, 0.2, 1.4],
    "64_plus": [-0.06, 0.08],
}
"""The trained tokens of the batch, sorted by hand."""


def diagnosed(name: str = "trm", **options: object) -> dict[str, float]:
    tokens = tokens_of()
    return diagnose(tokens, build_objective(name, options)(tokens, MULTIPLIERS))


def test_each_age_bucket_reports_its_own_tokens() -> None:
    metrics = diagnosed()

    for age, logs in LOG_RATIOS_BY_AGE.items():
        ratios = [math.exp(log) for log in logs]
        effective = sum(ratios) ** 2 / sum(r * r for r in ratios) / len(ratios)
        assert metrics[f"age/age_{age}_tokens_share"] == pytest.approx(len(logs) / 24)
        assert metrics[f"ratio/age_{age}_mean"] == pytest.approx(statistics.fmean(ratios), rel=1e-5)
        assert metrics[f"ratio/age_{age}_variance"] == pytest.approx(statistics.pvariance(ratios), rel=1e-3, abs=1e-9)
        assert metrics[f"ratio/age_{age}_max"] == pytest.approx(max(ratios), rel=1e-5)
        assert metrics[f"effective_samples/age_{age}_share"] == pytest.approx(effective, rel=1e-5)
        assert metrics[f"k1/age_{age}_nats_mean"] == pytest.approx(-statistics.fmean(logs), abs=1e-6)
        assert metrics[f"k2/age_{age}_nats_mean"] == pytest.approx(statistics.fmean(x * x / 2 for x in logs), rel=1e-4)
        k3 = statistics.fmean(math.exp(x) - 1 - x for x in logs)
        assert metrics[f"k3/age_{age}_nats_mean"] == pytest.approx(k3, rel=1e-3)


@pytest.mark.parametrize(
    ("age", "bucket"),
    [
        (-1, "foreign"),
        (0, "0"),
        (1, "1_3"),
        (3, "1_3"),
        (4, "4_15"),
        (15, "4_15"),
        (16, "16_63"),
        (63, "16_63"),
        (64, "64_plus"),
        (9999, "64_plus"),
    ],
)
def test_a_bucket_holds_the_ages_of_its_name(age: int, bucket: str) -> None:
    tokens = tokens_of((replace(ROWS[0], ages=[age] * 5),))

    metrics = diagnose(tokens, build_objective("dapo", {})(tokens, {}))

    assert metrics[f"age/age_{bucket}_tokens_share"] == 1.0


def test_the_batch_is_reported_as_a_whole() -> None:
    metrics = diagnosed()

    logs = [log for part in LOG_RATIOS_BY_AGE.values() for log in part]
    assert metrics["ratio/mean"] == pytest.approx(statistics.fmean(map(math.exp, logs)), rel=1e-5)
    assert metrics["ratio/max"] == pytest.approx(math.exp(1.4), rel=1e-5)
    assert metrics["k1/nats_mean"] == pytest.approx(-statistics.fmean(logs), abs=1e-6)


def test_quantiles_are_the_nearest_ranks_of_all_ratios() -> None:
    metrics = diagnosed()

    ratios = sorted(math.exp(log) for part in LOG_RATIOS_BY_AGE.values() for log in part)
    assert len(ratios) == 24
    for name, rank in (("p01", 0), ("p10", 2), ("p50", 12), ("p90", 21), ("p99", 23)):  # share of the way from 0 to 23
        assert metrics[f"ratio/{name}"] == pytest.approx(ratios[rank], rel=1e-5)


def test_a_sequence_without_trained_tokens_has_no_age() -> None:
    tokens = tokens_of((ROWS[0], replace(ROWS[1], mask=[0] * len(ROWS[1].mask))))

    metrics = diagnose(tokens, build_objective("trm", {})(tokens, {}))

    shares = [name for name in metrics if name.endswith("sequences_kept_share") and "_age_" in name]
    assert shares == ["gate/trust_region_max_estimate_age_4_15_sequences_kept_share"]


@pytest.mark.parametrize("trained", [0, 1])
def test_a_batch_of_next_to_nothing_is_reported(trained: int) -> None:
    tokens = tokens_of((replace(ROWS[0], mask=[trained, 0, 0, 0, 0]),))

    metrics = diagnose(tokens, build_objective("dapo", {})(tokens, {}))

    assert ("ratio/p50" in metrics) == bool(trained)
    assert sum(value for name, value in metrics.items() if name.endswith("_tokens_share")) == trained


def test_gates_report_what_they_closed_by_age_and_by_sequence() -> None:
    metrics = diagnosed(max_k2=0.1, mean_k3=1e9)

    # rows 1, 3 and 4 hold a token with |log rho| > sqrt(0.2): 3, 3 and 1 tokens of 24
    assert metrics["gate/trust_region_max_estimate_closed_share"] == pytest.approx(7 / 24)
    assert metrics["gate/trust_region_max_estimate_age_1_3_closed_share"] == pytest.approx(0.5)
    assert metrics["gate/trust_region_max_estimate_age_16_63_closed_share"] == 1.0
    assert metrics["gate/trust_region_max_estimate_sequences_kept_share"] == pytest.approx(5 / 8)
    assert metrics["gate/trust_region_mean_estimate_closed_share"] == 0.0


SEQUENCES_BY_AGE = {"foreign": [5], "0": [2], "1_3": [1, 7], "4_15": [0], "16_63": [3, 4], "64_plus": [6]}
"""The rows of the batch by their oldest token."""


def test_each_age_reports_the_acceptance_and_the_residuals_of_its_sequences() -> None:
    tokens = tokens_of()
    kept = diagnosed(max_k2=0.1)
    residuals = build_objective("reval", {})(tokens, {}).watched["bellman_residual"].tolist()
    reported = diagnosed("reval")

    for age, rows in SEQUENCES_BY_AGE.items():
        share = statistics.fmean(row not in (1, 3, 4) for row in rows)  # those hold a token with |log rho| > sqrt(0.2)
        assert kept[f"gate/trust_region_max_estimate_age_{age}_sequences_kept_share"] == share
        signed = statistics.fmean(residuals[row] for row in rows)
        unsigned = statistics.fmean(abs(residuals[row]) for row in rows)
        assert reported[f"watched/bellman_residual_age_{age}_mean"] == pytest.approx(signed, rel=1e-5)
        assert reported[f"watched/bellman_residual_age_{age}_absolute_mean"] == pytest.approx(unsigned, rel=1e-5)


def test_a_sequence_is_as_old_as_its_oldest_trained_token_and_foreign_with_one_foreign_token() -> None:
    row = ROWS[0]
    for ages, mask, bucket in (
        ([0, 0, 5, 0, 0], [1, 1, 1, 1, 1], "4_15"),
        ([0, 0, 99, 0, 0], [1, 1, 0, 1, 1], "0"),
        ([5, 5, -1, 5, 5], [1, 1, 1, 1, 1], "foreign"),
        ([5, 5, -1, 5, 5], [1, 1, 0, 1, 1], "4_15"),
    ):
        tokens = tokens_of((replace(row, ages=ages, mask=mask),))
        metrics = diagnose(tokens, build_objective("trm", {})(tokens, {}))
        shares = [name for name in metrics if name.endswith("sequences_kept_share") and "_age_" in name]
        assert shares == [f"gate/trust_region_max_estimate_age_{bucket}_sequences_kept_share"]


@pytest.mark.parametrize(("percent", "share"), [(50, 4 / 8), (70, 6 / 8), (90, 8 / 8)])
def test_the_acceptance_curve_gives_the_threshold_that_keeps_that_share(percent: int, share: float) -> None:
    threshold = diagnosed()[f"trust_region/max_k2_nats_p{percent}_estimate"]

    kept = diagnosed(max_k2=threshold)["gate/trust_region_max_estimate_sequences_kept_share"]

    assert kept == pytest.approx(share)


def test_residuals_are_reported_with_their_sign_and_without() -> None:
    tokens = tokens_of()
    loss = build_objective("reval", {})(tokens, {})

    metrics = diagnose(tokens, loss)

    residuals = loss.watched["bellman_residual"].tolist()
    assert metrics["watched/bellman_residual_mean"] == pytest.approx(statistics.fmean(residuals), rel=1e-5)
    assert metrics["watched/bellman_residual_absolute_mean"] == pytest.approx(
        statistics.fmean(map(abs, residuals)), rel=1e-5
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_metric_is_a_finite_float_with_a_name_of_the_house(name: str) -> None:
    for metric, value in diagnosed(name).items():
        assert re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", metric)
        assert isinstance(value, float)
        assert math.isfinite(value)


def test_an_empty_bucket_reports_no_statistics() -> None:
    tokens = tokens_of(ROWS[:1])

    metrics = diagnose(tokens, build_objective("dapo", {})(tokens, {}))

    assert "ratio/age_4_15_mean" in metrics
    assert all(f"ratio/age_{age}_mean" not in metrics for age in AGE_BUCKETS if age != "4_15")
    assert metrics["age/age_0_tokens_share"] == 0.0
