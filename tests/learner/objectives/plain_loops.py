"""Each recipe once more, in plain Python: loops, floats and the chain rule by hand. Shares no line with the learner."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.learner.objectives.batches import Row


@dataclass(frozen=True)
class Result:
    """A loss and its gradient; a gradient that is missing is 0."""

    loss: float
    logprobs: dict[tuple[int, int], float]
    unit_logprobs: dict[tuple[int, int], float]
    first_logit: dict[int, float]


Advantage = Callable[[Sequence[Row], int], float]


def siblings(rows: Sequence[Row], i: int) -> list[float]:
    """One reward for each episode of the group of trajectory i."""
    return list({row.episode: row.reward for row in rows if row.group == rows[i].group}.values())


def raw(rows: Sequence[Row], i: int) -> float:
    return rows[i].reward


def group_mean(rows: Sequence[Row], i: int) -> float:
    rewards = siblings(rows, i)
    return rows[i].reward if len(rewards) == 1 else rows[i].reward - statistics.fmean(rewards)


def leave_one_out(rows: Sequence[Row], i: int) -> float:
    others = {row.episode: row.reward for row in rows if row.group == rows[i].group}
    del others[rows[i].episode]
    return rows[i].reward - statistics.fmean(others.values()) if others else rows[i].reward


def standardised(rows: Sequence[Row], i: int) -> float:
    rewards = siblings(rows, i)
    if len(rewards) == 1:
        return rows[i].reward
    return (rows[i].reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)


def standardised_population(rows: Sequence[Row], i: int) -> float:
    rewards = siblings(rows, i)
    if len(rewards) == 1:
        return rows[i].reward
    return (rows[i].reward - statistics.fmean(rewards)) / (statistics.pstdev(rewards) + 1e-6)


def num_tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.trained) for row in rows)


def clip(x: float, low: float, high: float) -> float:
    return max(low, min(x, high))


def prefix_ratio(row: Row, t: int, *, capped: bool = False) -> float:
    before = [math.exp(row.log_ratios[s]) for s in row.trained if s < t]
    smallest = min(before) if before else 1.0
    return (min(smallest, 1.0) if capped else smallest) * math.exp(row.log_ratios[t])


def weighted_score(
    rows: Sequence[Row],
    weight: Callable[[Row, int], float],
    advantage: Advantage,
    keep: Callable[[Row], bool] = lambda _: True,
) -> Result:
    """-1/N sum s(weight) A log pi over the kept rows."""
    loss, grad, count = 0.0, {}, num_tokens(rows)
    for i, row in enumerate(rows):
        for t in row.trained:
            if keep(row):
                coefficient = weight(row, t) * advantage(rows, i)
                loss -= coefficient * row.logprobs[t] / count
                grad[i, t] = -coefficient / count
    return Result(loss, grad, {}, {})


def clipped(
    rows: Sequence[Row],
    ratio: Callable[[Row, int], float],
    low: float,
    high: float,
    share: Callable[[Row], float],
    advantage: Advantage = standardised,
    floor: float = math.inf,
) -> Result:
    """-sum share(row) * PPO's clip, whose gradient is ratio * A on the unclipped branch."""
    loss, grad = 0.0, {}
    for i, row in enumerate(rows):
        a = advantage(rows, i)
        for t in row.trained:
            r = ratio(row, t)
            value, slope = min(r * a, clip(r, 1 - low, 1 + high) * a), r * a
            if (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low):
                slope = 0.0
            if a < 0 and r > floor:
                value, slope = floor * a, 0.0
            loss -= share(row) * value
            grad[i, t] = -share(row) * slope
    return Result(loss, grad, {}, {})


def token_ratio(row: Row, t: int) -> float:
    return math.exp(row.log_ratios[t])


def reinforce(rows: Sequence[Row]) -> Result:
    return weighted_score(rows, lambda row, t: 1.0, group_mean)


def tis(rows: Sequence[Row]) -> Result:
    return weighted_score(rows, lambda row, t: min(token_ratio(row, t), 2.0), standardised)


def grpo(rows: Sequence[Row]) -> Result:
    return clipped(rows, token_ratio, 0.2, 0.2, lambda row: 1 / (len(rows) * len(row.trained)))


def grpo_with_everything(rows: Sequence[Row]) -> Result:
    """Dual clip 3 and a reference KL of 0.04."""
    policy = clipped(rows, token_ratio, 0.2, 0.2, lambda row: 1 / (len(rows) * len(row.trained)), floor=3.0)
    loss, unit = policy.loss, {}
    for i, row in enumerate(rows):
        share = 0.04 / (len(rows) * len(row.trained))
        for t in row.trained:
            log = row.reference[t] - row.unit[t]
            loss += share * (math.exp(log) - log - 1)
            unit[i, t] = share * (1 - math.exp(log))
    return Result(loss, policy.logprobs, unit, {})


def dapo(rows: Sequence[Row]) -> Result:
    return clipped(rows, token_ratio, 0.2, 0.28, lambda row: 1 / num_tokens(rows))


def minpro(rows: Sequence[Row]) -> Result:
    return weighted_score(rows, lambda row, t: clip(prefix_ratio(row, t), 0.0, 1.28), standardised)


def minpro_capped(rows: Sequence[Row]) -> Result:
    return weighted_score(rows, lambda row, t: clip(prefix_ratio(row, t, capped=True), 0.0, 2.0), standardised)


def minpro_hard(rows: Sequence[Row]) -> Result:
    return clipped(rows, prefix_ratio, 0.2, 0.28, lambda row: 1 / num_tokens(rows))


