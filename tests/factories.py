"""Small valid records made by hand: a test names the fields that matter to it, the rest is unremarkable."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from buffer.codec import encode_group, record_hash
from buffer.types import FinishReason, Group, Part, PolicyVersion, SamplingSettings, Split, Trajectory, VersionSpan
from buffer.weights.manifest import Manifest, Payload, Probe

UNTRUNCATED = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
RUN_ID = "test-run"
PAYLOAD = b"not really tensors"


def make_trajectory(
    trajectory_id: str = "t0",
    *,
    prompt_ids: Sequence[int] = (5, 6, 7),
    response_ids: Sequence[int] = (8, 9, 10, 2),
    response_mask: Sequence[bool] | None = None,
    behavior_logprobs: Sequence[float] | None = None,
    version: int | None = 0,
    spans: Sequence[VersionSpan] | None = None,
    sampling: SamplingSettings = UNTRUNCATED,
    reward: float = 1.0,
    finish_reason: FinishReason = FinishReason.STOP,
    token_rewards: Sequence[float] | None = None,
    episode_id: str | None = None,
    kept_token_ids: Sequence[int] | None = None,
    kept_token_counts: Sequence[int] | None = None,
    distribution_logprobs: Sequence[float] | None = None,
    columns: dict[str, Sequence[float]] | None = None,
) -> Trajectory:
    """Return a trajectory of T = len(response_ids) tokens.

    Without other values, all tokens are drawn under `version`, token i with log-prob -(i + 1) / 8 (exact in float32),
    and 0 where `response_mask` is False.
    """
    length = len(response_ids)
    mask = np.ones(length, np.bool_) if response_mask is None else np.asarray(response_mask, np.bool_)
    if behavior_logprobs is None:
        behavior_logprobs = [-(i + 1) / 8 if drawn else 0.0 for i, drawn in enumerate(mask)]
    return Trajectory(
        trajectory_id=trajectory_id,
        prompt_ids=np.asarray(prompt_ids, np.int32),
        response_ids=np.asarray(response_ids, np.int32),
        response_mask=mask,
        behavior_logprobs=np.asarray(behavior_logprobs, np.float32),
        spans=tuple(spans) if spans is not None else (VersionSpan(start=0, end=length, version=version),),
        sampling=sampling,
        reward=float(reward),
        finish_reason=finish_reason,
        token_rewards=None if token_rewards is None else np.asarray(token_rewards, np.float32),
        episode_id=episode_id,
        kept_token_ids=None if kept_token_ids is None else np.asarray(kept_token_ids, np.int32),
        kept_token_counts=None if kept_token_counts is None else np.asarray(kept_token_counts, np.int32),
        distribution_logprobs=None if distribution_logprobs is None else np.asarray(distribution_logprobs, np.float32),
        columns={name: np.asarray(column, np.float32) for name, column in (columns or {}).items()},
    )


def make_group(
    group_id: str = "g0",
    *,
    run_id: str = RUN_ID,
    prompt_id: str = "p0",
    split: Split = Split.TRAIN,
    version: int | None = 0,
    rewards: Sequence[float] = (1.0, 0.0),
    trajectories: Sequence[Trajectory] | None = None,
) -> Group:
    """Return a group; without `trajectories`, one ragged trajectory per reward, drawn under `version`.

    Trajectory i is named `<group_id>-<i>` and has 4 + i % 3 response tokens.
    """
    if trajectories is None:
        trajectories = [
            make_trajectory(
                f"{group_id}-{i}", response_ids=[*range(8, 11 + i % 3), 2], version=version, reward=float(reward)
            )
            for i, reward in enumerate(rewards)
        ]
    return Group(run_id=run_id, group_id=group_id, prompt_id=prompt_id, split=split, trajectories=tuple(trajectories))


def content_hash(group: Group) -> str:
    """Return the content hash that a table gives the group."""
    return record_hash(encode_group(group))


def parts_of(group_id: str = "g0", *, size: int, **fields: Any) -> list[Part]:
    """Return the parts of make_group(group_id) with `size` rewards of 0; `fields` are further ones of make_group."""
    group = make_group(group_id, rewards=(0.0,) * size, **fields)
    return [
        Part(
            run_id=group.run_id,
            group_id=group_id,
            prompt_id=group.prompt_id,
            split=group.split,
            group_size=size,
            trajectory=trajectory,
        )
        for trajectory in group.trajectories
    ]


def make_manifest(version: PolicyVersion, *, payload: bytes = PAYLOAD, run_id: str = RUN_ID) -> Manifest:
    """Return a manifest of one payload; its probe is arbitrary."""
    return Manifest(
        run_id=run_id,
        version=version,
        created_s=1.5,
        model_fingerprint=sha256(b"model").hexdigest(),
        checksum=sha256(payload).hexdigest(),
        payloads=(
            Payload(kind="keyframe", version=version, sha256=sha256(payload).hexdigest(), size_bytes=len(payload)),
        ),
        probe=Probe(
            token_ids=np.asarray([1, 2, 3], np.int32), logprobs=np.asarray([-0.5, -1.25], np.float32), tolerance=0.1
        ),
    )
