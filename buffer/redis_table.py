"""The replay table on Redis: every invariant is one Lua script of buffer/lua, whose common.lua is the key schema."""

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import msgpack
import redis

from buffer.codec import decode_group, encode_group, record_hash
from buffer.errors import Conflict, InvalidRequest, NotFound, StoreUnavailable
from buffer.outcomes import Facts, no_fit, outcome_of, refusal, refused_at_sight
from buffer.rate_limiter import Pace, RateLimiterSettings, check_request, check_settings, limiter_error, reuse_mean
from buffer.selectors import Mix, draw_lots, num_fresh
from buffer.table import SampleRequest, TableSettings, TableStats, Wait
from buffer.types import Group, InsertOutcome, InsertResult, PolicyVersion, Sample, SampleInfo
from buffer.waits import FORGET_AFTER_S, Waiting, report

SHARD = 0
"""Number of this table among the shards of a run; it is part of every key, so that there can be more than one."""


class RedisTable:
    """A ReplayTable whose state is all in Redis: any number of these objects, in any process, serve one table."""

    def __init__(
        self,
        client: redis.Redis,
        settings: TableSettings,
        limiter: RateLimiterSettings,
        run_id: str,
        *,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        check_settings(settings, limiter)
        self._client, self._settings, self._limiter, self._run_id = client, settings, limiter, run_id
        self._clock, self._rng = clock, rng or random.Random()
        self._prefix = f"sw:{{{run_id}:{SHARD}}}:"
        sections = {"table": settings.model_dump(exclude_none=True), "limiter": limiter.model_dump()}
        self._settings_json = json.dumps(sections | {"forget_wait_s": FORGET_AFTER_S})
        self._scripts = {name: _script(name) for name in ("insert", "sample", "advance")}

    def insert(self, groups: Sequence[Group]) -> list[InsertResult]:
        """Store each group or say why not; see ReplayTable."""
        results: list[InsertResult | None] = []
        calls: list[list[str | bytes]] = []
        for group in groups:
            record = encode_group(group)
            refused = refused_at_sight(group, len(record), self._settings, self._run_id)
            if refused is not None:
                self._count_result(refused[0])
                results.append(_insert_result(group, *refused))
            else:
                calls.append([_facts_of(group, record), record])
                results.append(None)
        answers = iter(self._run("insert", calls))
        return [
            result if result is not None else _insert_result(group, *_answer(next(answers)))
            for group, result in zip(groups, results, strict=True)
        ]

    def sample(self, request: SampleRequest) -> list[Sample]:
        """Hand out a draw, or [] while it must wait; see ReplayTable. Raises Conflict for a reused request_id."""
        check_request(request, self._limiter)
        arguments = self._sample_arguments(request)
        code, *rest = self._run("sample", [arguments])[0]
        while code == b"again":
            code, *rest = self._run("sample", [arguments])[0]
        if code == b"drawn":
            return [self._sample(*entry) for entry in rest]
        if code == b"conflict":
            raise Conflict(f"request_id {request.request_id!r} was used for another draw", hint="use a new request_id")
        if code == b"no_fit":
            wanted_fresh = num_fresh(request.selector, request.num_groups)
            raise InvalidRequest(no_fit(request.num_groups, wanted_fresh, *map(int, rest)))
        return []

    def advance_version(self, version: PolicyVersion) -> None:
        """Record the latest published version; see ReplayTable."""
        while self._run("advance", [[str(version)]])[0]:
            pass

    def get(self, group_id: str) -> Group:
        """Return a stored group. Raises NotFound."""
        with _store_errors():
            sequence: Any = self._client.hget(self._key("sequences"), group_id)
            body: Any = self._client.hget(self._key(f"group:{sequence.decode()}"), "body") if sequence else None
        if body is None:
            raise NotFound(f"group {group_id!r} is not stored", hint="it may have been removed since")
        return self._decode(body)

    def stats(self) -> TableStats:
        """Return the counters."""
        pipeline = self._client.pipeline(transaction=True)
        for histogram in ("stats", "versions", "uses"):
            pipeline.hgetall(self._key(histogram))
        for index in ("train", "fresh", "eval"):
            pipeline.zcard(self._key(index))
        with _store_errors():
            raw, versions, uses, num_train, num_fresh_groups, num_eval = pipeline.execute()
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        counts = {name: int(fields.get(name, 0)) for name in _COUNTERS}
        removed = {name.removeprefix("removed:"): int(n) for name, n in fields.items() if name.startswith("removed:")}
        unused = removed.get("age_unsampled", 0) + removed.get("ttl_unsampled", 0)
        pace = Pace(
            sampleable=num_train,
            fresh=num_fresh_groups,
            inserted=counts["inserted"] - unused,
            sampled=counts["sampled"],
            wanted_fresh=counts["wanted_fresh"],
            no_room=bool(counts["no_room"]),
        )
        return TableStats(
            num_groups=num_train,
            num_fresh=num_fresh_groups,
            num_eval=num_eval,
            num_foreign=counts["foreign"],
            bytes=counts["bytes"],
            num_response_tokens=counts["tokens"],
            inserted_total=counts["inserted"],
            sampled_total=counts["sampled"],
            reuse_mean=reuse_mean(pace),
            outcomes=_outcomes(fields),
            removed=removed,
            stored_versions={int(version): int(n) for version, n in versions.items()},
            stored_uses={int(times): int(n) for times, n in uses.items()},
            reward_sum=float(fields.get("reward_sum", 0)),
            num_trajectories_total=counts["trajectories"],
            forgotten_ids_total=counts["forgotten_ids"],
            latest_version=int(fields.get("latest_version", -1)),
            limiter_error=limiter_error(self._limiter, pace),
            waits=self._waits(fields, pace),
        )

    def _waits(self, fields: dict[str, str], pace: Pace) -> list[Wait]:
        learner, actors = _waiting(fields, "learner"), _waiting(fields, "actors")
        return report(learner, actors, limiter=self._limiter, pace=pace, now_s=self._clock())

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _count_result(self, code: str) -> None:
        with _store_errors():
            self._client.hincrby(self._key("stats"), f"result:{code}", 1)

    def _sample_arguments(self, request: SampleRequest) -> list[str | bytes]:
        selector = request.selector
        rest = selector.rest if isinstance(selector, Mix) else selector
        draw = {
            "request_id": request.request_id,
            "num_groups": request.num_groups,
            "num_fresh": num_fresh(selector, request.num_groups),
            "learner_version": str(request.learner_version),
            "selector": selector.kind,
            "rest": rest.kind,
        }
        uniforms: bytes = msgpack.packb(draw_lots(selector, request.num_groups, self._rng))
        return [json.dumps(draw), request.model_dump_json(), uniforms]

    def _sample(self, body: bytes, uses: bytes, age: bytes, probability: bytes) -> Sample:
        info = SampleInfo(
            probability=float(probability), times_sampled=int(uses), age_updates=int(age) if age else None
        )
        return Sample(group=self._decode(body), info=info)

    def _decode(self, body: bytes) -> Group:
        return decode_group(body, max_bytes=len(body))

    def _run(self, name: str, calls: Sequence[Sequence[str | bytes]]) -> list[Any]:
        """Run a script once per call, all in one round trip; load it first where Redis does not know it."""
        if not calls:
            return []
        digest, source = self._scripts[name]
        with _store_errors():
            pipeline = self._client.pipeline(transaction=False)
            for call in calls:
                pipeline.evalsha(digest, 1, self._prefix, self._settings_json, repr(self._clock()), *call)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            unknown = [i for i, answer in enumerate(answers) if isinstance(answer, redis.exceptions.NoScriptError)]
            if unknown:
                self._client.script_load(source)
                for i, answer in zip(unknown, self._run(name, [calls[i] for i in unknown]), strict=True):
                    answers[i] = answer
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return answers


_COUNTERS = ["bytes", "tokens", "foreign", "inserted", "sampled", "trajectories"]
_COUNTERS += ["forgotten_ids", "wanted_fresh", "no_room"]
"""Integer fields of the hash `stats`; see common.lua."""


def _script(name: str) -> tuple[str, str]:
    """Return the SHA-1 and the source of a script; Redis cannot include one file in another, so we join them."""
    folder = files("buffer") / "lua"
    source = (folder / "common.lua").read_text() + (folder / f"{name}.lua").read_text()
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(), source


def _facts_of(group: Group, record: bytes) -> str:
    """Return what insert.lua wants to know about a group; see its header."""
    oldest, newest = group.oldest_version, group.newest_version
    facts = {
        "group_id": group.group_id,
        "content": record_hash(record),
        "split": group.split.value,
        "foreign": group.is_foreign,
        "tokens": group.num_response_tokens,
        "trajectories": len(group.trajectories),
        "reward_sum": repr(sum(trajectory.reward for trajectory in group.trajectories)),
    }
    if oldest is not None and newest is not None:
        facts |= {"oldest": str(oldest), "newest": str(newest)}
    return json.dumps(facts)


def _insert_result(group: Group, code: str, facts: Facts = ()) -> InsertResult:
    if code == "accepted":
        return InsertResult(group_id=group.group_id, outcome=InsertOutcome.ACCEPTED)
    outcome, reason = refusal(code, facts)
    return InsertResult(group_id=group.group_id, outcome=outcome, reason=reason)


def _answer(answer: list[bytes]) -> tuple[str, Facts]:
    return answer[0].decode(), tuple(float(fact) for fact in answer[1:])


def _outcomes(fields: dict[str, str]) -> dict[str, int]:
    outcomes: Counter[str] = Counter()
    for name, number in fields.items():
        if name.startswith("result:"):
            outcomes[outcome_of(name.removeprefix("result:")).value] += int(number)
    return dict(outcomes)


def _waiting(fields: dict[str, str], who: str) -> Waiting | None:
    code = fields.get(f"{who}_wait_code")
    if code is None:
        return None
    return Waiting(code, float(fields[f"{who}_wait_since_s"]), float(fields[f"{who}_wait_last_s"]))


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turn what Redis refuses, or that it is away, into StoreUnavailable; errors of our own scripts pass."""
    try:
        yield
    except redis.exceptions.BusyLoadingError as error:
        raise StoreUnavailable("Redis is still loading its data", hint="try again in a moment") from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise StoreUnavailable(f"Redis does not answer: {error}", hint="check that it runs, then try again") from error
    except redis.exceptions.ResponseError as error:
        for sign, (detail, hint) in _REFUSALS.items():
            if sign in str(error):
                raise StoreUnavailable(detail, hint=hint) from error
        raise


_REFUSALS = {
    "OOM command": ("Redis is out of memory", "raise its maxmemory, or lower table.capacity_bytes"),
    "MISCONF": ("Redis cannot write to its disk", "free disk space, then try again"),
    "READONLY": ("this Redis is a read-only replica", "connect to the primary"),
}
