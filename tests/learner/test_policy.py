"""Log-probs against a plain forward of one sequence at a time, and micro-batches against one pass."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from buffer.errors import InvalidSettings
from buffer.types import Trajectory
from learner.collate import collate
from learner.errors import CorruptCheckpoint
from learner.objectives.recipes import build_objective
from learner.policy import Policy
from learner.settings import ComputeSettings
from learner.step import Trainer
from learner.tokens import Column
from tests.factories import make_group
from tests.learner.builders import as_sample, make_policy, make_trainer, mixed_samples, trajectories_of

ALL_COLUMNS = frozenset(
    {
        Column.UNIT_LOGPROBS,
        Column.FIRST_LOGIT,
        Column.ENTROPY,
        Column.OTHER_SQUARED_PROBS,
        Column.PROXIMAL_LOGPROBS,
    }
)


@torch.no_grad()
def _raw_logits(model_dir: Path, trajectory: Trajectory) -> Tensor:
    """The logits [T, V] that response tokens are drawn from, by transformers alone, without padding."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = [*trajectory.prompt_ids.tolist(), *trajectory.response_ids.tolist()]
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits[len(trajectory.prompt_ids) - 1 : -1]


def _distribution(logits: Tensor, trajectory: Trajectory, token: int) -> Tensor:
    """Log-probs [V] under the stored sampling settings, one token at a time."""
    scaled = logits[token] / trajectory.sampling.temperature
    if trajectory.kept_token_ids is not None and trajectory.kept_token_counts is not None:
        start = int(trajectory.kept_token_counts[:token].sum())
        kept = trajectory.kept_token_ids[start : start + int(trajectory.kept_token_counts[token])]
        cut = torch.full_like(scaled, -torch.inf)
        cut[kept.tolist()] = scaled[kept.tolist()]
        scaled = cut
    return scaled.log_softmax(-1)


def test_every_score_equals_a_plain_forward_under_the_stored_sampling_settings(model_dir: Path) -> None:
    samples = mixed_samples()
    scores = make_policy(model_dir).forward(collate(samples, clock=2), ALL_COLUMNS).scores

    for row, trajectory in enumerate(trajectories_of(samples)):
        logits = _raw_logits(model_dir, trajectory)
        trained = trajectory.response_mask.nonzero()[0].tolist()
        first = trained[0]
        assert scores.columns[Column.FIRST_LOGIT][row].item() == pytest.approx(
            logits[first, int(trajectory.response_ids[first])].item(), abs=1e-5
        )
        for token in range(scores.logprobs.shape[1]):
            seen = {name: scores.columns[name][row, token].item() for name in ALL_COLUMNS - {Column.FIRST_LOGIT}}
            if token not in trained:
                assert scores.logprobs[row, token] == 0
                assert set(seen.values()) == {0.0}
                continue
            chosen = int(trajectory.response_ids[token])
            expected = _distribution(logits, trajectory, token)
            assert scores.logprobs[row, token].item() == pytest.approx(expected[chosen].item(), abs=1e-5)
            unit = logits[token].log_softmax(-1)[chosen].item()
            assert seen[Column.UNIT_LOGPROBS] == pytest.approx(unit, abs=1e-5)
            assert seen[Column.PROXIMAL_LOGPROBS] == scores.logprobs[row, token].item()
            probabilities = expected.exp()
            entropy = -(probabilities[probabilities > 0] * expected[probabilities > 0]).sum().item()
            assert seen[Column.ENTROPY] == pytest.approx(entropy, abs=1e-5)
            others = probabilities.square().sum() - probabilities[chosen].square()
            assert seen[Column.OTHER_SQUARED_PROBS] == pytest.approx(others.item(), abs=1e-5)


def test_nothing_is_computed_that_was_not_asked_for(model_dir: Path) -> None:
    scores = make_policy(model_dir).forward(collate(mixed_samples(), clock=2), frozenset({Column.ENTROPY})).scores

    assert set(scores.columns) == {Column.ENTROPY}


