"""A model, samples and trainers for the learner's tests."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from buffer.types import Group, Sample, SampleInfo, SamplingSettings, Trajectory
from learner.lora import AdapterPolicy
from learner.objectives.diagnostics import diagnose
from learner.objectives.objective import Objective
from learner.policy import FLOAT32, Policy
from learner.settings import ComputeSettings, LearnerSettings, LoraSettings, OptimizerSettings
from learner.step import Trainer
from tests.factories import make_group, make_trajectory
from tests.learner.objectives.batches import whole

VOCAB = 24
WARM = SamplingSettings(temperature=0.7, top_p=1.0, top_k=0, min_p=0.0)
TOP_2 = SamplingSettings(temperature=1.3, top_p=1.0, top_k=2, min_p=0.0)


def save_tiny_model(directory: Path) -> None:
    """Save a Qwen2 with tied embeddings and 2 layers, its random weights large enough that its answers differ."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def as_sample(
    group: Group,
    *,
    times_sampled: int = 1,
    age_updates: int | None = 0,
    probability: float = 1.0,
    num_candidates: int = 1,
) -> Sample:
    info = SampleInfo(
        probability=probability, num_candidates=num_candidates, times_sampled=times_sampled, age_updates=age_updates
    )
    return Sample(group=group, info=info)


def mixed_trajectories() -> list[Trajectory]:
    """Ragged prompts and responses, tool tokens first and in the middle, three sampling settings."""
    return [
        make_trajectory("plain", prompt_ids=[5], response_ids=[8, 9, 10, 11, 12, 13, 2], reward=1.0),
        make_trajectory("warm", prompt_ids=[5, 6, 7, 8], response_ids=[9, 2], sampling=WARM, reward=0.0),
        make_trajectory(
            "tool",
            prompt_ids=[4, 4],
            response_ids=[20, 8, 21, 22, 3],
            response_mask=[False, True, False, False, True],
            reward=0.5,
        ),
        make_trajectory(
            "top",
            prompt_ids=[7, 6],
            response_ids=[10, 21, 2],
            response_mask=[True, False, True],
            sampling=TOP_2,
            kept_token_ids=[10, 3, 14, 2],
            kept_token_counts=[2, 0, 2],
            reward=0.25,
        ),
    ]


def mixed_samples() -> list[Sample]:
    """Two groups of unequal size and version."""
    first, second, third, fourth = mixed_trajectories()
    return [
        as_sample(make_group("a", trajectories=[first, second, third]), times_sampled=1),
        as_sample(
            make_group("b", trajectories=[fourth, make_trajectory("b1", version=2, reward=-1.0)]), times_sampled=4
        ),
    ]


def plain_samples(seed: int, *, num_groups: int = 2) -> list[Sample]:
    """Groups of two that differ from seed to seed."""
    samples = []
    for number in range(num_groups):
        token = 3 + (7 * seed + 5 * number) % 20
        trajectories = [
            make_trajectory("good", prompt_ids=[token, 4], response_ids=[token, 9, 2], reward=1.0),
            make_trajectory("bad", prompt_ids=[token, 4], response_ids=[9, token, token, 2], reward=0.0),
        ]
        samples.append(as_sample(make_group(f"g{seed}-{number}", trajectories=trajectories)))
    return samples


def make_policy(model_dir: Path, *, micro_batch_tokens: int = 10_000, compute: ComputeSettings = FLOAT32) -> Policy:
    return Policy.load(model_dir, device="cpu", micro_batch_tokens=micro_batch_tokens, compute=compute)


def make_trainer(
    model_dir: Path,
    *,
    objective: str | Objective = "grpo",
    lr: float = 1e-2,
    micro_batch_tokens: int = 10_000,
    reference_reset_every: int | None = None,
    max_closed_updates: int = 1_000,
    sampler_correction: float = 1.0,
    compute: ComputeSettings = FLOAT32,
    lora: LoraSettings | None = None,
) -> Trainer:
    policy = make_policy(model_dir, micro_batch_tokens=micro_batch_tokens, compute=compute)
    settings = LearnerSettings(
        optimizer=OptimizerSettings(lr=lr, warmup_updates=4, schedule="linear"),
        total_updates=40,
        reference_reset_every=reference_reset_every,
        max_closed_updates=max_closed_updates,
        sampler_correction=sampler_correction,
        compute=compute,
    )
    return Trainer(
        policy=policy if lora is None else AdapterPolicy.on(policy, lora),
        objective=whole(objective) if isinstance(objective, str) else objective,
        settings=settings,
        diagnose=diagnose,
        now=time.monotonic,
    )


def trajectories_of(samples: Sequence[Sample]) -> list[Trajectory]:
    return [trajectory for sample in samples for trajectory in sample.group.trajectories]
