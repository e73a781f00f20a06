"""Publication in the background: the learner goes on while a version is encoded, sent and committed.

| waits for | produces | unblocked by | on shutdown |
|---|---|---|---|
| a version that was begun | payloads, then the manifest as the commit | the learner | finishes the version |

`begin` blocks for one pass over the weights: it brings the one host copy of what is published up to date and keeps what
changed. Everything else happens on the executor's thread. While a version is on its way no other is begun: versions in
between coalesce into the next one.

With several ranks each sends the tensors that are its own (learner.snapshot), from a host copy of these alone. The
first one decides for all whether they go as delta or keyframe, and commits the manifest when every part is there.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import IO, Annotated, cast

from pydantic import Field

from buffer.errors import StalewiseError, StoreUnavailable
from buffer.types import PolicyVersion, Record
from buffer.weights.delta import TensorChange, write_delta
from buffer.weights.manifest import Manifest, Payload
from buffer.weights.mirror import Mirror
from buffer.weights.plan import Step, Ways
from buffer.weights.store import WeightStore
from buffer.weights.tensors import TensorSpec, Xxh3, checksum
from learner.distributed import ALONE, Ranks
from learner.snapshot import Snapshot

CHUNK_BYTES = 4 << 20
SPOOL_BYTES = 64 << 20
"""An encoded delta up to this size stays in memory until it is sent; a larger one goes to a temporary file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What the last version cost."""

    version: PolicyVersion
    payload_bytes: int
    seconds: float
    """From the beginning to the commit, in the background."""


class _Part(Record):
    """What one rank tells the others of its part of a version."""

    payloads: Annotated[tuple[Payload, ...], Field(strict=False)]
    tensors: Annotated[tuple[Annotated[tuple[TensorSpec, Xxh3], Field(strict=False)], ...], Field(strict=False)]
    failure: str | None


class Publisher:
    """Sends versions to the weight store, each as a delta from the one before, and as a keyframe where one is due.

    With several ranks each has one, and all make each call. `ranks` must be theirs alone: Ranks.beside.
    """

    def __init__(
        self,
        store: WeightStore,
        *,
        run_id: str,
        model_fingerprint: str,
        keyframe_every: int,
        executor: Executor,
        unix_time: Callable[[], float],
        ranks: Ranks = ALONE,
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._model_fingerprint = model_fingerprint
        self._keyframe_every = keyframe_every
        self._executor = executor
        self._unix_time = unix_time
        self._ranks = ranks
        self._mirror: Mirror | None = None
        self._ways = Ways(keyframe_every=keyframe_every)
        self._published: PolicyVersion | None = None  # what the mirror held when it was last committed
        self._sending: Future[None] | None = None
        self.sent: Sent | None = None
        """The last committed version; None before the first."""

    def latest_version(self) -> PolicyVersion | None:
        """Return the latest published version, None before the first."""
        manifest = self._store.latest()
        return None if manifest is None else manifest.version

    @property
    def idle(self) -> bool:
        """Whether a version may be begun."""
        return self._sending is None or self._sending.done()

    def begin(self, snapshot: Snapshot, *, version: PolicyVersion) -> None:
        """Take over a snapshot and send it; the policy may move on once this returns.

        Raises what became of the version before: Conflict when it, or a later one, was published by somebody else;
        ServiceUnreachable, StoreUnavailable.
        """
        self.flush()
        if self._mirror is None:
            self._mirror = Mirror.allocate(snapshot.specs)
        created_s = self._unix_time()
        changes = self._mirror.advance(snapshot.tensors, version)
        self._sending = self._executor.submit(self._send, self._mirror, changes, snapshot, version, created_s)

    def settled(self, timeout_s: float) -> bool:
        """Wait until nothing is on its way, sent or failed; False when it still is after `timeout_s`."""
        return self._sending is None or not wait([self._sending], timeout_s).not_done

    def flush(self) -> None:
        """Wait until nothing is on its way. Raises as `begin`."""
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def _send(
        self,
        mirror: Mirror,
        changes: Sequence[TensorChange],
        snapshot: Snapshot,
        version: PolicyVersion,
        created_s: float,
    ) -> None:
        began_s = time.perf_counter()
        base = cast("PolicyVersion | None", self._ranks.from_first(self._published))
        self._published = None  # a version that fails is followed by a keyframe
        ways, self._ways = self._ways, Ways(keyframe_every=self._keyframe_every)
        parts = self._put_parts(mirror, ways, changes, base, version)
        if not self._ranks.is_first:
            return
        steps = [
            Step(base_version, version, payloads)
            for base_version in dict.fromkeys((base, None))
            if (payloads := tuple(p for part in parts for p in part.payloads if p.base_version == base_version))
        ]
        manifest = Manifest(
            run_id=self._run_id,
            version=version,
            created_s=created_s,
            model_fingerprint=self._model_fingerprint,
            checksum=checksum(tensor for part in parts for tensor in part.tensors),
            payloads=ways.add(steps),
            probe=snapshot.probe,
            adapter=snapshot.adapter,
        )
        self._store.publish(manifest)
        self._published, self._ways = version, ways
        payload_bytes = sum(step.size_bytes for step in steps)
        self.sent = Sent(version=version, payload_bytes=payload_bytes, seconds=time.perf_counter() - began_s)

    def _put_parts(
        self,
        mirror: Mirror,
        ways: Ways,
        changes: Sequence[TensorChange],
        base: PolicyVersion | None,
        version: PolicyVersion,
    ) -> list[_Part]:
        """Send this rank's part of each payload that the first rank decides on, and return what all have sent.

        Raises what this rank met; StoreUnavailable for what another one did.
        """
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as file:
            size = 0 if base is None else sum(map(file.write, write_delta(base, version, changes)))
            sizes = cast("list[tuple[int, int]]", self._ranks.from_all((size, mirror.num_bytes)))
            delta_bytes, whole_bytes = (sum(of_ranks) for of_ranks in zip(*sizes, strict=True))
            is_smaller = base is not None and delta_bytes < whole_bytes
            due = bool(self._ranks.from_first(not is_smaller or ways.keyframe_is_due(delta_bytes)))
            payloads: list[Payload] = []
            failure: StalewiseError | None = None
            try:
                # a part without a change is left out, but for the first rank's: a step has at least one
                if is_smaller and (changes or self._ranks.is_first):
                    payloads.append(self._put(_Again(lambda: _chunks_of(file)), "delta", version, base))
                if due and mirror.tensors:  # more ranks than tensors
                    chunks = _Again(lambda: map(bytes, mirror.keyframe(CHUNK_BYTES)))
                    payloads.append(self._put(chunks, "keyframe", version, None))
            except StalewiseError as error:  # told to the first rank, which ends the run: nobody waits for this part
                failure = error
        own = _Part(payloads=tuple(payloads), tensors=mirror.digests, failure=None if failure is None else str(failure))
        parts = [_Part.model_validate_json(str(text)) for text in self._ranks.from_all(own.model_dump_json())]
        if failure is not None:
            raise failure
        for rank, part in enumerate(parts):
            if part.failure is not None:
                raise StoreUnavailable(f"rank {rank} could not send its part of version {version}: {part.failure}")
        return parts

    def _put(self, chunks: "_Again", kind: str, version: PolicyVersion, base: PolicyVersion | None) -> Payload:
        digest, size = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
        self._store.put_blob(digest.hexdigest(), chunks)
        return Payload.model_validate(
            {
                "kind": kind,
                "version": version,
                "base_version": base,
                "sha256": digest.hexdigest(),
                "size_bytes": size,
            }
        )


@dataclass(frozen=True, slots=True)
class _Again:
    """Bytes in pieces, made anew for each attempt to send them."""

    pieces: Callable[[], Iterable[bytes]]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.pieces())


def _chunks_of(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
