"""What holds for trust region masks whatever the numbers, and what a step reports of them."""

import itertools
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch

from learner.objectives.acceptance import THRESHOLDS, acceptance_curve, acceptance_sentence, bound_metrics
from learner.objectives.bounds import error_bounds
from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import build_objective
from learner.tokens import DIVERGENCES, Column, Tokens, cleaned
from tests.learner.objectives.batches import ROWS, Row, gradient, tokens_of

OFF = {"max_k2": "inf"}
OPTIONS = [
    ("trm", OFF, "max_kl"),
    ("trm", OFF, "mean_kl"),
    ("trm", {}, "max_k2"),
    ("trm", OFF, "mean_k3"),
    ("trm", {**OFF, "kl": "lower_bound"}, "max_kl"),
    ("trm_ln", {}, "weighted_deviation"),
    ("trm_ser", {}, "mean_deviation"),
]
"""Recipe, other options, and the threshold of each mask."""

GRID = (1e-6, 0.004, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 1e6)


def kept(tokens: Tokens, name: str, **options: object) -> list[bool]:
    """Which sequences pass all gates; every gate opens or closes a sequence as a whole."""
    gates = build_objective(name, options)(tokens, {}).gates.values()
    assert all(torch.equal(gate.all(-1), gate.any(-1)) for gate in gates)
    return torch.stack([gate.all(-1) for gate in gates]).all(0).tolist()


@pytest.mark.parametrize(("name", "others", "threshold"), OPTIONS)
def test_a_mask_is_monotone_in_its_threshold(name: str, others: dict[str, object], threshold: str) -> None:
    accepted = [kept(tokens_of(), name, **others, **{threshold: value}) for value in GRID]

    for tight, loose in itertools.pairwise(accepted):
        assert all(after or not before for before, after in zip(tight, loose, strict=True))
    assert all(accepted[-1])
    assert len({sum(mask) for mask in accepted}) >= 4


@pytest.mark.parametrize(("name", "others", "threshold"), OPTIONS)
def test_nothing_is_rejected_where_the_policy_has_not_moved(
    name: str, others: dict[str, object], threshold: str
) -> None:
    tokens = tokens_of(on_policy=True)
    gated = build_objective(name, {**others, threshold: 1e-9})(tokens, {})
    free = build_objective("trm", {"max_k2": 1e9})(tokens, {})

    assert torch.equal(gradient(gated.total, tokens.logprobs), gradient(free.total, tokens.logprobs))


@pytest.mark.parametrize("delta", GRID)
@pytest.mark.parametrize("kl", ["exact", "lower_bound"])
def test_what_the_maximum_accepts_the_mean_accepts(delta: float, kl: str) -> None:
    by_maximum = kept(tokens_of(), "trm", **OFF, kl=kl, max_kl=delta)
    by_mean = kept(tokens_of(), "trm", **OFF, kl=kl, mean_kl=delta)

    assert all(mean or not largest for largest, mean in zip(by_maximum, by_mean, strict=True))


@pytest.mark.parametrize("delta", GRID)
def test_a_lower_bound_rejects_only_what_the_exact_mask_rejects(delta: float) -> None:
    exact = kept(tokens_of(), "trm", **OFF, max_kl=delta)
    bound = kept(tokens_of(), "trm", **OFF, max_kl=delta, kl="lower_bound")

    assert all(loose or not tight for tight, loose in zip(exact, bound, strict=True))


def test_max_and_mean_together_are_the_and_of_both() -> None:
    spiky, flat, calm = (
        replace(ROWS[0], log_ratios=logs) for logs in ([0.0, 0.0, 0.0, 0.0, 1.0], [0.3] * 5, [0.01] * 5)
    )

    def accepted(**options: object) -> list[bool]:
        return kept(tokens_of((spiky, flat, calm)), "trm", **OFF, **options)

    assert accepted(max_kl=0.2) == [False, True, True]
    assert accepted(mean_kl=0.09) == [True, False, True]
    assert accepted(max_kl=0.2, mean_kl=0.09) == [False, False, True]


