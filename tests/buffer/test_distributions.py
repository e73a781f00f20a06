"""Shipped distributions: whole rows or kept ids, and one sentence for what they cannot be."""

import json
import math
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from buffer.codec import decode_group, encode_group, group_from_record
from buffer.types import SamplingSettings, Trajectory
from tests.factories import UNTRUNCATED, content_hash, make_group, make_trajectory

TOP_2 = SamplingSettings(temperature=1.0, top_p=1.0, top_k=2, min_p=0.0)
ROWS = [[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]


def logs(probabilities: Sequence[float]) -> list[float]:
    return [math.log(p) for p in probabilities]


def whole(
    *, drawn: Sequence[int] = (0, 1), rows: Sequence[Sequence[float]] = ROWS, behavior: Sequence[float] | None = None
) -> Trajectory:
    """Two drawn tokens around one of a tool, with a row over three ids each."""
    return make_trajectory(
        response_ids=[drawn[0], 2, drawn[1]],
        response_mask=[True, False, True],
        behavior_logprobs=behavior or [math.log(rows[0][drawn[0]]), 0.0, math.log(rows[1][drawn[1]])],
        distribution_logprobs=[*logs(rows[0]), 0.0, 0.0, 0.0, *logs(rows[1])],
    )


def kept(
    probabilities: Sequence[float] = (0.5, 0.5, 0.75, 0.25),
    *,
    ids: Sequence[int] = (7, 4, 4, 9),
    sampling: SamplingSettings = TOP_2,
    behavior: float = 0.5,
) -> Trajectory:
    """Two drawn tokens, two kept ids each."""
    return make_trajectory(
        response_ids=[4, 9],
        behavior_logprobs=[math.log(behavior), math.log(0.25)],
        sampling=sampling,
        kept_token_ids=ids,
        kept_token_counts=[2, 2],
        distribution_logprobs=logs(probabilities),
    )


@pytest.mark.parametrize("trajectory", [whole(), kept(), kept([0.25, 0.5, 0.5, 0.25], sampling=UNTRUNCATED)])
def test_a_distribution_survives_msgpack_and_json_bit_by_bit(trajectory: Trajectory) -> None:
    group = make_group(trajectories=[trajectory])

    decoded = decode_group(encode_group(group), max_bytes=1 << 20)
    text = json.dumps(group.model_dump(mode="json"), allow_nan=False)

    assert encode_group(decoded) == encode_group(group)
    assert content_hash(group_from_record(json.loads(text))) == content_hash(group)
    shipped = decoded.trajectories[0].distribution_logprobs
    assert shipped is not None
    assert shipped.tobytes() == trajectory.distribution_logprobs.tobytes()  # type: ignore[union-attr]  # it has one


def test_kept_ids_are_the_whole_distribution_only_where_sampling_cut_the_others() -> None:
    assert whole().distribution_is_complete
    assert kept().distribution_is_complete
    assert not kept([0.25, 0.5, 0.5, 0.25], sampling=UNTRUNCATED).distribution_is_complete


def test_whole_rows_are_refused_in_one_sentence() -> None:
    for arguments, sentence in (
        ({"rows": [[0.5, 0.25, 0.2], ROWS[1]]}, "response token 0 sums to 0.95, not to 1"),
        ({"rows": [ROWS[0], [0.5, 0.75, 0.125]]}, "response token 2 sums to 1.375, not to 1"),
        ({"behavior": [math.log(0.4), 0.0, math.log(0.75)]}, "token 0 -0.693147 nats, behavior_logprobs -0.916291"),
    ):
        with pytest.raises(ValidationError, match=sentence):
            whole(**arguments)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([-1.0] * 3, "has 3 entries, no multiple of 2 tokens"),
        ([], "has 0 entries, no multiple of 2 tokens"),
        ([math.log(0.5)] * 4, "has 2 ids a token, a response token lies beyond them"),
        ([0.0, -math.inf, -math.inf] * 2, "finite and not above 0: leave out ids that cannot be drawn"),
        ([0.5, -1.0, -1.0] * 2, "finite and not above 0"),
        ([math.nan] * 6, "finite and not above 0"),
    ],
)
def test_values_that_are_no_rows_are_refused(values: list[float], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        make_trajectory(response_ids=[0, 2], behavior_logprobs=[-0.5, -0.5], distribution_logprobs=values)


def test_rows_of_masked_tokens_are_zero() -> None:
    with pytest.raises(ValidationError, match="distribution_logprobs must be 0 where response_mask is 0"):
        make_trajectory(
            response_ids=[0, 1],
            response_mask=[True, False],
            behavior_logprobs=[math.log(0.5), 0.0],
            distribution_logprobs=[math.log(0.5)] * 4,
        )


def test_kept_ids_and_their_log_probs_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValidationError, match="has 3 entries for 4 kept_token_ids"):
        kept([0.5, 0.5, 0.75])
    with pytest.raises(ValidationError, match=r"token 0 sums to 0\.75, not to 1"):
        kept([0.25, 0.5, 0.75, 0.25])
    with pytest.raises(ValidationError, match=r"token 1 sums to 1\.25, not to 1"):
        kept([0.25, 0.5, 1.0, 0.25], sampling=UNTRUNCATED)
    with pytest.raises(ValidationError, match=r"token 0 -0\.693147 nats, behavior_logprobs -1\.38629"):
        kept(behavior=0.25)
    with pytest.raises(ValidationError, match="name an id twice for one token"):
        kept(ids=[4, 4, 4, 9])


def test_kept_ids_of_a_masked_token_are_refused() -> None:
    with pytest.raises(ValidationError, match="kept_token_counts must be 0 where response_mask is 0"):
        make_trajectory(
            response_ids=[4, 9],
            response_mask=[True, False],
            sampling=TOP_2,
            kept_token_ids=[4, 9],
            kept_token_counts=[1, 1],
        )