def inside_trust_region(row: Row, max_k2: float, mean_k3: float) -> bool:
    logs = [row.log_ratios[t] for t in row.trained]
    return max(x * x / 2 for x in logs) <= max_k2 and statistics.fmean(math.exp(x) - 1 - x for x in logs) <= mean_k3


def gated(rows: Sequence[Row], keep: Callable[[Row], bool]) -> Result:
    """-1/B sum rho A over the kept rows."""
    loss, grad = 0.0, {}
    for i, row in enumerate(rows):
        for t in row.trained:
            if keep(row):
                coefficient = token_ratio(row, t) * standardised(rows, i) / len(rows)
                loss -= coefficient
                grad[i, t] = -coefficient
    return Result(loss, grad, {}, {})


def trm(rows: Sequence[Row], max_k2: float = 0.05, mean_k3: float = math.inf) -> Result:
    return gated(rows, lambda row: inside_trust_region(row, max_k2, mean_k3))


def trm_exact(rows: Sequence[Row], max_kl: float, mean_kl: float, share: float = 1.0) -> Result:
    """On `share` of the KL: the part that a lower bound proves."""

    def keep(row: Row) -> bool:
        kls = [share * row.exact_kl[t] for t in row.trained]
        return max(kls) <= max_kl and statistics.fmean(kls) <= mean_kl

    return gated(rows, keep)


def trm_ln(rows: Sequence[Row], threshold: float = 0.05, epsilon: float = 0.05, delta: float = 0.01) -> Result:
    def keep(row: Row) -> bool:
        weighted, weights = 0.0, 0.0
        for place, t in enumerate(row.trained, start=1):
            later = len(row.trained) - place
            w = min(1.0, later * epsilon, math.sqrt(later * delta / 2))
            weighted += w * abs(token_ratio(row, t) - 1)
            weights += w
        return weights == 0 or weighted / weights <= threshold

    return gated(rows, keep)


def trm_ser(rows: Sequence[Row], threshold: float = 0.05) -> Result:
    return gated(rows, lambda row: statistics.fmean(abs(token_ratio(row, t) - 1) for t in row.trained) <= threshold)


def r2vpo(rows: Sequence[Row], max_log_ratio: float = 5.0) -> Result:
    """At a multiplier of 0.04."""
    loss, grad, count = 0.0, {}, num_tokens(rows)
    for i, row in enumerate(rows):
        for t in row.trained:
            a = standardised(rows, i)
            r = math.exp(clip(row.log_ratios[t], -max_log_ratio, max_log_ratio))
            loss -= (r * a - 0.04 * (r - 1) ** 2) / count
            inside = abs(row.log_ratios[t]) <= max_log_ratio
            grad[i, t] = -r * (a - 2 * 0.04 * (r - 1)) / count if inside else 0.0
    return Result(loss, grad, {}, {})


def squared_residual(rows: Sequence[Row], beta: float, centred: Advantage, share: float) -> Result:
    """share * sum of delta^2, delta from the raw first logit."""
    loss, unit, first = 0.0, {}, {}
    for i, row in enumerate(rows):
        later = row.trained[1:]
        delta = row.first_logit - row.reference_first_logit
        delta += sum(row.unit[t] - row.reference[t] for t in later)
        delta -= centred(rows, i) / beta
        loss += share * delta**2
        first[i] = 2 * share * delta
        for t in later:
            unit[i, t] = 2 * share * delta
    return Result(loss, {}, unit, first)


def reval(rows: Sequence[Row]) -> Result:
    return squared_residual(rows, 0.02, group_mean, 1 / len(rows))


def stalewise_policy(rows: Sequence[Row]) -> Result:
    bad = weighted_score(
        rows,
        lambda row, t: clip(prefix_ratio(row, t), 0.0, 1.28),
        lambda rows, i: min(standardised(rows, i), 0.0),
        lambda row: inside_trust_region(row, 0.5, math.inf),
    )
    good = weighted_score(rows, lambda row, t: 1.0, lambda rows, i: max(standardised(rows, i), 0.0))
    grad = {at: good.logprobs[at] + bad.logprobs.get(at, 0.0) for at in good.logprobs}
    return Result(good.loss + bad.loss, grad, {}, {})


def stalewise(rows: Sequence[Row]) -> Result:
    """With all its parts, at a multiplier of 0.04."""
    policy = stalewise_policy(rows)
    bellman = squared_residual(rows, 0.2, leave_one_out, 0.2 / (2 * num_tokens(rows)))
    loss, grad = policy.loss + bellman.loss, dict(policy.logprobs)
    for i, row in enumerate(rows):
        for t in row.trained:
            r = token_ratio(row, t)
            loss += 0.04 * (r - 1) ** 2 / num_tokens(rows)
            grad[i, t] = grad.get((i, t), 0.0) + 2 * 0.04 * (r - 1) * r / num_tokens(rows)
    return Result(loss, grad, bellman.unit_logprobs, bellman.first_logit)


LOOPS: dict[str, Callable[[Sequence[Row]], Result]] = {
    "reinforce": reinforce,
    "tis": tis,
    "grpo": grpo,
    "dapo": dapo,
    "minpro": minpro,
    "minpro_capped": minpro_capped,
    "minpro_hard": minpro_hard,
    "trm": trm,
    "trm_ln": trm_ln,
    "trm_ser": trm_ser,
    "r2vpo": r2vpo,
    "r2vpo_fresh": r2vpo,
    "reval": reval,
    "stalewise": stalewise,
}