def test_the_order_of_tokens_changes_the_length_neutral_mask_alone() -> None:
    row = Row(log_ratios=[0.3, 0.01, 0.02], mask=[1, 1, 1], reward=1.0, group=0, episode=0, ages=[0] * 3)
    turned = replace(row, log_ratios=[0.02, 0.01, 0.3])

    for name, options in (("trm", {"max_k2": 0.04}), ("trm", {**OFF, "mean_k3": 0.01}), ("trm_ser", {})):
        assert kept(tokens_of((row,)), name, **options) == kept(tokens_of((turned,)), name, **options)
    assert (kept(tokens_of((row,)), "trm_ln"), kept(tokens_of((turned,)), "trm_ln")) == ([False], [True])


def test_length_neutral_weights_count_trained_tokens_so_that_holes_move_nothing() -> None:
    plain = Row(log_ratios=[0.08, 0.02, 0.3], mask=[1, 1, 1], reward=1.0, group=0, episode=0, ages=[0] * 3)
    holed = Row(
        log_ratios=[9.0, 0.08, 9.0, 9.0, 0.02, 0.3, 9.0],
        mask=[0, 1, 0, 0, 1, 1, 0],
        reward=1.0,
        group=0,
        episode=0,
        ages=[0] * 7,
    )

    for threshold in (0.05, 0.06, 0.0635, 0.064, 0.07, 0.08):
        options = {"weighted_deviation": threshold}
        assert kept(tokens_of((plain,)), "trm_ln", **options) == kept(tokens_of((holed,)), "trm_ln", **options)


# ---- what a step reports


def without(tokens: Tokens, columns: frozenset[Column]) -> Tokens:
    return replace(tokens, columns={name: value for name, value in tokens.columns.items() if name not in columns})


def diagnosed(tokens: Tokens) -> dict[str, float]:
    return diagnose(tokens, build_objective("trm", {})(tokens, {}))


def test_the_acceptance_curve_reads_every_statistic_at_every_threshold() -> None:
    metrics = diagnosed(tokens_of())

    ratios = [[math.exp(row.log_ratios[t]) for t in row.trained] for row in ROWS]
    kls = [[row.exact_kl[t] for t in row.trained] for row in ROWS]
    by_sequence = {
        ("max_k2_nats", "_estimate"): [max(math.log(r) ** 2 / 2 for r in row) for row in ratios],
        ("mean_k3_nats", "_estimate"): [statistics.fmean(r - 1 - math.log(r) for r in row) for row in ratios],
        ("mean_deviation", "_estimate"): [statistics.fmean(abs(r - 1) for r in row) for row in ratios],
        ("max_kl_nats", ""): [max(row) for row in kls],
        ("mean_kl_nats", ""): [statistics.fmean(row) for row in kls],
    }
    for (name, suffix), values in by_sequence.items():
        for threshold in THRESHOLDS:
            share = sum(value <= threshold for value in values) / len(values)
            spelled = f"{threshold:g}".replace(".", "_")
            assert metrics[f"trust_region/{name}_within_{spelled}_share{suffix}"] == pytest.approx(share)
        assert len(values) == 8
        for percent, kept in ((50, 4), (70, 6), (90, 8)):  # of 8: the fewest that are that many per cent
            lowest = sorted(values)[kept - 1]
            assert metrics[f"trust_region/{name}_p{percent}{suffix}"] == pytest.approx(lowest, rel=1e-4)
    curve = r"trust_region/max_k2_nats_within_(\w+)_share_estimate"
    read = [found[1] for name in metrics if (found := re.fullmatch(curve, name))]
    assert read == ["0_001", "0_002", "0_005", "0_01", "0_02", "0_05", "0_1", "0_2", "0_5"]
    assert sum(name.endswith("_share_estimate") for name in metrics) == 3 * len(read)


