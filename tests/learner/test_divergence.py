"""Divergences of shipped distributions: by hand, and from a real engine through the record to the gate of a recipe."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from actor.engine import GenerationRequest
from actor.torch_engine import TorchEngine
from buffer.codec import decode_group, encode_group, group_from_record
from buffer.types import Group, SamplingSettings, Trajectory
from learner.admission import Admission, Refusal
from learner.collate import Batch, collate
from learner.divergence import kl_divergence, kl_lower_bound, total_variation
from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import build_objective
from learner.policy import Policy
from learner.scoring import available_divergences
from learner.settings import ComputeSettings
from learner.snapshot import take_snapshot
from learner.step import Trainer
from learner.tokens import DIVERGENCES, Column
from tests.actor.conftest import CHARACTERS, character_tokenizer
from tests.factories import UNTRUNCATED, make_group, make_trajectory
from tests.learner.builders import VOCAB, as_sample, make_policy, make_trainer
from tests.learner.stores import keyframe_of

GRID = [
    SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, min_p=0.0)
    for temperature in (0.7, 1.0, 1.5)
    for top_p, top_k in ((1.0, 0), (0.8, 0), (1.0, 5))
]


@pytest.fixture(scope="module")
def moved_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy that learns: the engine's weights, moved a little."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    directory = tmp_path_factory.mktemp("moved")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def group(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Group:
    """What a real engine drew and shipped, through both encodings of the wire."""
    directory = tmp_path_factory.mktemp("engine")
    character_tokenizer(CHARACTERS).save_pretrained(directory)
    (directory / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    snapshot = take_snapshot(make_policy(model_dir), dtype="float32", tolerance_nats=0.05)
    (directory / "keyframe").write_bytes(keyframe_of(snapshot))
    engine = TorchEngine(directory, seed=0, ship_distributions=True)
    engine.load(directory / "keyframe", 0)
    requests = [
        GenerationRequest(
            prompt_ids=np.asarray([5, 6, 7][: 1 + index % 3], np.int32), sampling=sampling, max_new_tokens=9
        )
        for index, sampling in enumerate(GRID)
    ]
    trajectories = [
        Trajectory(
            trajectory_id=f"t{index}",
            prompt_ids=request.prompt_ids,
            response_ids=drawn.response_ids,
            response_mask=np.ones(len(drawn.response_ids), np.bool_),
            behavior_logprobs=drawn.behavior_logprobs,
            spans=drawn.spans,
            sampling=request.sampling,
            reward=float(index % 2),
            finish_reason=drawn.finish_reason,
            kept_token_ids=drawn.kept_token_ids,
            kept_token_counts=drawn.kept_token_counts,
            distribution_logprobs=drawn.distribution_logprobs,
        )
        for index, (request, drawn) in enumerate(zip(requests, engine.generate(requests), strict=True))
    ]
    over_msgpack = decode_group(encode_group(make_group(trajectories=trajectories)), max_bytes=1 << 20)
    return group_from_record(json.loads(json.dumps(over_msgpack.model_dump(mode="json"), allow_nan=False)))


def probabilities(model: PreTrainedModel, trajectory: Trajectory) -> Tensor:
    """[T, V] float64: what the model itself says of each position, cut to the kept ids and renormalised."""
    ids = torch.from_numpy(np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0].double()
    p = (logits[len(trajectory.prompt_ids) - 1 : -1] / trajectory.sampling.temperature).softmax(-1)
    if trajectory.kept_token_ids is not None and trajectory.kept_token_counts is not None:
        start = 0
        for row, count in zip(p, trajectory.kept_token_counts.tolist(), strict=True):
            kept = trajectory.kept_token_ids[start : start + count].tolist()
            row[[v for v in range(VOCAB) if v not in kept]] = 0.0
            start += count
        p /= p.sum(-1, keepdim=True)
    return p


def directly(model_dir: Path, moved_dir: Path, group: Group) -> list[list[tuple[float, float]]]:
    """KL and TV of every token, summed over the vocabulary in plain Python from two models' logits."""
    old, new = AutoModelForCausalLM.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(moved_dir)
    return [
        [
            (
                sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0),
                sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
            )
            for p, q in zip(probabilities(old, t).tolist(), probabilities(new, t).tolist(), strict=True)
        ]
        for t in group.trajectories
    ]


