"""Fetching a version into the mirrors of vLLM's workers, while they go on generating."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buffer.connection import named_error
from buffer.errors import InvalidSettings
from buffer.weights.manifest import Manifest

FIRST_LOOK_S = 0.002
LONGEST_LOOK_S = 0.1

Rpc = Callable[..., list[Any]]
"""Calls a method of every worker by its name, with texts as arguments: vLLM's collective_rpc."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The replay service that workers fetch from, and the token they show it."""

    url: str
    token: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    """client.ca_file, on the machine of the workers."""

    def as_init_info(self) -> dict[str, Any]:
        """Return what vLLM's init_weight_transfer_engine takes."""
        return {"url": self.url, "token": self.token, "ca_file": str(self.ca_file) if self.ca_file else None}


def fetch(rpc: Rpc, manifest: Manifest, *, lora_rank: int) -> str:
    """Return once every worker's mirror holds the version; of an adapter, where vLLM finds it, else "".

    Raises what the fetch of a worker raised, and InvalidSettings for a version of a kind that vLLM was not started for.
    """
    _check_kind(manifest, lora_rank)
    rpc("stalewise_fetch", manifest.model_dump_json())
    pause_s = FIRST_LOOK_S
    while True:
        time.sleep(pause_s)
        states = rpc("stalewise_fetched")
        for state in states:
            if "error" in state:
                raise named_error(state["error"], state["detail"], hint=state["hint"])
        if all(state["done"] for state in states):
            adapter_dir: str = states[0]["adapter_dir"]
            return adapter_dir
        pause_s = min(2 * pause_s, LONGEST_LOOK_S)


def _check_kind(manifest: Manifest, lora_rank: int) -> None:
    rank = 0 if manifest.adapter is None else manifest.adapter.rank
    if bool(rank) != bool(lora_rank) or rank > lora_rank:
        published = f"an adapter of rank {rank}" if rank else "whole weights"
        raise InvalidSettings(
            f"version {manifest.version} is {published}, vLLM was started with lora_rank = {lora_rank}",
            hint=f"set actor.vllm.lora_rank = {rank}",
        )
