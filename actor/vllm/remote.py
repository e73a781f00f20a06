"""The engine on a vLLM server: token ids over HTTP, and weights that the server's workers fetch by themselves.

    who            waits for                         does
    generator      the server's answers              one HTTP request a response, all at once
    weight sync    the server's running step         load: pause, new weights, caches dropped, resume; score: a request

Needs no vLLM in this process. The server is one that `stalewise serve-vllm` started, or one with the same flags:
its control routes have no password, so it listens on loopback or in a private network.
"""

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from actor.end_tokens import end_token_ids
from actor.engine import Completion, GenerationRequest
from actor.model_config import load_config, vocab_size
from actor.settings import VllmSettings
from actor.vllm.adapters import AdapterVersions, LoadedAdapter, max_lora_rank, spans_of
from actor.vllm.fetching import WeightSource, fetch
from actor.vllm.plugin import check_version
from actor.vllm.sampling import MAX_LOGPROBS, Limits, check_sampling
from buffer.errors import CorruptWeights, EngineUnreachable, InvalidRequest, InvalidSettings
from buffer.types import PolicyVersion, SamplingSettings, VersionSpan
from buffer.weights.manifest import Manifest

log = logging.getLogger(__name__)

NO_VERSION = "none"
"""What the server calls its weights after a load that went wrong."""
CONNECT_TIMEOUT_S = 5.0
"""Seconds to open a connection to the server."""
CONTROL_TIMEOUT_S = 600.0
"""Seconds for a control call: a pause waits for the running step, which compiles when a shape is new."""
ABORT_AGAIN_S = 0.05
"""Seconds after which requests that are still in flight are aborted again."""
ID_PREFIX = "generate-tokens-"
"""The server prepends it to the ids of requests, and wants it when they are aborted."""