def columns(policy: Policy, batch: Batch, wanted: frozenset[Column] = DIVERGENCES) -> dict[Column, Tensor]:
    return policy.forward(batch, wanted).scores.columns


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 30])
def test_exact_kl_and_tv_equal_a_direct_computation_from_two_models(
    model_dir: Path, moved_dir: Path, group: Group, micro_batch_tokens: int
) -> None:
    batch = collate([as_sample(group)], clock=1)

    found = columns(make_policy(moved_dir, micro_batch_tokens=micro_batch_tokens), batch)

    expected = directly(model_dir, moved_dir, group)
    for i, row in enumerate(expected):
        kl, tv = zip(*row, strict=True)
        assert found[Column.EXACT_KL][i, : len(row)].tolist() == pytest.approx(kl, abs=2e-5)
        assert found[Column.EXACT_TV][i, : len(row)].tolist() == pytest.approx(tv, abs=2e-5)
        assert found[Column.KL_LOWER_BOUND][i, : len(row)].tolist() == pytest.approx(kl, abs=2e-5)
        assert not found[Column.EXACT_KL][i, len(row) :].any()
    assert max(kl for row in expected for kl, _ in row) > 0.01
    assert not any(values.requires_grad for values in found.values())


def test_a_policy_that_has_not_moved_is_at_no_distance(model_dir: Path, group: Group) -> None:
    found = columns(make_policy(model_dir), collate([as_sample(group)], clock=0))

    assert found[Column.EXACT_KL].max() < 1e-6
    assert found[Column.EXACT_TV].max() < 1e-4
    assert found[Column.EXACT_KL].min() >= 0


@pytest.mark.parametrize("truncated", [False, True])
def test_a_hole_in_the_mask_moves_no_other_token(moved_dir: Path, group: Group, truncated: bool) -> None:
    whole = next(t for t in group.trajectories if len(t.response_ids) > 4 and t.sampling.truncates == truncated)
    assert whole.distribution_logprobs is not None
    mask = np.arange(len(whole.response_ids)) != 1
    counts = np.full(len(mask), VOCAB) if whole.kept_token_counts is None else whole.kept_token_counts
    trained = np.repeat(mask, counts)
    holed = {"response_mask": mask, "behavior_logprobs": np.where(mask, whole.behavior_logprobs, np.float32(0))}
    if whole.kept_token_ids is None:
        holed["distribution_logprobs"] = np.where(trained, whole.distribution_logprobs, np.float32(0))
    else:
        holed["distribution_logprobs"] = whole.distribution_logprobs[trained]
        holed["kept_token_ids"] = whole.kept_token_ids[trained]
        holed["kept_token_counts"] = np.where(mask, counts, 0).astype(np.int32)
    with_hole = Trajectory.model_validate(whole.model_copy(update=holed).model_dump())

    def scored(trajectory: Trajectory) -> dict[Column, Tensor]:
        return columns(make_policy(moved_dir), collate([as_sample(make_group(trajectories=[trajectory]))], clock=1))

    before, after = scored(whole), scored(with_hole)

    for column in DIVERGENCES:
        torch.testing.assert_close(after[column], torch.where(torch.from_numpy(mask), before[column], 0.0))


def test_pinsker_holds_at_every_token(moved_dir: Path, group: Group) -> None:
    found = columns(make_policy(moved_dir), collate([as_sample(group)], clock=1))

    assert (found[Column.EXACT_TV] <= (found[Column.EXACT_KL] / 2).sqrt() + 1e-6).all()


