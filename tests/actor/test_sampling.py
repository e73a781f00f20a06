import math

import pytest
import torch

from actor.sampling import RowSettings, sampling_logprobs
from buffer.types import SamplingSettings


def kept_by_hand(probabilities: list[float], settings: SamplingSettings) -> set[int]:
    """vLLM's order as a plain loop: min_p, then top_k, then top_p, each over what is left."""
    weights = [p ** (1 / settings.temperature) for p in probabilities]
    kept = {i for i, w in enumerate(weights) if w >= settings.min_p * max(weights)}
    if settings.top_k:
        threshold = sorted((weights[i] for i in kept), reverse=True)[min(settings.top_k, len(kept)) - 1]
        kept = {i for i in kept if weights[i] >= threshold}
    if settings.top_p < 1:
        total, mass, chosen = sum(weights[i] for i in kept), 0.0, set()
        for i in sorted(kept, key=lambda i: -weights[i]):
            if mass >= settings.top_p * total:
                break
            chosen.add(i)
            mass += weights[i]
        kept = chosen
    return kept


PROBABILITIES = [0.02, 0.31, 0.05, 0.2, 0.11, 0.24, 0.07]


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=t, top_p=p, top_k=k, min_p=m)
        for t in (0.5, 1.0, 2.0)
        for p in (1.0, 0.72, 0.05)
        for k in (0, 1, 4, 50)
        for m in (0.0, 0.3, 1.0)
    ],
    ids=str,
)
def test_truncation_keeps_what_a_plain_loop_keeps_and_renormalises_over_it(settings: SamplingSettings) -> None:
    off = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    logits = torch.tensor([PROBABILITIES, PROBABILITIES]).log() + 3.0

    logprobs = sampling_logprobs(logits, RowSettings.of([off, settings], vocab_size=len(PROBABILITIES)))

    kept = kept_by_hand(PROBABILITIES, settings)
    assert {i for i, value in enumerate(logprobs[1].tolist()) if value > -math.inf} == kept
    total = sum(PROBABILITIES[i] ** (1 / settings.temperature) for i in kept)
    for i in kept:
        assert logprobs[1, i].exp().item() == pytest.approx(PROBABILITIES[i] ** (1 / settings.temperature) / total)
    assert logprobs[0].exp().tolist() == pytest.approx(PROBABILITIES)  # the other row is not touched


def test_tokens_tied_at_the_top_k_threshold_are_all_kept() -> None:
    settings = SamplingSettings(temperature=1.0, top_p=1.0, top_k=2, min_p=0.0)

    logprobs = sampling_logprobs(torch.tensor([[1.0, 0.0, 0.0, -1.0]]), RowSettings.of([settings], vocab_size=4))

    assert (logprobs[0] > -math.inf).tolist() == [True, True, True, False]
