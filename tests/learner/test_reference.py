from pathlib import Path

import pytest
import torch

from learner.collate import collate
from learner.policy import Policy
from learner.reference import Reference
from learner.tokens import Column
from tests.learner.builders import make_policy, make_trainer, mixed_samples, plain_samples

REFERENCE = frozenset({Column.UNIT_LOGPROBS, Column.FIRST_LOGIT})


def _reference(policy: Policy, *, cache_bytes: int = 10_000) -> Reference:
    return Reference(policy, reference_id="update-0", cache_bytes=cache_bytes)


def _scale(policy: Policy, factor: float) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(factor)


def test_a_fresh_reference_says_what_the_policy_says_at_temperature_1(model_dir: Path) -> None:
    policy, batch = make_policy(model_dir), collate(mixed_samples(), clock=2)
    scores = policy.forward(batch, REFERENCE).scores

    columns = _reference(policy).columns(batch)

    assert columns[Column.REFERENCE_LOGPROBS].equal(scores.columns[Column.UNIT_LOGPROBS])
    assert columns[Column.REFERENCE_FIRST_LOGIT].equal(scores.columns[Column.FIRST_LOGIT])


def test_a_reference_stays_when_the_policy_moves_and_follows_at_a_reset(model_dir: Path) -> None:
    policy, batch = make_policy(model_dir), collate(mixed_samples(), clock=2)
    reference = _reference(policy)
    before = reference.columns(batch)[Column.REFERENCE_LOGPROBS]

    _scale(policy, 1.5)
    kept = reference.columns(batch)[Column.REFERENCE_LOGPROBS]
    reference.reset(policy, reference_id="update-1")
    after = reference.columns(batch)[Column.REFERENCE_LOGPROBS]

    assert kept.equal(before)
    assert after.equal(policy.forward(batch, REFERENCE).scores.columns[Column.UNIT_LOGPROBS])
    assert not after.equal(before)


def test_cached_terms_are_not_computed_again(model_dir: Path) -> None:
    policy, batch = make_policy(model_dir), collate(mixed_samples(), clock=2)
    reference = _reference(policy)
    first = reference.columns(batch)[Column.REFERENCE_LOGPROBS]

    _scale(reference.policy, 1.5)  # a second forward pass would now say something else

    assert reference.columns(batch)[Column.REFERENCE_LOGPROBS].equal(first)


def test_the_cache_forgets_the_least_recently_used_beyond_its_bytes(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    old, new = collate(plain_samples(1), clock=0), collate(plain_samples(2), clock=0)
    reference = _reference(policy, cache_bytes=2 * (3 + 4 + 2) * 4)  # 2 groups of 3 + 4 tokens, and a logit each
    seen_old = reference.columns(old)[Column.REFERENCE_LOGPROBS]
    seen_new = reference.columns(new)[Column.REFERENCE_LOGPROBS]

    _scale(reference.policy, 1.5)

    assert reference.columns(new)[Column.REFERENCE_LOGPROBS].equal(seen_new)
    assert not reference.columns(old)[Column.REFERENCE_LOGPROBS].equal(seen_old)
    assert reference.metrics() == {
        "reference/cache_hits_total": 4,
        "reference/cache_misses_total": 12,
        "reference/cache_evictions_total": 8,
        "reference/cache_bytes": 72,
    }


def test_the_same_trajectory_name_in_another_group_is_another_trajectory(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    reference = _reference(policy)
    reference.columns(collate(plain_samples(1), clock=0))
    batch = collate(plain_samples(2), clock=0)

    columns = reference.columns(batch)

    torch.testing.assert_close(
        columns[Column.REFERENCE_LOGPROBS],
        policy.forward(batch, REFERENCE).scores.columns[Column.UNIT_LOGPROBS],
        atol=0,
        rtol=0,
    )


def test_reval_starts_again_from_a_zero_log_ratio_after_each_reset(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, objective="reval", reference_reset_every=3)
    residuals = []
    for update in range(6):
        samples = plain_samples(0)  # replayed: its cached terms must be void after the reset
        metrics = trainer.update(collate(samples, clock=update))
        residuals.append(metrics["watched/bellman_residual_absolute_mean"])

    centred_reward = 0.5  # rewards 1 and 0, leave-one-out or group mean: all the residual there is at log-ratio 0
    assert residuals[0] == residuals[3] >= centred_reward
    assert abs(residuals[1] - residuals[0]) > 1e-4
    assert trainer.reference is not None
    assert trainer.reference.reference_id == "update-6"


@pytest.mark.parametrize(("objective", "passes"), [("grpo", [1, 1]), ("reval", [2, 1])])
def test_a_forward_pass_is_made_only_for_what_the_recipe_asks_and_is_not_known(
    model_dir: Path, objective: str, passes: list[int]
) -> None:
    """One of the policy for each update; one of the reference the first time that it sees a trajectory."""
    trainer = make_trainer(model_dir, objective=objective)
    counted = []
    for _ in range(2):
        calls = [0]
        policies = [trainer.policy] + ([] if trainer.reference is None else [trainer.reference.policy])
        hooks = [
            policy.model.base_model.register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
            for policy in policies
        ]
        trainer.update(collate(plain_samples(0), clock=0))
        counted.append(calls[0])
        for hook in hooks:
            hook.remove()

    assert counted == passes
