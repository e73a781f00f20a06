"""The replay table on Redis: every invariant is one Lua script of buffer/lua, whose common.lua is the key schema."""

import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import msgpack

from buffer.browsing import GroupPage, GroupQuery, GroupSummary
from buffer.codec import EncodedGroup, encode_group, encode_trajectory, encoded, read_group, record_hash
from buffer.encoded import EncodedSample
from buffer.errors import Conflict, InvalidRequest, NotFound
from buffer.outcomes import Facts, draw_lost, no_fit, refusal, refused_at_sight
from buffer.parts import envelope_bytes, fields_of, group_of, judge_late, limit_bytes, part_result
from buffer.prompts import PromptPage, check_page, counts_of, prompt_page
from buffer.rate_limiter import RateLimiterSettings, check_request, check_settings
from buffer.redis_answers import DrawnEntry, chunks_of, prompt_counts_of, stats_of, summary_of
from buffer.redis_client import RedisClient, store_errors
from buffer.redis_scripts import RedisScripts, shard_prefix
from buffer.selectors import check_weighting, draw_lots, num_fresh, rest_of
from buffer.sharding import Opening
from buffer.table import PriorityUpdate, SampleRequest, TableSettings, TableStats
from buffer.types import (
    Group,
    InsertOutcome,
    InsertResult,
    Part,
    PartResult,
    PolicyVersion,
    Sample,
    Trajectory,
)
from buffer.waits import FORGET_AFTER_S
from buffer.weighting import checked_priorities

_INSERT_CHUNK_BYTES = 4 << 20
"""Encoded groups that one script inserts, about: 5 ms in which Redis serves nobody else."""

READ_CHUNK_BYTES = 8 << 20
"""Encoded groups read at once: larger replies are slower per byte, and their reader holds two."""