def test_shares_of_the_curve_are_what_the_gate_keeps_at_that_threshold() -> None:
    metrics = diagnosed(tokens_of())

    for option, statistic, suffix in (
        ("max_k2", "max_k2_nats", "_estimate"),
        ("mean_k3", "mean_k3_nats", "_estimate"),
        ("max_kl", "max_kl_nats", ""),
        ("mean_kl", "mean_kl_nats", ""),
    ):
        accepted = kept(tokens_of(), "trm", **OFF | {option: 0.1})
        assert metrics[f"trust_region/{statistic}_within_0_1_share{suffix}"] == statistics.fmean(accepted)


def test_a_sequence_at_the_threshold_is_kept_by_the_gate_and_by_the_curve() -> None:
    tokens = tokens_of()
    tokens.columns[Column.EXACT_KL].fill_(0.05)

    assert all(kept(tokens, "trm", **OFF, max_kl=0.05))
    assert diagnosed(tokens)["trust_region/max_kl_nats_within_0_05_share"] == 1.0
    assert diagnosed(tokens)["trust_region/max_kl_nats_within_0_02_share"] == 0.0


def test_names_say_what_was_estimated_what_is_a_lower_bound_and_what_is_exact() -> None:
    exact = diagnosed(tokens_of())
    bounded = diagnosed(without(tokens_of(), frozenset({Column.EXACT_KL, Column.EXACT_TV})))
    sampled = diagnosed(without(tokens_of(), DIVERGENCES))
    just_enough = diagnosed(without(tokens_of(), frozenset(Column) - {Column.EXACT_KL, Column.EXACT_TV}))

    def named(metrics: dict[str, float], start: str) -> set[str]:
        return {
            name.removeprefix(f"trust_region/{start}") for name in metrics if name.startswith(f"trust_region/{start}")
        }

    assert named(exact, "bound_best") == named(just_enough, "bound_best") == {""}
    assert named(bounded, "bound_best") == named(sampled, "bound_best") == {"_estimate"}
    assert named(exact, "max_kl_nats_p70") == {""}
    assert named(bounded, "max_kl_nats_p70") == {"_lower_bound"}
    assert named(sampled, "max_kl_nats_p70") == set()
    assert named(sampled, "max_k2_nats_p70") == named(exact, "max_k2_nats_p70") == {"_estimate"}


def expected_bounds(largest: list[list[float]], kl: list[list[float]], tv: list[list[float]]) -> dict[str, float]:
    """From lists over the trained tokens of each row, by hand."""
    length = max(map(len, kl))
    mean_tv = [min(sum(row[t] for row in tv if t < len(row)) / len(tv), 1.0) for t in range(length)]
    sequence_kl = sum(map(sum, kl)) / len(kl)
    return dict(
        error_bounds(
            max_tv=min(max(map(max, tv)), 1.0),
            max_kl=max(map(max, largest)),
            sequence_kl=sequence_kl,
            sequence_tv=min(1.0, math.sqrt(sequence_kl / 2), sum(mean_tv)),
            mean_tv=torch.tensor(mean_tv, dtype=torch.float64),
        )
    )


NEAR = tuple(replace(row, log_ratios=[0.01 * log for log in row.log_ratios]) for row in ROWS)


@pytest.mark.parametrize("rows", [ROWS, NEAR])
def test_exact_bounds_are_those_of_the_divergences_of_the_batch(rows: tuple[Row, ...]) -> None:
    metrics = diagnosed(tokens_of(rows))

    kl = [[row.exact_kl[t] for t in row.trained] for row in rows]
    tv = [[row.exact_tv[t] for t in row.trained] for row in rows]
    expected = expected_bounds(kl, kl, tv)
    for name, bound in expected.items():
        assert metrics[f"trust_region/bound_{name}"] == pytest.approx(bound, rel=1e-5)
    assert metrics["trust_region/kl_nats_max"] == pytest.approx(max(map(max, kl)), rel=1e-6)
    assert metrics["trust_region/tv_max"] == pytest.approx(max(map(max, tv)), rel=1e-6)
    assert metrics["trust_region/sequence_kl_nats_mean"] == pytest.approx(sum(map(sum, kl)) / len(rows), rel=1e-6)