class RemoteVllmEngine:
    """`actor.engine.Engine` on a vLLM server, which serves one actor: its weights are those that this actor loads."""

    def __init__(
        self, model_dir: Path, settings: VllmSettings, *, sampling: SamplingSettings, source: WeightSource
    ) -> None:
        """Wait until the server answers, `start_timeout_s` at most, and compare how it was started with what we need.

        Raises EngineUnreachable, and InvalidSettings when the server was started otherwise or `sampling` is refused.
        """
        check_sampling(sampling)
        if settings.url is None:
            raise InvalidSettings("actor.vllm.url is not set")
        self._url = settings.url.rstrip("/")
        self._source = source
        self._request_timeout = httpx.Timeout(settings.request_timeout_s, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.Client(
            base_url=self._url,
            timeout=httpx.Timeout(CONTROL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )
        self._version: PolicyVersion = -1
        self.pause_s = 0.0
        """How long the last load paused the server, the rest of the running step included; LoRA versions do not."""
        self._lora_rank = settings.lora_rank
        self._adapters = AdapterVersions()
        self._fetched_dir = ""
        self._in_flight: set[str] = set()
        self._lock = threading.Lock()
        served = self._wait_until_served(settings.start_timeout_s)
        self._check_server()
        self._limits = Limits(
            vocab_size=vocab_size(load_config(model_dir)),
            max_model_tokens=served["max_model_len"],
            end_ids=end_token_ids(model_dir),
        )
        self._call("POST", "/resume")  # an actor that was killed in mid-load left the server paused

    @property
    def version(self) -> PolicyVersion:
        """The version of the weights in use; -1 before the first load, and once the server is found to have lost it."""
        return self._version

    @property
    def max_tokens(self) -> int:
        """Prompt and response together, at most: what vLLM was started for."""
        return self._limits.max_model_tokens

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Draw all requests; vLLM batches them. Raises InvalidRequest, InvalidSettings, EngineUnreachable.

        Raises CorruptWeights before the first load, and when the server has lost its weights: it was started again,
        or a load went wrong.
        """
        if self._version < 0:
            raise CorruptWeights("the engine holds no weights", hint="a version must be loaded first")
        params = [self._limits.sampling_params(request) for request in requests]
        with self._lock:
            adapter = self._adapters.begin()
        try:
            bodies = [
                _body(request.prompt_ids, drawn, adapter) for request, drawn in zip(requests, params, strict=True)
            ]
            choices = asyncio.run(self._draw(bodies))
        finally:
            with self._lock:
                self._adapters.end(adapter)
        return [self._completion(r, choice, adapter) for r, choice in zip(requests, choices, strict=True)]

    def abort(self) -> None:
        """End every request of `generate` after the running decode step, with the tokens drawn so far.

        Returns when all of them have ended.
        """
        while True:  # what is still on its way to the server is ended once it is there
            with self._lock:
                ids = [ID_PREFIX + id_ for id_ in self._in_flight]
            if not ids:
                return
            self._call("POST", "/abort_requests", {"request_ids": ids})
            time.sleep(ABORT_AGAIN_S)

    def fetch(self, manifest: Manifest) -> None:
        """Bring the workers' host mirrors to a version while generation goes on. Raises CorruptWeights, NotFound."""
        # the same again changes nothing, and a server that was started again needs it
        self._call("POST", "/init_weight_transfer_engine", {"init_info": self._source.as_init_info()})
        self._fetched_dir = fetch(self._rpc, manifest, lora_rank=self._lora_rank)

    def discard(self) -> None:
        """Forget what was fetched: the next version comes from a keyframe. What is drawn until then has no version."""
        self._call("POST", "/update_weight_version", {"new_version": NO_VERSION})
        self._rpc("stalewise_discard")

    def notice_loss(self) -> None:
        """Ask the server what it calls its weights: `version` is -1 once it has lost it. Raises EngineUnreachable."""
        if not self._call("GET", "/weight_info")["weight_version"].isdecimal():
            self._version = -1

    def load(self, manifest: Manifest) -> None:
        """Put the fetched version into use after the running decode step. Raises CorruptWeights, EngineUnreachable.

        Requests in flight wait and go on, their KV recomputed. After an error the server's weights have no version
        until another load succeeds.
        """
        try:
            if self._fetched_dir:
                self._switch(self._adapters.new(manifest.version, self._fetched_dir))
            else:
                self._replace(manifest.version)
        except BaseException:
            self._version = -1
            raise
        self._version = manifest.version  # only now: requests that begin meanwhile wait in the server

    def score(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return the log-probs [N - 1] of token_ids[1:] at temperature 1. Raises InvalidRequest, EngineUnreachable."""
        self._limits.check(token_ids, 1)
        params = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        answer = self._call("POST", "/inference/v1/generate", _body(token_ids, params, self._adapters.current))
        pairs = zip(token_ids[1:].tolist(), answer["prompt_logprobs"][1:], strict=True)
        return np.array([position[str(token)]["logprob"] for token, position in pairs], np.float32)

    def _replace(self, version: PolicyVersion) -> None:
        with self._paused(version):
            try:
                self._start_update()
                self._call("POST", "/update_weights", {"update_info": {"version": version}})
                self._call("POST", "/finish_weight_update", {"weight_version": str(version)})
            except BaseException:
                self._call("POST", "/update_weight_version", {"new_version": NO_VERSION})
                raise

    def _switch(self, adapter: LoadedAdapter) -> None:
        """Draw new requests under an adapter, without a pause; those in flight end under theirs."""
        try:
            self._call("POST", "/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": adapter.directory})
        except InvalidRequest as error:  # of another shape or rank than the model's modules
            raise CorruptWeights(f"vLLM refuses the adapter of version {adapter.version}: {error}") from error
        with self._lock:
            retired = self._adapters.switch(adapter)
        for old in retired:
            self._call("POST", "/v1/unload_lora_adapter", {"lora_name": old.name})
            self._rpc("stalewise_drop_adapter", old.directory)

    async def _draw(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send all requests at once; return the one choice of each answer."""
        ids = [uuid.uuid4().hex for _ in bodies]
        with self._lock:
            self._in_flight |= set(ids)
        limits = httpx.Limits(max_connections=None)
        try:
            async with httpx.AsyncClient(
                base_url=self._url, timeout=self._request_timeout, limits=limits, trust_env=False
            ) as http:
                answers = await asyncio.gather(
                    *(
                        http.post("/inference/v1/generate", json={"request_id": id_, **body})
                        for id_, body in zip(ids, bodies, strict=True)
                    )
                )
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        finally:
            with self._lock:
                self._in_flight -= set(ids)
        return [self._drawn(answer)["choices"][0] for answer in answers]

    def _drawn(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code == httpx.codes.NOT_FOUND and self._lora_rank:
            self._version = -1
            with self._lock:
                self._adapters.forget()
            raise CorruptWeights(
                f"{self._url} does not know the adapter that it was given",
                hint="it was started again: the adapter is loaded again",
            )
        answer: dict[str, Any] = self._answer(response)
        return answer

    def _completion(
        self, request: GenerationRequest, choice: dict[str, Any], adapter: LoadedAdapter | None
    ) -> Completion:
        drawn = choice["logprobs"]["content"] or []
        kept = self._limits.kept(
            request.sampling,
            ([(token["token_id"], token["logprob"]), *_pairs(token["top_logprobs"])] for token in drawn),
        )
        return Completion(
            response_ids=np.array(choice["token_ids"], np.int32),
            behavior_logprobs=np.array([token["logprob"] for token in drawn], np.float32),
            spans=spans_of(choice["token_ids"], adapter) or tuple(self._spans(choice["weight_versions"] or [])),
            finish_reason=kept.finish_reason(choice["finish_reason"]),
            kept_token_ids=kept.ids,
            kept_token_counts=kept.counts,
        )

    def _spans(self, spans: list[dict[str, Any]]) -> Iterator[VersionSpan]:
        for span in spans:
            if not span["version"].isdecimal():
                self._version = -1
                raise CorruptWeights(
                    f"{self._url} drew tokens under weights that it calls {span['version']!r}",
                    hint="it was started again, or a load went wrong: the weights are loaded again",
                )
            yield VersionSpan(start=span["start"], end=span["end"], version=int(span["version"]))

    @contextmanager
    def _paused(self, version: PolicyVersion) -> Iterator[None]:
        """Stop after the running step, requests kept and caches dropped; go on at the end whatever happened."""
        # old KV would make log-probs that belong to neither version
        began_s = time.monotonic()
        self._call("POST", "/pause?mode=keep&clear_cache=true")
        try:
            yield
        finally:
            self._call("POST", "/resume")
            self.pause_s = time.monotonic() - began_s
        log.info("version %d is in use after a pause of %.1f ms", version, 1e3 * self.pause_s)

    def _start_update(self) -> None:
        """Begin vLLM's update; one that a killed actor left open is ended first."""
        try:
            self._call("POST", "/start_weight_update")
        except CorruptWeights:
            self._call("POST", "/finish_weight_update")
            self._call("POST", "/start_weight_update")

    def _wait_until_served(self, timeout_s: float) -> dict[str, Any]:
        """Return what the server says about the model it serves."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                served: dict[str, Any] = self._call("GET", "/v1/models")["data"][0]
            except EngineUnreachable:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.2)
            else:
                return served

    def _check_server(self) -> None:
        """Raise InvalidSettings for a server whose log-probs or weights would be others than we say."""
        (found, *_) = self._rpc("stalewise_describe")
        check_version(found["version"])
        wanted = {
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": MAX_LOGPROBS,
            "generation_config": "vllm",
            "max_lora_rank": max_lora_rank(self._lora_rank) if self._lora_rank else 0,
        }
        for name, value in wanted.items():
            if found[name] != value:
                raise InvalidSettings(
                    f"the vLLM server at {self._url} was started with {name} = {found[name]}, not {value}",
                    hint="start it with `stalewise serve-vllm`, or with the flags that docs/vllm.md names",
                )

    def _rpc(self, method: str, *arguments: str) -> list[Any]:
        results: list[Any] = self._call("POST", "/collective_rpc", {"method": method, "args": list(arguments)})[
            "results"
        ]
        return results

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            return self._answer(self._http.request(method, path, json=body))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _answer(self, response: httpx.Response) -> Any:
        """Return the decoded body of an answer. Raises what it says went wrong."""
        if response.is_success:
            return response.json() if response.headers.get("content-type") == "application/json" else None
        said = f"{response.request.method} {self._url}{response.request.url.path} answered {response.status_code}"
        said = f"{said}: {response.text[:500]}"
        if response.status_code in (401, 403, 404):
            raise InvalidSettings(said, hint="start the server as docs/vllm.md says")
        if response.status_code in (400, 413, 422):
            raise InvalidRequest(said)
        if response.status_code == 503:
            raise EngineUnreachable(said, hint="it is starting, ending or overloaded")
        raise CorruptWeights(said, hint="the server's log says more")

    def _unreachable(self, error: BaseException) -> EngineUnreachable:
        return EngineUnreachable(
            f"no answer from the vLLM server at {self._url}: {error or type(error).__name__}",
            hint="check that it runs and that actor.vllm.url is right",
        )


def _body(token_ids: npt.NDArray[np.int32], params: dict[str, Any], adapter: LoadedAdapter | None) -> dict[str, Any]:
    body = {"token_ids": token_ids.tolist(), "sampling_params": params}
    return body if adapter is None else {**body, "model": adapter.name}


def _pairs(reported: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(token["token_id"], token["logprob"]) for token in reported]
