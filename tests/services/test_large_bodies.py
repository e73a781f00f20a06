"""Large records are written and read beside the event loop, which answers other requests meanwhile."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import Request
from pydantic import BaseModel, SerializerFunctionWrapHandler, field_validator, model_serializer
from starlette.types import Message

from buffer.browsing import GroupPage, GroupQuery
from buffer.memory_table import MemoryTable
from buffer.types import Group
from buffer.wire import JSON
from services.bodies import read_record
from tests.factories import RUN_ID, make_group
from tests.services.live import LIMITER, TABLE, make_context, serving


class Gate:
    """Where the encoding of an answer waits."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(20)


class SlowTable(MemoryTable):
    """A table whose pages and groups are written once the gate is open."""

    def __init__(self, gate: Callable[[], None]) -> None:
        super().__init__(TABLE, LIMITER, RUN_ID)
        self._gate = gate

    def browse(self, query: GroupQuery) -> GroupPage:
        gate = self._gate

        class SlowPage(GroupPage):
            @model_serializer(mode="wrap")
            def _slowly(self, handler: SerializerFunctionWrapHandler) -> Any:
                gate()
                return handler(self)

        return SlowPage(**dict(super().browse(query)))

    def get(self, group_id: str) -> Group:
        gate, group = self._gate, super().get(group_id)

        class SlowArray(np.ndarray[Any, np.dtype[np.int32]]):
            def tolist(self) -> Any:
                gate()
                return super().tolist()

        slow = [t.model_copy(update={"prompt_ids": t.prompt_ids.view(SlowArray)}) for t in group.trajectories]
        return group.model_copy(update={"trajectories": tuple(slow)})


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.mark.parametrize("path", ["/v1/groups", "/v1/groups/a"])
def test_other_requests_are_answered_while_a_large_answer_is_written(path: str, gate: Gate, tmp_path: Path) -> None:
    table = SlowTable(gate)
    table.advance_version(0)
    table.insert([make_group("a")])
    with (
        serving(make_context(tmp_path, table)) as url,
        httpx.Client(base_url=url, timeout=10, trust_env=False) as http,
        ThreadPoolExecutor(1) as executor,
    ):
        asked = executor.submit(http.get, path)
        assert gate.reached.wait(10)

        meanwhile = http.get("/healthz")

        gate.opened.set()
        assert (meanwhile.text, asked.result().status_code) == ("ok", 200)


def test_a_body_is_read_in_another_thread_than_that_of_the_event_loop() -> None:
    class Posted(BaseModel):
        thread: int

        @field_validator("thread", mode="before")
        @classmethod
        def _here(cls, value: object) -> int:
            return threading.get_ident()

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"thread": 0}', "more_body": False}

    request = Request({"type": "http", "headers": [(b"content-type", JSON.encode())]}, receive)
    posted = asyncio.run(read_record(request, Posted, max_bytes=100))

    assert posted.thread not in (0, threading.get_ident())
