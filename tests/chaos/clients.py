"""Clients that never give up: each step can be repeated after a kill, by the same process or by its successor.

python -m tests.chaos.clients writer|sampler RUN_DIRECTORY NAME
"""

import random
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from buffer.client import HttpTable, HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.errors import ServiceUnreachable, StoreUnavailable
from buffer.selectors import Uniform
from buffer.table import SampleRequest
from buffer.types import Group
from services.address import read_address
from tests.chaos.journal import Journal
from tests.factories import PAYLOAD, content_hash, make_group, make_manifest, make_trajectory

GROUPS_PER_DRAW = 4
DRAWS_PER_VERSION = 5
_PAUSE_S = 0.03
"""Between an answer and its note: where a kill of a client, or of what it waits for, is most telling."""
_PATIENCE = ClientSettings(retry_budget_s=1.0, retry_first_s=0.02, retry_max_s=0.2)

R = TypeVar("R")


class Service:
    """The service of a run, wherever it listens after its last restart."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._client: ServiceClient | None = None

    def call(self, request: Callable[[ServiceClient], R]) -> R:
        """Repeat a request until the service answers it; an error that the service names is raised."""
        while True:
            try:
                return request(self._connected())
            except (ServiceUnreachable, StoreUnavailable):
                self.close()
                time.sleep(0.05)

    def close(self) -> None:
        """Forget the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connected(self) -> ServiceClient:
        if self._client is None:
            url = read_address(self._directory)
            if url is None:
                raise ServiceUnreachable("no service lives")
            self._client = ServiceClient(url, settings=_PATIENCE)
        return self._client


def expected_group(group_id: str) -> Group:
    """Return the one group that bears this id: its contents follow from it."""
    rng = random.Random(group_id)
    trajectories = [
        make_trajectory(
            f"{group_id}-{i}",
            response_ids=[rng.randrange(1000) for _ in range(rng.randint(1, 40))],
            reward=rng.randrange(8) / 8,
        )
        for i in range(rng.randint(1, 4))
    ]
    return make_group(group_id, trajectories=trajectories)


def insert_next(service: Service, journal: Journal, name: str) -> None:
    """Insert the groups that follow the last answered ones, and note each answer."""
    number = journal.num_entries
    ids = [f"{name}-{number + i}" for i in range(1 + number % 4)]
    groups = [expected_group(group_id) for group_id in ids]
    sent_s = time.monotonic()
    results = service.call(lambda client: HttpTable(client).insert(groups))
    told_s = time.monotonic()
    time.sleep(_PAUSE_S)
    journal.append(
        [{"group_id": r.group_id, "outcome": r.outcome.value, "sent_s": sent_s, "told_s": told_s} for r in results]
    )


def draw_next(service: Service, journal: Journal) -> None:
    """Publish when a version is due, make the draw that follows the last answered one, and note what it gave."""
    number = journal.num_entries
    if number % DRAWS_PER_VERSION == 0:
        service.call(lambda client: publish(client, number // DRAWS_PER_VERSION))
    request = SampleRequest(
        num_groups=GROUPS_PER_DRAW, learner_version=number, request_id=f"draw-{number}", selector=Uniform()
    )
    while not (samples := service.call(lambda client: HttpTable(client).sample(request, timeout_s=1.0))):
        pass
    time.sleep(_PAUSE_S)
    journal.append([{"hashes": {sample.group.group_id: content_hash(sample.group) for sample in samples}}])


def publish(client: ServiceClient, version: int) -> None:
    """Publish a version; a repeat is the same publication."""
    weights = HttpWeightStore(client)
    weights.put_blob(sha256(PAYLOAD).hexdigest(), [PAYLOAD])
    weights.publish(make_manifest(version))


def journal_of(run_directory: Path, name: str) -> Journal:
    """Return the journal of a client of a run."""
    return Journal(run_directory.parent / f"{name}.jsonl")


def main(kind: str, directory: str, name: str) -> None:
    """Work until killed."""
    service, journal = Service(Path(directory)), journal_of(Path(directory), name)
    while True:
        if kind == "writer":
            insert_next(service, journal, name)
        else:
            draw_next(service, journal)


if __name__ == "__main__":
    main(*sys.argv[1:])
