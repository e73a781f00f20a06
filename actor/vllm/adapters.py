"""LoRA in vLLM: which adapter versions are loaded, and which of them requests still use.

A response is drawn under one adapter from its first token to its last, while later requests take the newer one: no
pause, and one span. Every version has a name of its own for ever, because vLLM's prefix cache goes by names.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from buffer.errors import InvalidSettings
from buffer.types import PolicyVersion, VersionSpan

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


def max_lora_rank(rank: int) -> int:
    """Return the smallest limit that vLLM knows for adapters of a rank. Raises InvalidSettings above the largest."""
    for known in RANKS:
        if rank <= known:
            return known
    raise InvalidSettings(f"lora_rank = {rank} is above {RANKS[-1]}, vLLM's limit")


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A version that vLLM holds."""

    version: PolicyVersion
    directory: str  # where its workers find it: a new one for every load, of the same version too
    number: int  # from 1, another one for every load: what vLLM's core calls it

    @property
    def name(self) -> str:
        """What requests call it."""
        return PurePath(self.directory).name


class AdapterVersions:
    """The adapters in vLLM. The caller owns the lock that `switch` and `generating` need."""

    def __init__(self) -> None:
        self.current: LoadedAdapter | None = None
        """What new requests are drawn under; None before the first, and with whole weights."""
        self._in_use: dict[LoadedAdapter, int] = {}
        self._loaded: list[LoadedAdapter] = []
        self._numbers = itertools.count(1)

    def new(self, version: PolicyVersion, directory: str) -> LoadedAdapter:
        """Give a number to what the workers fetched."""
        return LoadedAdapter(version, directory, next(self._numbers))

    def begin(self) -> LoadedAdapter | None:
        """Return what requests that begin now are drawn under, to be given back at their end."""
        if self.current is not None:
            self._in_use[self.current] = self._in_use.get(self.current, 0) + 1
        return self.current

    def end(self, adapter: LoadedAdapter | None) -> None:
        """Take note that the requests ended."""
        if adapter is not None:
            self._in_use[adapter] -= 1
            if not self._in_use[adapter]:
                del self._in_use[adapter]

    def switch(self, adapter: LoadedAdapter) -> list[LoadedAdapter]:
        """Draw new requests under a newer version; return those that nobody uses any more."""
        self.current = adapter
        self._loaded.append(adapter)
        retired = [old for old in self._loaded if old != adapter and old not in self._in_use]
        self._loaded = [held for held in self._loaded if held not in retired]
        return retired

    def forget(self) -> None:
        """Take note that vLLM was started again and holds none of them."""
        self.current, self._loaded = None, []


def spans_of(token_ids: Sequence[int], adapter: LoadedAdapter | None) -> tuple[VersionSpan, ...]:
    """Return the spans of a response drawn under one adapter; () without: vLLM has labelled the tokens then."""
    if adapter is None or not token_ids:
        return ()
    return (VersionSpan(start=0, end=len(token_ids), version=adapter.version),)