def test_the_gate_of_exact_trm_reads_what_the_actor_shipped(model_dir: Path, moved_dir: Path, group: Group) -> None:
    largest = [max(kl for kl, _ in row) for row in directly(model_dir, moved_dir, group)]
    threshold = float(np.median(largest)) * 1.001
    objective = build_objective("trm", {"max_k2": "inf", "max_kl": threshold})
    trainer = make_trainer(moved_dir, objective=objective)

    batch = collate([as_sample(group)], clock=1)
    tokens = trainer.tokens(batch, trainer.policy.forward(batch, DIVERGENCES))
    loss = objective(tokens, {})

    assert loss.gates["trust_region_max"].all(-1).tolist() == [kl <= threshold for kl in largest]
    assert diagnose(tokens, loss)["trust_region/kl_nats_max"] == pytest.approx(max(largest), abs=2e-5)


def updated(trainer: Trainer, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    return trainer.update(collate([as_sample(make_group(trajectories=trajectories))], clock=1))


def test_divergences_do_not_depend_on_the_chunks(
    moved_dir: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.head._SMALLEST_CHUNK_LOGITS", 1)
    batch = collate([as_sample(group)], clock=0)
    whole = columns(make_policy(moved_dir), batch, DIVERGENCES)

    by_chunks = columns(make_policy(moved_dir, compute=ComputeSettings(logits_chunk_tokens=2)), batch, DIVERGENCES)

    assert whole.keys() == by_chunks.keys() == DIVERGENCES
    for name, values in whole.items():
        torch.testing.assert_close(by_chunks[name], values, atol=1e-5, rtol=1e-5)


def test_an_update_reports_exact_bounds_with_shipped_distributions_and_estimates_without(
    moved_dir: Path, group: Group
) -> None:
    bare = [t.model_copy(update={"distribution_logprobs": None}) for t in group.trajectories]

    exact = updated(make_trainer(moved_dir), group.trajectories)
    mixed = updated(make_trainer(moved_dir), [*group.trajectories[:-1], bare[-1]])
    estimated = updated(make_trainer(moved_dir), bare)

    assert "trust_region/bound_best" in exact
    assert "trust_region/bound_best_estimate" not in exact
    assert "trust_region/bound_best" not in mixed
    assert "trust_region/bound_best_estimate" in estimated
    assert estimated == {
        **estimated,
        **{name: value for name, value in mixed.items() if not name.startswith("time/")},
        **{name: value for name, value in estimated.items() if name.startswith("time/")},
    }


def test_the_most_likely_ids_alone_prove_a_lower_bound(model_dir: Path, moved_dir: Path, group: Group) -> None:
    """Top 3 of an untruncated distribution: never above the KL, and 0 only where nothing differs."""
    plain = next(t for t in group.trajectories if t.sampling == UNTRUNCATED)
    assert plain.distribution_logprobs is not None
    rows = plain.distribution_logprobs.reshape(-1, VOCAB)
    ids = [
        sorted({int(drawn), *np.argsort(row)[-3:].tolist()})
        for row, drawn in zip(rows, plain.response_ids, strict=True)
    ]
    part = plain.model_copy(
        update={
            "kept_token_ids": np.asarray([v for kept in ids for v in kept], np.int32),
            "kept_token_counts": np.asarray([len(kept) for kept in ids], np.int32),
            "distribution_logprobs": np.concatenate([row[kept] for row, kept in zip(rows, ids, strict=True)]),
        }
    )
    part = Trajectory.model_validate(part.model_dump())
    batch = collate([as_sample(make_group(trajectories=[part]))], clock=1)

    assert available_divergences(batch.distributions) == {Column.KL_LOWER_BOUND}
    bound = columns(make_policy(moved_dir), batch, available_divergences(batch.distributions))[Column.KL_LOWER_BOUND]

    exact = [kl for kl, _ in directly(model_dir, moved_dir, make_group(trajectories=[plain]))[0]]
    assert all(low <= kl + 1e-6 for low, kl in zip(bound[0].tolist(), exact, strict=True))
    assert bound.min() > 0
    assert bound.sum() < 0.99 * sum(exact)
    mixed = collate(
        [as_sample(make_group(trajectories=[plain.model_copy(update={"trajectory_id": "p"}), part]))], clock=1
    )
    assert available_divergences(mixed.distributions) == {Column.KL_LOWER_BOUND}


def test_divergences_of_hand_made_rows() -> None:
    behavior = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [0.5, 0.5, 0.0]]).log()
    policy = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25], [0.3, 0.6, 0.1], [0.5, 0.5, 0.0]]).log()

    # the rows of worked example 1; then 0.6 ln 2 + 0.4 ln (2 / 3), where an id that cannot be drawn adds nothing
    assert kl_divergence(behavior, policy).tolist() == pytest.approx([0.026812, 0.010068, 0.253702, 0.0], abs=1e-6)
    assert total_variation(behavior, policy).tolist() == pytest.approx([0.1, 0.05, 0.3, 0.0], abs=1e-6)