def test_a_trajectory_scores_the_same_alone_and_beside_longer_ones(model_dir: Path) -> None:
    policy, samples = make_policy(model_dir), mixed_samples()
    together = policy.forward(collate(samples, clock=2), ALL_COLUMNS).scores

    for row, trajectory in enumerate(trajectories_of(samples)):
        alone = policy.forward(collate([as_sample(make_group(trajectories=[trajectory]))], clock=2), ALL_COLUMNS)
        length = len(trajectory.response_ids)
        torch.testing.assert_close(alone.scores.logprobs[0], together.logprobs[row, :length], atol=1e-5, rtol=0)
        assert (together.logprobs[row, length:] == 0).all()


def test_micro_batches_hold_every_trajectory_once_within_the_budget(model_dir: Path) -> None:
    batch = collate(mixed_samples(), clock=2)  # lengths 8, 6, 7, 5, 7

    sets = make_policy(model_dir, micro_batch_tokens=16).micro_batches(batch, range(5))

    assert [rows.tolist() for rows in sets] == [[0, 2], [1, 4], [3]]


def test_a_sequence_longer_than_the_budget_is_a_micro_batch_of_its_own(model_dir: Path) -> None:
    sets = make_policy(model_dir, micro_batch_tokens=1).micro_batches(collate(mixed_samples(), clock=2), range(5))

    assert [rows.tolist() for rows in sets] == [[0], [2], [4], [1], [3]]


@pytest.mark.parametrize("objective", ["grpo", "reval", "stalewise", "minpro"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 16])
def test_gradients_do_not_depend_on_the_micro_batches(model_dir: Path, objective: str, micro_batch_tokens: int) -> None:
    whole = _gradients(make_trainer(model_dir, objective=objective))
    split = _gradients(make_trainer(model_dir, objective=objective, micro_batch_tokens=micro_batch_tokens))

    assert whole.keys() == split.keys()
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    assert largest > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-5 * largest, rtol=1e-4)


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The gradients of one update, clipping scaled out: the norm is among the metrics."""
    metrics = trainer.update(collate(mixed_samples(), clock=2))
    scale = max(1.0, metrics["gradient/norm"])
    return {
        name: parameter.grad * scale
        for name, parameter in trainer.policy.model.named_parameters()
        if parameter.grad is not None
    }


def test_a_denominator_spans_all_micro_batches(model_dir: Path) -> None:
    """reinforce divides by all tokens: a mean of means over unequal micro-batches would differ."""
    batch = collate(mixed_samples(), clock=2)
    losses = []
    for budget in (1, 10_000):
        forward = make_policy(model_dir, micro_batch_tokens=budget).forward(batch, frozenset())
        trainer = make_trainer(model_dir, objective="reinforce", micro_batch_tokens=budget)
        losses.append(build_objective("reinforce", {})(trainer.tokens(batch, forward), {}).total.item())

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_tied_weights_appear_once_and_load_into_a_fresh_model(model_dir: Path) -> None:
    policy, other = make_policy(model_dir), make_policy(model_dir)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)

    other.load_weights(policy.weights())

    assert "lm_head.weight" not in policy.weights()
    batch = collate(mixed_samples(), clock=2)
    torch.testing.assert_close(
        other.forward(batch, frozenset()).scores.logprobs,
        policy.forward(batch, frozenset()).scores.logprobs,
        atol=0,
        rtol=0,
    )


def test_weights_of_another_model_are_refused(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    weights = dict(policy.weights())

    del weights["model.norm.weight"]
    with pytest.raises(CorruptCheckpoint, match=r"1 names differ, first model\.norm\.weight"):
        policy.load_weights(weights)

    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight is \(3,\), the model has \(16,\)"):
        policy.load_weights({**weights, "model.norm.weight": torch.zeros(3)})


def test_a_directory_that_is_no_model_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(InvalidSettings, match="does not hold a causal language model"):
        Policy.load(tmp_path, device="cpu", micro_batch_tokens=1, compute=ComputeSettings())
