"""What a table must be able to do to be one shard of several, and how ids are spread over shards."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from buffer.encoded import EncodedSample
from buffer.table import SampleRequest, ServedTable


class Opening(NamedTuple):
    """What a draw may choose from: weight x 2 ^ reference, in a unit that the shards of a run share, on `groups`."""

    weight: float
    reference: float
    groups: int


class Shard(ServedTable, Protocol):
    """One of several tables of a run. A draw is made by one of them, whichever is pinned for its request_id."""

    def look(self, request: SampleRequest) -> Opening | None:
        """Say what the draw could choose from now, without making it; None while it must wait, and after it left.

        Raises Conflict for a request_id of another draw, InvalidRequest for a draw that this shard can never serve.
        """
        ...

    def draw_or_leave(self, request: SampleRequest) -> Iterator[list[EncodedSample]] | None:
        """Hand out a draw, the same one to each repeat; None = it had to wait, and this shard will never make it."""
        ...

    def pin(self, request_id: str, *, known: str = "", choice: str = "") -> str:
        """Replace the `known` choice of a shard for a draw ("" = none), and return the choice that holds for all."""
        ...


def shard_of(name: str, num_shards: int) -> int:
    """Return the shard that an id belongs to: the same in every process and for ever."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_shards


def shares(openings: Sequence[Opening | None]) -> list[float]:
    """Return each shard's share of all that a draw may choose from; 0 where it must wait."""
    top = max(opening.reference for opening in openings if opening is not None)
    weights = [opening.weight * 2.0 ** (opening.reference - top) if opening else 0.0 for opening in openings]
    total = sum(weights)
    return [weight / total for weight in weights]
