"""Where the fuzzers start: valid records and bodies that use every field."""

from pathlib import Path

import numpy as np

from buffer.codec import encode_group
from buffer.selectors import Mix
from buffer.table import Wait
from buffer.types import Group, SamplingSettings, Split, VersionSpan
from buffer.wire import JSON, MSGPACK, Heartbeat, InsertRequest, LearnerReport, TimedSampleRequest, encode
from tests.factories import make_group, make_trajectory


def groups() -> list[Group]:
    """Return small groups: plain, foreign, of two versions, with cut support, with every optional field."""
    third = float(np.log(np.float32(1 / 3)))
    rich = make_trajectory(
        "rich",
        response_ids=[8, 9, 2],
        response_mask=[True, False, True],
        behavior_logprobs=[third, 0.0, third],
        spans=[VersionSpan(start=0, end=2, version=0), VersionSpan(start=2, end=3, version=7)],
        sampling=SamplingSettings(temperature=0.7, top_p=0.9, top_k=3, min_p=0.0),
        token_rewards=[0.0, 0.0, 1.0],
        episode_id="episode-1",
        kept_token_ids=[7, 8, 9, 1, 2, 3],
        kept_token_counts=[3, 0, 3],
        distribution_logprobs=[third] * 6,
        columns={"entropy": [0.5, 0.0, 0.25], "values": [1.0, 2.0, 3.0]},
    )
    foreign = make_trajectory("foreign", version=None)
    return [
        make_group("plain"),
        make_group("eval", split=Split.EVAL, rewards=[0.25]),
        make_group("rich", trajectories=[rich, foreign]),
    ]


def write_corpus(target: str, directory: Path) -> None:
    """Write one file per record that a target of codec_target.py may read."""
    directory.mkdir(parents=True)
    if target == "stored_record":
        records = [encode_group(group) for group in groups()]
    else:
        media_type = MSGPACK if target == "msgpack_body" else JSON
        bodies = [
            *(InsertRequest(groups=[group]) for group in groups()),
            TimedSampleRequest(
                num_groups=4, learner_version=3, request_id="r", selector=Mix(fresh=0.25), timeout_s=0.5
            ),
            Heartbeat(version=3, tokens_per_s=10.5, groups_total=7, state="generating"),
            LearnerReport(
                updates=4, version=3, metrics={"a/b": 0.5}, waiting=Wait(who="learner", since_s=1, reason="")
            ),
        ]
        records = [encode(body, media_type) for body in bodies]
    for number, record in enumerate(records):
        (directory / f"seed-{number}").write_bytes(record)