class RedisTable:
    """A ReplayTable whose state is all in Redis: any number of these objects, in any process, serve one table."""

    def __init__(
        self,
        client: RedisClient,
        settings: TableSettings,
        limiter: RateLimiterSettings,
        run_id: str,
        *,
        shard: int = 0,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        check_settings(settings, limiter)
        self._client, self._settings, self._limiter, self._run_id = client, settings, limiter, run_id
        self._clock, self._rng = clock, rng or random.Random()
        sections = {"table": settings.model_dump(exclude_none=True), "limiter": limiter.model_dump()}
        given = sections | {"forget_wait_s": FORGET_AFTER_S}
        self._scripts = RedisScripts(client, shard_prefix(run_id, shard), given, self._clock)

    def insert(self, groups: Sequence[Group]) -> list[InsertResult]:
        """Store each group or say why not; see ReplayTable."""
        return self.insert_encoded([encoded(group) for group in groups])

    def insert_encoded(self, groups: Sequence[EncodedGroup]) -> list[InsertResult]:
        """Store each group or say why not; see ServedTable."""
        results: list[InsertResult | None] = []
        submitted: list[tuple[dict[str, Any], bytes]] = []
        for group, record in groups:
            refused = refused_at_sight(group, len(record), self._settings, self._run_id)
            if refused is not None:
                self._count(f"result:{refused[0]}")
                results.append(_insert_result(group, *refused))
            else:
                submitted.append((self.facts_for_insert(group, record), record))
                results.append(None)
        answers = iter(self.run_insert(submitted))
        return [
            result if result is not None else _insert_result(group, *next(answers))
            for (group, _), result in zip(groups, results, strict=True)
        ]

    def insert_parts(self, parts: Sequence[Part]) -> list[PartResult]:
        """Hold trajectories until their groups are complete; see ReplayTable."""
        own = [part for part in parts if part.run_id == self._run_id]
        answers = iter(self._scripts.run("hold", [self._hold_arguments(part) for part in own]))
        return [self._part_result(part, next(answers) if part.run_id == self._run_id else None) for part in parts]

    def sample(self, request: SampleRequest) -> list[Sample]:
        """Hand out a draw, or [] while it must wait; see ReplayTable. Raises Conflict for a reused request_id."""
        return [sample.decoded() for samples in self.sample_encoded(request) for sample in samples]

    def sample_encoded(self, request: SampleRequest) -> Iterator[list[EncodedSample]]:
        """Draw at once, and read the groups as they are asked for; see ServedTable."""
        check_request(request, self._limiter)
        check_weighting(request.selector, self._settings.weighting)
        code, rest = self.run_sample(request, "draw")
        if code == "no_fit":
            raise self._no_fit(request, rest)
        return self._with_bodies(rest[0]) if code == "drawn" else iter(())

    def look(self, request: SampleRequest) -> Opening | None:
        """Say what a draw could choose from now, None while it must wait; see Shard."""
        code, rest = self.run_sample(request, "look")
        if code == "no_fit":
            raise self._no_fit(request, rest)
        return Opening(float(rest[0]), float(rest[1]), int(rest[2])) if code == "open" else None

    def draw_or_leave(self, request: SampleRequest) -> Iterator[list[EncodedSample]] | None:
        """Hand out a draw, or never make it here; see Shard."""
        code, rest = self.run_sample(request, "leave")
        return self._with_bodies(rest[0]) if code == "drawn" else None

    def pin(self, request_id: str, *, known: str = "", choice: str = "") -> str:
        """Settle which shard makes a draw, the same for all who ask; see Shard."""
        settled: bytes = self._scripts.run("pin", [[request_id, known, choice]])[0]
        return settled.decode()

    def advance_version(self, version: PolicyVersion) -> None:
        """Record the latest published version; see ReplayTable."""
        while self._scripts.run("advance", [[str(version)]])[0]:
            pass

    def update_priorities(self, priorities: Mapping[str, float]) -> PriorityUpdate:
        """Give groups new priorities; see ReplayTable."""
        numbers = checked_priorities(self._settings.weighting, priorities)
        entries: bytes = msgpack.packb([(group_id, number, self._lot()) for group_id, number in numbers.items()])
        updated = int(self._scripts.run("priorities", [[entries]])[0])
        return PriorityUpdate(updated=updated, unknown=len(numbers) - updated)

    def prompts(self, cursor: str = "", limit: int = 100) -> PromptPage:
        """Return statistics of prompts; see ReplayTable. One forgotten between the two reads is left out."""
        check_page(limit)
        with store_errors():
            after = f"({cursor}" if cursor else "-"
            ids: Any = self._client.zrangebylex(self._scripts.key("prompt_ids"), after, "+", 0, limit + 1)
            counts: Any = self._client.hmget(self._scripts.key("prompts"), ids) if ids else []
        known = zip(ids, counts, strict=True)
        return prompt_page(
            [prompt_counts_of(raw).stats(name.decode()) for name, raw in known if raw is not None], limit
        )

    def get(self, group_id: str) -> Group:
        """Return a stored group. Raises NotFound."""
        with store_errors():
            member: Any = self._client.hget(self._scripts.key("sequences"), group_id)
            body: Any = self._client.get(self._scripts.key(f"body:{member.decode()}")) if member else None
        if body is None:
            raise _not_stored(group_id)
        return read_group(body)

    def summary(self, group_id: str) -> GroupSummary:
        """Return what browsing shows of a stored group. Raises NotFound."""
        latest, *entries = self._walk({"indexes": [], "limit": 1, "group_id": group_id})
        if not entries:
            raise _not_stored(group_id)
        return summary_of(entries[0], latest)

    def browse(self, query: GroupQuery) -> GroupPage:
        """Return one page of summaries; see ReplayTable."""
        indexes = [query.split.value] if query.split else ["train", "eval"]
        if query.prompt_id is not None:
            indexes = [f"groups_of:{query.prompt_id}"]
        elif query.unused:
            indexes = ["fresh"]
        walk = {"indexes": indexes, "limit": query.limit, "oldest_first": query.oldest_first}
        walk |= {"cursor": query.cursor} if query.cursor is not None else {}
        latest, *entries = self._walk(walk)
        summaries = [summary_of(entry, latest) for entry in entries[: query.limit]]
        cursor = str(summaries[-1].sequence) if len(entries) > len(summaries) else None
        return GroupPage(groups=summaries, cursor=cursor)

    def tidy(self) -> None:
        """Do what is due by the clock; see ServedTable."""
        more, *sealed = self._scripts.run("tidy", [[]])[0]
        while more:
            more, *sealed = self._scripts.run("tidy", [[]])[0]
        for group_id in sealed:
            inserted = self._insert_sealed(group_id.decode())
            if inserted is not None and inserted.outcome is InsertOutcome.FULL:
                break  # it went to the end of the line: another one is first at the next tick

    def count_malformed(self, *, groups: int = 0, parts: int = 0) -> None:
        """Count submissions that were no records; see ServedTable."""
        for counter, number in {"result:malformed": groups, "part:malformed": parts}.items():
            if number:
                self._count(counter, number)

    def stats(self) -> TableStats:
        """Return the counters."""
        pipeline = self._client.pipeline(transaction=True)
        for histogram in ("stats", "versions", "uses"):
            pipeline.hgetall(self._scripts.key(histogram))
        for index in ("train", "fresh", "eval", "partials", "sealed", "prompt_ids"):
            pipeline.zcard(self._scripts.key(index))
        with store_errors():
            raw, versions, uses, *sizes = pipeline.execute()
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        return stats_of(fields, versions, uses, sizes, limiter=self._limiter, now_s=self._clock())

    def _walk(self, walk: Mapping[str, object]) -> list[Any]:
        page: list[Any] = msgpack.unpackb(self._scripts.run("browse", [[msgpack.packb(walk)]])[0])
        return page

    def _with_bodies(self, packed: bytes) -> Iterator[list[EncodedSample]]:
        """Read the bodies of a draw, a chunk at each step."""
        drawn: list[DrawnEntry] = list(zip(*msgpack.unpackb(packed), strict=True))
        for chunk in chunks_of(drawn, size=itemgetter(4), max_bytes=READ_CHUNK_BYTES):
            with store_errors():
                bodies: Any = self._client.mget([self._scripts.key(f"body:{entry[0]}") for entry in chunk])
            if None in bodies:
                raise draw_lost()
            yield [
                EncodedSample(body, float(chance), candidates, uses, None if age is False else age)
                for body, (_, uses, age, chance, _, candidates) in zip(bodies, chunk, strict=True)
            ]

    def _lot(self) -> float:
        return self._rng.expovariate(1.0) if self._settings.weighting is not None else 0.0

    def facts_for_insert(self, group: Group, record: bytes, *, sealed: bool = False) -> dict[str, Any]:
        """Return what insert.lua wants to know about a group; see its header."""
        counts = counts_of(group, solved_reward=self._settings.solved_reward)
        return _version_facts(group.trajectories) | {
            "group_id": group.group_id,
            "prompt_id": group.prompt_id,
            "content": record_hash(record),
            "split": group.split.value,
            "tokens": group.num_response_tokens,
            "trajectories": counts.seen,
            "solved": counts.solved,
            "reward_sum": counts.reward_sum,
            "sealed": sealed,
            "lot": self._lot(),
        }

    def run_insert(self, submitted: Sequence[tuple[dict[str, Any], bytes]]) -> list[tuple[str, Facts]]:
        """Insert groups, as many in one script as keep others waiting for a moment only."""
        answers: list[list[bytes]] = []
        for chunk in chunks_of(submitted, size=lambda one: len(one[1]), max_bytes=_INSERT_CHUNK_BYTES):
            sender = self._scripts.key(f"incoming:{secrets.token_hex(8)}:")
            values = {f"{sender}{number}": record for number, (_, record) in enumerate(chunk)}
            facts: bytes = msgpack.packb([facts | {"bytes": len(record)} for facts, record in chunk])
            answers += self._scripts.run("insert", [[facts, sender]], values=values)[0]
        return [_answer(answer) for answer in answers]

    def _count(self, counter: str, number: int = 1) -> None:
        with store_errors():
            self._client.hincrby(self._scripts.key("stats"), counter, number)

    def _hold_arguments(self, part: Part) -> list[str | bytes]:
        facts = _version_facts([part.trajectory]) | {
            "group_id": part.group_id,
            "trajectory_id": part.trajectory.trajectory_id,
            "fields": fields_of(part),
            "group_size": part.group_size,
            "split": part.split.value,
            "envelope_bytes": envelope_bytes(part),
            "limit_bytes": limit_bytes(self._settings),
        }
        return [msgpack.packb(facts), encode_trajectory(part.trajectory)]

    def _part_result(self, part: Part, answer: list[Any] | None) -> PartResult:
        """Read an answer of hold.lua, None for a part of another run, and insert its group if it is sealed."""
        if answer is None:
            self._count("part:run")
            return part_result(part, *refusal("run"))
        sealed, *rest = answer
        code, facts = _answer(rest)
        inserted = self._insert_sealed(part.group_id) if sealed else None
        if inserted is not None:
            return part_result(part, inserted.outcome, inserted.reason)
        if code == "known" or sealed:  # sealed, but another caller was faster to insert it
            late = judge_late(part, self._stored(part.group_id))
            if not sealed:
                self._count(f"part:{late}")
            return part_result(part, *refusal(late))
        return part_result(part, *refusal(code, facts))

    def _stored(self, group_id: str) -> Group | None:
        try:
            return self.get(group_id)
        except NotFound:
            return None

    def _insert_sealed(self, group_id: str) -> InsertResult | None:
        """Insert a sealed partial group; None when it is no longer there."""
        with store_errors():
            raw: Any = self._client.hgetall(self._scripts.key(f"partial:{group_id}"))
        if not raw:
            return None
        records = [record for name, record in raw.items() if name.startswith(b"t:")]
        group = group_of(self._run_id, group_id, raw[b"fields"].decode(), records)
        record = encode_group(group)
        return _insert_result(group, *self.run_insert([(self.facts_for_insert(group, record, sealed=True), record)])[0])

    def run_sample(self, request: SampleRequest, mode: str) -> tuple[str, list[bytes]]:
        """Return what sample.lua answers, once it has nothing left to do first. Raises Conflict. For measurements."""
        arguments = self._sample_arguments(request, mode)
        code, *rest = self._scripts.run("sample", [arguments])[0]
        while code == b"again":
            code, *rest = self._scripts.run("sample", [arguments])[0]
        if code == b"conflict":
            raise Conflict(f"request_id {request.request_id!r} was used for another draw", hint="use a new request_id")
        return code.decode(), rest

    def _no_fit(self, request: SampleRequest, facts: list[bytes]) -> InvalidRequest:
        wanted_fresh = num_fresh(request.selector, request.num_groups)
        return InvalidRequest(no_fit(request.num_groups, wanted_fresh, *map(int, facts)))

    def _sample_arguments(self, request: SampleRequest, mode: str) -> list[str | bytes]:
        selector = request.selector
        draw = {
            "request_id": request.request_id,
            "num_groups": request.num_groups,
            "num_fresh": num_fresh(selector, request.num_groups),
            "learner_version": request.learner_version,
            "rest": rest_of(selector).kind,
            "lots": [] if mode == "look" else draw_lots(selector, request.num_groups, self._rng),
            "mode": mode,
        }
        return [msgpack.packb(draw), request.model_dump_json()]


def _version_facts(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    versions = {span.version for trajectory in trajectories for span in trajectory.spans}
    own = [version for version in versions if version is not None]
    return {"oldest": min(own, default=None), "newest": max(own, default=None), "foreign": None in versions}


def _insert_result(group: Group, code: str, facts: Facts = ()) -> InsertResult:
    if code == "accepted":
        return InsertResult(group_id=group.group_id, outcome=InsertOutcome.ACCEPTED)
    outcome, reason = refusal(code, facts)
    return InsertResult(group_id=group.group_id, outcome=outcome, reason=reason)


def _answer(answer: list[bytes]) -> tuple[str, Facts]:
    return answer[0].decode(), tuple(float(fact) for fact in answer[1:])


def _not_stored(group_id: str) -> NotFound:
    return NotFound(f"group {group_id!r} is not stored", hint="it may have been removed since")
