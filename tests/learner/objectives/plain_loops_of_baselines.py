"""The baselines once more, in plain Python; see plain_loops."""

import math
import statistics
from collections.abc import Callable, Sequence

from tests.learner.objectives.batches import Row
from tests.learner.objectives.plain_loops import (
    Advantage,
    Result,
    clip,
    clipped,
    group_mean,
    leave_one_out,
    num_tokens,
    raw,
    standardised,
    token_ratio,
    weighted_score,
)


def batch_normalised(rows: Sequence[Row], i: int) -> float:
    centred = [group_mean(rows, j) for j in range(len(rows))]
    return (centred[i] - statistics.fmean(centred)) / (statistics.pstdev(centred) + 1e-8)


def score_by_sequence(
    rows: Sequence[Row],
    coefficient: Callable[[int, Row, int], float],
) -> Result:
    """-sum coefficient * log pi, the coefficient a constant."""
    loss, grad = 0.0, {}
    for i, row in enumerate(rows):
        for t in row.trained:
            c = coefficient(i, row, t)
            loss -= c * row.logprobs[t]
            grad[i, t] = -c
    return Result(loss, grad, {}, {})


def rloo(rows: Sequence[Row]) -> Result:
    return score_by_sequence(rows, lambda i, row, t: leave_one_out(rows, i) / len(rows))


def dr_grpo(rows: Sequence[Row], length_tokens: float = 1.0) -> Result:
    return clipped(rows, token_ratio, 0.2, 0.2, lambda row: 1 / (len(rows) * length_tokens), group_mean)


def by_sequence_ratio(rows: Sequence[Row], low: float, high: float, share: Callable[[Row], float]) -> Result:
    """-1/B sum share * min(s A, clip(s) A), s the geometric mean; each token moves s by s / |o_i|."""
    loss, grad = 0.0, {}
    for i, row in enumerate(rows):
        a, length = standardised(rows, i), len(row.trained)
        s = math.prod(token_ratio(row, t) for t in row.trained) ** (1 / length)
        loss -= share(row) * min(s * a, clip(s, 1 - low, 1 + high) * a) / len(rows)
        is_clipped = (a > 0 and s > 1 + high) or (a < 0 and s < 1 - low)
        for t in row.trained:
            grad[i, t] = 0.0 if is_clipped else -share(row) * s * a / length / len(rows)
    return Result(loss, grad, {}, {})


def gspo(rows: Sequence[Row]) -> Result:
    return by_sequence_ratio(rows, 3e-4, 4e-4, lambda row: 1.0)


def gspo_with_a_wide_clip(rows: Sequence[Row]) -> Result:
    return by_sequence_ratio(rows, 0.2, 0.28, lambda row: 1.0)


def luspo(rows: Sequence[Row]) -> Result:
    return by_sequence_ratio(rows, 2e-3, 2.5e-3, lambda row: len(row.trained))


def cispo(rows: Sequence[Row]) -> Result:
    return weighted_score(rows, lambda row, t: min(token_ratio(row, t), 1.28), standardised)


def against_proximal(
    rows: Sequence[Row], weight: Callable[[float], float], low: float, high: float, share: Callable[[Row], float]
) -> Result:
    """-share * s(weight(prox / behavior)) * PPO's clip on pi / prox."""
    loss, grad = 0.0, {}
    for i, row in enumerate(rows):
        a = standardised(rows, i)
        for t in row.trained:
            r = math.exp(row.logprobs[t] - row.proximal[t])
            w = weight(math.exp(row.proximal[t] - row.behavior[t]))
            loss -= share(row) * w * min(r * a, clip(r, 1 - low, 1 + high) * a)
            is_clipped = (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low)
            grad[i, t] = 0.0 if is_clipped else -share(row) * w * r * a
    return Result(loss, grad, {}, {})


def tis_ppo(rows: Sequence[Row]) -> Result:
    return against_proximal(rows, lambda k: min(k, 2.0), 0.2, 0.28, lambda row: 1 / num_tokens(rows))


def tis_ppo_with_a_tight_clip(rows: Sequence[Row]) -> Result:
    return against_proximal(rows, lambda k: min(k, 1.1), 0.02, 0.03, lambda row: 1 / num_tokens(rows))


def icepop(rows: Sequence[Row], low: float = 0.5, high: float = 5.0) -> Result:
    return against_proximal(
        rows, lambda k: k if low <= k <= high else 0.0, 0.2, 0.2, lambda row: 1 / (len(rows) * len(row.trained))
    )


def m2po(rows: Sequence[Row], threshold: float = 0.04) -> Result:
    squares = sorted((row.log_ratios[t] ** 2, i, t) for i, row in enumerate(rows) for t in row.trained)
    kept = {
        (i, t) for n, (_, i, t) in enumerate(squares) if statistics.fmean(s for s, _, _ in squares[: n + 1]) < threshold
    }
    loss, grad = 0.0, {}
    for i, t in kept:
        coefficient = token_ratio(rows[i], t) * standardised(rows, i) / num_tokens(rows)
        loss -= coefficient
        grad[i, t] = -coefficient
    return Result(loss, grad, {}, {})


def minirl(rows: Sequence[Row], cap: float = 5.0, low: float = 0.2, high: float = 0.27) -> Result:
    def coefficient(i: int, row: Row, t: int) -> float:
        a, r = group_mean(rows, i), math.exp(row.logprobs[t] - row.proximal[t])
        if (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low):
            return 0.0
        return min(token_ratio(row, t), cap) * a / len(rows)

    return score_by_sequence(rows, coefficient)


def asymre(rows: Sequence[Row]) -> Result:
    return score_by_sequence(rows, lambda i, row, t: (group_mean(rows, i) + 0.1) / num_tokens(rows))


def topr(rows: Sequence[Row], advantage: Advantage = raw) -> Result:
    def coefficient(i: int, row: Row, t: int) -> float:
        a = advantage(rows, i)
        product = math.prod(token_ratio(row, s) for s in row.trained)
        return (a if a >= 0 else min(product, 1.0) * a) / (len(rows) * len(row.trained))

    return score_by_sequence(rows, coefficient)


def opmd(rows: Sequence[Row]) -> Result:
    return score_by_sequence(rows, lambda i, row, t: group_mean(rows, i) / (2 * num_tokens(rows)))


def tbrm(rows: Sequence[Row]) -> Result:
    loss, unit, first = 0.0, {}, {}
    for i, row in enumerate(rows):
        start, later = row.trained[0], row.trained[1:]
        delta = row.first_logit + sum(row.unit[t] for t in later)
        delta -= row.reference[start] + sum(row.reference[t] for t in later) + row.reward / 0.002
        loss += delta**2 / len(rows)
        first[i] = 2 * delta / len(rows)
        for t in later:
            unit[i, t] = 2 * delta / len(rows)
    return Result(loss, {}, unit, first)


LOOPS: dict[str, Callable[[Sequence[Row]], Result]] = {
    "rloo": rloo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "luspo": luspo,
    "cispo": cispo,
    "tis_ppo": tis_ppo,
    "icepop": icepop,
    "m2po": m2po,
    "minirl": minirl,
    "asymre": asymre,
    "topr": topr,
    "opmd": opmd,
    "tbrm": tbrm,
}
