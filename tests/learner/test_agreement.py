"""Engine and learner agree token by token: the ratio of fresh data is 1 under every sampling setting."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from actor.engine import GenerationRequest
from actor.torch_engine import TorchEngine
from buffer.types import SamplingSettings, Trajectory
from learner.collate import collate
from learner.snapshot import take_snapshot
from tests.actor.conftest import CHARACTERS, character_tokenizer
from tests.factories import make_group
from tests.learner.builders import VOCAB, as_sample, make_policy
from tests.learner.stores import keyframe_of

GRID = [
    SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    for temperature in (0.7, 1.0, 1.5)
    for top_p, top_k, min_p in ((1.0, 0, 0.0), (0.8, 0, 0.0), (1.0, 5, 0.0), (1.0, 0, 0.1), (0.9, 8, 0.05))
]


@pytest.fixture(scope="module")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    """An engine that holds what a learner with these weights publishes."""
    directory = tmp_path_factory.mktemp("engine")
    character_tokenizer(CHARACTERS).save_pretrained(directory)
    (directory / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    snapshot = take_snapshot(make_policy(model_dir), dtype="float32", tolerance_nats=0.05)
    (directory / "keyframe").write_bytes(keyframe_of(snapshot))
    engine = TorchEngine(directory, seed=0)
    engine.load(directory / "keyframe", 0)
    assert np.abs(engine.score(snapshot.probe.token_ids) - snapshot.probe.logprobs).max() < 1e-4
    return engine


def _draw(engine: TorchEngine, settings: Sequence[SamplingSettings]) -> list[Trajectory]:
    prompts = [np.asarray([5, 6, 7 + index][: 1 + index % 3], np.int32) for index in range(len(settings))]
    requests = [
        GenerationRequest(prompt_ids=prompt, sampling=sampling, max_new_tokens=12)
        for prompt, sampling in zip(prompts, settings, strict=True)
    ]
    return [
        Trajectory(
            trajectory_id=f"t{index}",
            prompt_ids=request.prompt_ids,
            response_ids=drawn.response_ids,
            response_mask=np.ones(len(drawn.response_ids), np.bool_),
            behavior_logprobs=drawn.behavior_logprobs,
            spans=drawn.spans,
            sampling=request.sampling,
            reward=0.0,
            finish_reason=drawn.finish_reason,
            kept_token_ids=drawn.kept_token_ids,
            kept_token_counts=drawn.kept_token_counts,
        )
        for index, (request, drawn) in enumerate(zip(requests, engine.generate(requests), strict=True))
    ]


def test_the_learner_gives_drawn_tokens_the_log_probs_that_the_engine_gave_them(
    engine: TorchEngine, model_dir: Path
) -> None:
    trajectories = _draw(engine, GRID)
    batch = collate([as_sample(make_group(trajectories=trajectories))], clock=0)

    logprobs = make_policy(model_dir, micro_batch_tokens=60).forward(batch, frozenset()).scores.logprobs

    torch.testing.assert_close(logprobs, batch.behavior_logprobs, atol=1e-4, rtol=0)
    assert sum(t.kept_token_ids is not None and len(t.kept_token_ids) < VOCAB * 12 for t in trajectories) == 12
    assert batch.behavior_logprobs.min() < -1


def test_other_sampling_settings_would_be_noticed(engine: TorchEngine, model_dir: Path) -> None:
    """The agreement above is not an accident: untruncated at temperature 1, the same tokens score differently."""
    trajectories = _draw(engine, GRID)
    plain = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    misread = [trajectory.model_copy(update={"sampling": plain}) for trajectory in trajectories]
    batch = collate([as_sample(make_group(trajectories=misread))], clock=0)

    logprobs = make_policy(model_dir).forward(batch, frozenset()).scores.logprobs

    apart = (logprobs.detach() - batch.behavior_logprobs).abs().amax(-1)
    assert [float(distance) > 0.01 for distance in apart] == [sampling != plain for sampling in GRID]