@pytest.mark.parametrize("rows", [ROWS, NEAR])
def test_estimated_bounds_use_k2_for_the_maximum_and_unbiased_samples_for_means(rows: tuple[Row, ...]) -> None:
    metrics = diagnosed(without(tokens_of(rows), DIVERGENCES))

    logs = [[row.log_ratios[t] for t in row.trained] for row in rows]
    largest = [[x * x / 2 for x in row] for row in logs]
    kl = [[math.exp(x) - 1 - x for x in row] for row in logs]
    tv = [[abs(math.exp(x) - 1) / 2 for x in row] for row in logs]
    for name, bound in expected_bounds(largest, kl, tv).items():
        assert metrics[f"trust_region/bound_{name}_estimate"] == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("columns", [frozenset(), DIVERGENCES])
def test_the_bounds_of_an_age_are_those_of_its_sequences_alone(columns: frozenset[Column]) -> None:
    mixed = (replace(ROWS[2], ages=[0, 0, 0, 70, 70, 70]), replace(ROWS[6], ages=[100, 2000, 100]))  # the oldest counts
    rows, proof = (*mixed, ROWS[0], ROWS[3], ROWS[4]), "" if not columns else "_estimate"
    metrics = diagnosed(without(tokens_of(rows), columns))

    for age, chosen in {"64_plus": rows[:2], "4_15": rows[2:3], "16_63": rows[3:]}.items():
        alone = diagnosed(without(tokens_of(chosen), columns))
        known = [name for name in alone if re.match(r"trust_region/(bound|kl|tv|sequence)_", name)]
        assert len(known) == 12
        for name in known:
            found = metrics[name.replace("/", f"/age_{age}_")]
            assert found == pytest.approx(alone[name], rel=1e-6)
    assert f"trust_region/age_0_tv_max{proof}" not in metrics


def test_a_bound_of_1_or_more_is_called_vacuous() -> None:
    far, near = diagnosed(without(tokens_of(), DIVERGENCES)), diagnosed(without(tokens_of(NEAR), DIVERGENCES))

    assert far["trust_region/bound_best_estimate"] >= 1
    assert far["trust_region/bound_vacuous_estimate"] == 1.0
    assert near["trust_region/bound_best_estimate"] < 1
    assert near["trust_region/bound_vacuous_estimate"] == 0.0
    assert diagnosed(tokens_of(on_policy=True))["trust_region/bound_best"] == 0.0
    two_tokens = tokens_of(ROWS[5:6])
    two_tokens.columns[Column.EXACT_KL].fill_(0.5)
    two_tokens.columns[Column.EXACT_TV].fill_(0.5)
    assert diagnosed(two_tokens)["trust_region/bound_best"] == 1.0
    assert diagnosed(two_tokens)["trust_region/bound_vacuous"] == 1.0


def test_wild_ratios_give_finite_bounds() -> None:
    wild = tuple(replace(row, log_ratios=[40.0] * len(row.mask)) for row in ROWS)
    tokens = cleaned(without(tokens_of(wild), DIVERGENCES), ())

    metrics = bound_metrics(tokens, {"": tokens.lengths > 0})

    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["trust_region/tv_max_estimate"] == 1.0
    assert metrics["trust_region/bound_adaptive_estimate"] == pytest.approx(4 * 4)  # 5 tokens, the last one is free
    assert all(value.isfinite() for value in acceptance_curve(tokens).values())


def test_the_curve_is_printed_in_one_line() -> None:
    metrics = {f"trust_region/max_k2_nats_p{p}_estimate": p / 1000 for p in (50, 70, 90)}
    metrics |= {f"trust_region/mean_kl_nats_p{p}": p / 7 for p in (50, 70, 90)}

    assert acceptance_sentence({"loss/total": 1.0, **metrics}) == (
        "thresholds that keep 50 / 70 / 90 % of the sequences: "
        "max_k2_nats_estimate 0.05 / 0.07 / 0.09, mean_kl_nats 7.14 / 10 / 12.9"
    )