def test_a_lower_bound_lumps_what_was_not_listed() -> None:
    whole = torch.tensor([[0.5, 0.3, 0.2]]).log()
    policy = torch.tensor([[0.5, 0.2, 0.3]]).log()
    first = torch.tensor([[0.5, 0.0, 0.0]]).log()
    second = torch.tensor([[0.0, 0.3, 0.0]]).log()

    assert kl_lower_bound(first, policy).item() == pytest.approx(0.0, abs=1e-6)  # 0.5 and the rest 0.5: no difference
    # 0.3 ln 1.5 + 0.7 ln (0.7 / 0.8)
    assert kl_lower_bound(second, policy).item() == pytest.approx(0.028168, abs=1e-6)
    assert kl_lower_bound(whole, policy).item() == pytest.approx(kl_divergence(whole, policy).item(), abs=1e-6)
    assert kl_divergence(whole, policy).item() == pytest.approx(0.040547, abs=1e-6)


def test_data_without_the_distributions_that_the_objective_needs_is_refused_by_name(group: Group) -> None:
    admission = Admission(
        max_age_updates=None, vocab_size=VOCAB, max_positions=64, columns=frozenset({Column.EXACT_KL})
    )
    part_will_do = replace(admission, columns=frozenset({Column.KL_LOWER_BOUND}))
    bare = make_group("bare", trajectories=[make_trajectory()])
    part = make_group(
        "part",
        trajectories=[
            make_trajectory(
                response_ids=[4],
                behavior_logprobs=[-0.5],
                kept_token_ids=[4],
                kept_token_counts=[1],
                distribution_logprobs=[-0.5],
            )
        ],
    )
    samples = [as_sample(one) for one in (group, bare, part)]

    admitted, refused, sentences = admission.split(samples, clock=1)

    assert [sample.group.group_id for sample in admitted] == [group.group_id]
    assert refused == {Refusal.NO_DISTRIBUTION: 2}
    assert sentences[0] == "group bare is not trained on: it lacks the distributions that the objective needs"
    assert [s.group.group_id for s in part_will_do.split(samples, clock=1)[0]] == [group.group_id, "part"]


def test_rows_wider_than_the_model_are_refused(group: Group) -> None:
    admission = Admission(max_age_updates=None, vocab_size=VOCAB - 1, max_positions=64)
    plain = [t for t in group.trajectories if t.sampling == UNTRUNCATED]
    low_ids = [t for t in plain if max(*t.prompt_ids, *t.response_ids) < VOCAB - 1]
    assert low_ids

    assert admission.split([as_sample(make_group(trajectories=low_ids))], clock=1)[1] == {Refusal.UNKNOWN_TOKEN: 1}
