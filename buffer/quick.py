"""Groups read from msgpack records without pydantic: many times faster, and never of another opinion.

Two readers for the usual case of a record in canonical form. Both build frozen records around the bytes that they were
given. What they cannot read, or do not like, is left to pydantic, which decides and finds the words:

valid_group     for what a stranger sent: checks everything that pydantic checks, on raw arrays of the whole group
intact_group    for what a table validated on its way in: checks shapes and sizes, so that a damaged record is noticed
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from math import copysign
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from buffer.types import (
    IDENTIFIER_PATTERN,
    MAX_COLUMNS,
    MAX_ITEMS,
    MAX_LOGPROB,
    MAX_REWARD,
    FinishReason,
    Group,
    Record,
    Sample,
    SampleInfo,
    SamplingSettings,
    Split,
    Trajectory,
    VersionSpan,
)

R = TypeVar("R", bound=Record)

_GROUP_FIELDS = tuple(Group.model_fields)
_TRAJECTORY_FIELDS = tuple(Trajectory.model_fields)
_SPAN_FIELDS = tuple(VersionSpan.model_fields)
_SAMPLING_FIELDS = tuple(SamplingSettings.model_fields)
_NO_OPTIONAL = [field.default for name, field in Trajectory.model_fields.items() if not field.is_required()]
_SPLITS = {split.value: split for split in Split}
_FINISH_REASONS = {reason.value: reason for reason in FinishReason}
_INT32, _FLOAT32, _BOOL = np.dtype("<i4"), np.dtype("<f4"), np.dtype(np.bool_)
_LOWEST = float(np.finfo(np.float32).min)
_MAX_VERSION = 1 << 53

_FIELDS_OF: dict[type[Record], set[str]] = {
    kind: set(kind.model_fields) for kind in (Group, Trajectory, VersionSpan, Sample, SampleInfo)
}
_set = object.__setattr__
_is_identifier = re.compile(IDENTIFIER_PATTERN[:-1] + r"\Z").match


class _Unclear(Exception):
    """This reader cannot tell: pydantic has to."""


def valid_group(record: object) -> Group | None:
    """Return the group if it is surely valid; None when pydantic has to decide."""
    try:
        group = _group(record)
        _check_values(record["trajectories"])  # type: ignore[index]  # _group has seen that it is a map
        for trajectory in group.trajectories:
            _check_optional(trajectory)
    except (_Unclear, ValueError):
        return None
    return group


def intact_group(record: object) -> Group | None:
    """Return a group that was validated before; None when it is not in the form in which it was stored."""
    try:
        return _group(record)
    except (_Unclear, ValueError):
        return None


def _group(record: object) -> Group:
    _require(type(record) is dict and tuple(record) == _GROUP_FIELDS)
    run_id, group_id, prompt_id, split, plain = cast("dict[str, Any]", record).values()
    for name in (run_id, group_id, prompt_id):
        _require(type(name) is str and _is_identifier(name))
    _require(type(split) is str and split in _SPLITS)
    _require(type(plain) is list and 1 <= len(plain) <= MAX_ITEMS)
    trajectories = tuple(map(_trajectory, plain))
    _require(len({trajectory.trajectory_id for trajectory in trajectories}) == len(trajectories))
    return made(
        Group,
        {
            "run_id": run_id,
            "group_id": group_id,
            "prompt_id": prompt_id,
            "split": _SPLITS[split],
            "trajectories": trajectories,
        },
    )


def _trajectory(record: Any) -> Trajectory:
    _require(type(record) is dict and tuple(record) == _TRAJECTORY_FIELDS)
    fields = record.copy()
    name, prompt_ids, response_ids, mask, logprobs, spans, sampling, reward, finish_reason, *optional = record.values()
    fields["response_ids"] = response_ids = _array(response_ids, _INT32)
    fields["prompt_ids"] = prompt_ids = _array(prompt_ids, _INT32)
    length = len(response_ids)
    fields["response_mask"] = _array(mask, _BOOL, length)
    fields["behavior_logprobs"] = _array(logprobs, _FLOAT32, length)
    fields["spans"] = _spans(spans, length)
    fields["sampling"] = _sampling(sampling)
    fields["finish_reason"] = _FINISH_REASONS.get(finish_reason) if type(finish_reason) is str else None
    if not (
        type(name) is str
        and _is_identifier(name)
        and type(reward) is float
        and -MAX_REWARD <= reward <= MAX_REWARD
        and fields["finish_reason"]
        and length
        and len(prompt_ids)
    ):
        raise _Unclear
    if optional != _NO_OPTIONAL:
        _read_optional(record, fields, length)
    return made(Trajectory, fields)


def _read_optional(record: dict[str, Any], fields: dict[str, Any], length: int) -> None:
    """Read the fields that most trajectories do not have."""
    episode_id, columns = record["episode_id"], record["columns"]
    _require(episode_id is None or (type(episode_id) is str and _is_identifier(episode_id)))
    _require(type(columns) is dict and len(columns) <= MAX_COLUMNS)
    if columns:
        _require(all(type(name) is str and _is_identifier(name) for name in columns))
        fields["columns"] = {name: _array(column, _FLOAT32, length) for name, column in columns.items()}
    if record["token_rewards"] is not None:
        fields["token_rewards"] = _array(record["token_rewards"], _FLOAT32, length)
    if record["kept_token_counts"] is not None:
        fields["kept_token_counts"] = _array(record["kept_token_counts"], _INT32, length)
    if record["kept_token_ids"] is not None:
        fields["kept_token_ids"] = _array(record["kept_token_ids"], _INT32)
    if record["distribution_logprobs"] is not None:
        fields["distribution_logprobs"] = _array(record["distribution_logprobs"], _FLOAT32)


def _array(raw: Any, dtype: np.dtype[Any], length: int | None = None) -> npt.NDArray[Any]:
    if type(raw) is not bytes or (length is not None and len(raw) != length * dtype.itemsize):
        raise _Unclear
    return np.frombuffer(raw, dtype)  # ValueError where the size is not a whole number of values


def _spans(plain: Any, length: int) -> tuple[VersionSpan, ...]:
    _require(type(plain) is list and 1 <= len(plain) <= MAX_ITEMS)
    position, spans = 0, []
    for span in plain:
        if type(span) is not dict or tuple(span) != _SPAN_FIELDS:
            raise _Unclear
        start, end, version = span.values()
        if type(start) is not int or type(end) is not int or start != position or end <= start:
            raise _Unclear
        if version is not None and not (type(version) is int and 0 <= version < _MAX_VERSION):
            raise _Unclear
        spans.append(made(VersionSpan, span))
        position = end
    _require(position == length)
    return tuple(spans)


def _sampling(plain: Any) -> SamplingSettings:
    _require(type(plain) is dict and tuple(plain) == _SAMPLING_FIELDS)
    temperature, top_p, top_k, min_p = plain.values()
    _require(type(temperature) is float and type(top_p) is float and type(top_k) is int and type(min_p) is float)
    _require(copysign(1.0, min_p) > 0)  # -0.0 equals 0.0, whose settings would be returned for it
    return _validated_sampling(temperature, top_p, top_k, min_p)


@lru_cache(maxsize=64)
def _validated_sampling(temperature: float, top_p: float, top_k: int, min_p: float) -> SamplingSettings:
    """Return validated settings; a run has few different ones. Raises ValueError."""
    return SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)


def _check_values(records: Sequence[dict[str, Any]]) -> None:
    """Check the token arrays of all trajectories together."""
    masks = b"".join([record["response_mask"] for record in records])
    mask = np.frombuffer(masks, np.uint8)
    logprobs = np.frombuffer(b"".join([record["behavior_logprobs"] for record in records]), _FLOAT32)
    ids = b"".join([record[name] for name in ("prompt_ids", "response_ids") for record in records])
    _require(mask.max() <= 1 and np.frombuffer(ids, _INT32).min() >= 0)
    _require(logprobs.max() <= MAX_LOGPROB and logprobs.min() >= _LOWEST)  # not true of NaN
    if not mask.all():
        _require(all(1 in record["response_mask"] for record in records))
        _require(not logprobs[mask == 0].any())


def _check_optional(trajectory: Trajectory) -> None:
    """Check the fields that most trajectories do not have. Raises ValueError."""
    for values in (trajectory.token_rewards, *trajectory.columns.values()):
        _require(values is None or bool(np.isfinite(values).all()))
    if (
        trajectory.kept_token_ids is not None
        or trajectory.kept_token_counts is not None
        or trajectory.sampling.truncates
    ):
        trajectory.check_kept()
    if trajectory.distribution_logprobs is not None:
        trajectory.check_distribution()


def _require(condition: object) -> None:
    if not condition:
        raise _Unclear


def made(kind: type[R], fields: dict[str, Any]) -> R:
    """Return a record of fields that are known to be right: what `model_construct` does, without its loop."""
    record = object.__new__(kind)
    _set(record, "__dict__", fields)
    _set(record, "__pydantic_fields_set__", _FIELDS_OF[kind])
    _set(record, "__pydantic_extra__", None)
    _set(record, "__pydantic_private__", None)
    return record
