"""One clear sentence for each way in which a submitted group can be wrong."""

import copy
from typing import Any

import pytest

from buffer.codec import group_from_record
from buffer.errors import InvalidRecord
from tests.factories import make_group

BASE: dict[str, Any] = make_group("g0").model_dump(mode="json")
DELETE = object()

CASES: dict[str, tuple[str, object, str]] = {
    # name: (dotted path, value, sentence after "group 'g0': ")
    "missing run": ("run_id", DELETE, "run_id: field required"),
    "unknown field": ("color", "red", "color: extra inputs are not permitted, got 'red'"),
    "unknown split": ("split", "test", "split: input should be 'train' or 'eval', got 'test'"),
    "no trajectories": ("trajectories", [], "trajectories: tuple should have at least 1 item after validation, not 0, "
                        "got list of 0 items"),
    "trajectory id twice": ("trajectories.1.trajectory_id", "g0-0", "trajectory_id must be unique within a group"),
    "id with a space": ("prompt_id", "a b", "prompt_id: string should match pattern "
                        "'^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$', got 'a b'"),
    "reward NaN": ("trajectories.1.reward", float("nan"), "trajectories.1.reward: input should be a finite number, "
                   "got nan"),
    "reward too large": ("trajectories.0.reward", 1e300, "trajectories.0.reward: input should be less than or equal "
                         "to 1000000000000000000, got 1e+300"),
    "reward a boolean": ("trajectories.0.reward", True, "trajectories.0.reward: input should be a valid number, "
                         "got True"),
    "reward a string": ("trajectories.0.reward", "1", "trajectories.0.reward: input should be a valid number, got '1'"),
    "no prompt": ("trajectories.0.prompt_ids", [], "trajectories.0: prompt_ids and response_ids need at least one "
                  "token each"),
    "negative token": ("trajectories.0.response_ids", [8, -1, 10, 2], "trajectories.0: token ids must not be negative"),
    "token of 40 bits": ("trajectories.0.response_ids", [8, 1 << 40, 10, 2], "trajectories.0.response_ids: an integer "
                         "does not fit 32 bits, got list of 4 items"),
    "tokens as text": ("trajectories.0.response_ids", "8 9", "trajectories.0.response_ids: expected bytes or a list, "
                       "got str, got '8 9'"),
    "half a token": ("trajectories.0.response_ids", b"\1\2\3", "trajectories.0.response_ids: 3 bytes are not a whole "
                     "number of 4-byte values, got bytes of 3 bytes"),
    "mask byte 2": ("trajectories.0.response_mask", b"\1\2\0\1", "trajectories.0.response_mask: a mask byte must be 0 "
                    "or 1, got bytes of 4 bytes"),
    "mask too short": ("trajectories.0.response_mask", [True], "trajectories.0: response_mask has 1 entries for 4 "
                       "response tokens"),
    "nothing trained": ("trajectories.0.response_mask", [False] * 4, "trajectories.0: response_mask has no trained "
                        "token"),
    "log-prob above 0": ("trajectories.0.behavior_logprobs", [-1, 0.5, -1, -1], "trajectories.0: behavior_logprobs "
                         "must not be above 0"),
    "log-prob NaN": ("trajectories.0.behavior_logprobs", [-1, float("nan"), -1, -1], "trajectories.0: "
                     "behavior_logprobs must be finite: a token that was drawn has a probability above 0"),
    "log-prob missing": ("trajectories.0.behavior_logprobs", DELETE, "trajectories.0.behavior_logprobs: field "
                         "required"),
    "log-prob behind the mask": ("trajectories.0.response_mask", [True, False, True, True], "trajectories.0: "
                                 "behavior_logprobs must be 0 where response_mask is 0"),
    "spans leave a gap": ("trajectories.0.spans", [{"start": 1, "end": 4, "version": 0}], "trajectories.0: spans must "
                          "tile the response in order: [1, 4) after 0"),
    "spans too short": ("trajectories.0.spans", [{"start": 0, "end": 3, "version": 0}], "trajectories.0: spans end at "
                        "3, the response has 4 tokens"),
    "version negative": ("trajectories.0.spans.0.version", -1, "trajectories.0.spans.0.version: input should be "
                         "greater than or equal to 0, got -1"),
    "version beyond counting": ("trajectories.0.spans.0.version", 1 << 60, "trajectories.0.spans.0.version: input "
                                "should be less than 9007199254740992, got 1152921504606846976"),
    "temperature 0": ("trajectories.0.sampling.temperature", 0.0, "trajectories.0.sampling.temperature: input should "
                      "be greater than 0, got 0.0"),
    "cut support without ids": ("trajectories.0.sampling.top_k", 5, "trajectories.0: top_p, top_k or min_p cut the "
                                "support: kept_token_ids and kept_token_counts are required"),
    "column too long": ("trajectories.0.columns", {"entropy": [0.5] * 5}, "trajectories.0: columns.entropy has 5 "
                        "entries for 4 response tokens"),
    "column NaN": ("trajectories.0.columns", {"entropy": [0.5, float("nan"), 0, 0]}, "trajectories.0: columns.entropy "
                   "must be finite"),
    "column infinite": ("trajectories.1.columns", {"entropy": [0.5, 0, 0, 0, float("inf")]}, "trajectories.1: "
                        "columns.entropy must be finite"),
    "too many columns": ("trajectories.0.columns", {f"c{i}": [0.5] * 4 for i in range(257)}, "trajectories.0.columns: "
                         "dictionary should have at most 256 items after validation, not more"),
    "unknown finish": ("trajectories.0.finish_reason", "eos", "trajectories.0.finish_reason: input should be 'stop', "
                       "'length' or 'abort', got 'eos'"),
}  # fmt: skip


def changed(path: str, value: object) -> dict[str, Any]:
    """Return BASE with one value replaced, or deleted."""
    record = copy.deepcopy(BASE)
    *parents, last = path.split(".")
    place: Any = record
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return record


@pytest.mark.parametrize("name", CASES)
def test_sentence_names_the_field_the_fault_and_the_value(name: str) -> None:
    path, value, sentence = CASES[name]

    with pytest.raises(InvalidRecord) as caught:
        group_from_record(changed(path, value))

    assert caught.value.detail == f"group 'g0': {sentence}"


def test_a_fault_in_the_only_trajectory_is_one_fault() -> None:
    record = make_group("g0", rewards=(1.0,)).model_dump(mode="json")
    record["trajectories"][0]["reward"] = "1"

    with pytest.raises(InvalidRecord, match=r"input should be a valid number, got '1'$"):
        group_from_record(record)


def test_sentence_counts_the_other_faults_and_keeps_long_values_short() -> None:
    record = changed("run_id", "x" * 10_000)
    record["split"] = "test"

    with pytest.raises(InvalidRecord) as caught:
        group_from_record(record)

    assert len(caught.value.detail) < 250
    assert caught.value.detail.endswith("... (and 1 more)")


@pytest.mark.parametrize("record", [None, [], "group", 7])
def test_what_is_not_a_map_is_refused(record: object) -> None:
    with pytest.raises(InvalidRecord, match="valid dictionary"):
        group_from_record(record)


def test_a_negative_kept_id_is_refused() -> None:
    record = changed("trajectories.0.kept_token_ids", [8, -5, 9, 10, 2])
    record["trajectories"][0]["kept_token_counts"] = [2, 1, 1, 1]

    with pytest.raises(InvalidRecord, match="kept_token_ids must not be negative"):
        group_from_record(record)
