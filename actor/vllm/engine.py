"""The engine on vLLM, in this process.

    who            waits for                      does
    generator      its turn, one decode step      adds its requests, steps until they are finished; of several one steps
    weight sync    the end of the running step    load: new weights, caches dropped; score: steps its own request

vLLM's engine core runs in this process and moves only when one of us calls `step`, so the gap between two steps
is the safe point: a load that arrives in mid-generation waits for one decode step, replaces the weights,
preempts the running requests (their KV is recomputed under the new weights) and lets them go on.
vLLM labels every token with the version it was drawn under; a completion then has one span per version.
"""

import itertools
import logging
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actor.end_tokens import end_token_ids
from actor.engine import Completion, GenerationRequest
from actor.settings import VllmSettings
from actor.turns import SharedSteps, Turns
from actor.vllm.adapters import AdapterVersions, LoadedAdapter, max_lora_rank, spans_of
from actor.vllm.fetching import WeightSource, fetch
from actor.vllm.plugin import BACKEND, WORKER_EXTENSION, check_version
from actor.vllm.sampling import MAX_LOGPROBS, Limits, check_sampling
from buffer.errors import CorruptWeights, InvalidSettings
from buffer.types import PolicyVersion, SamplingSettings, VersionSpan
from buffer.weights.manifest import Manifest

log = logging.getLogger(__name__)


class VllmEngine:
    """`actor.engine.Engine` on a vLLM engine core in this process.

    Made from a directory with a model's config and tokenizer; its weights, if any, are not read: vLLM's workers fetch
    every version from `source`. `seed` must differ from actor to actor, or all of them draw the same responses.
    """

    def __init__(
        self, model_dir: Path, settings: VllmSettings, *, sampling: SamplingSettings, seed: int, source: WeightSource
    ) -> None:
        """Start vLLM, which takes from seconds (CPU, tiny) to minutes (compiled).

        Raises InvalidSettings when vLLM is not installed, the model directory is none, or `sampling` is refused.
        """
        check_sampling(sampling)
        if not (model_dir / "config.json").is_file():
            raise InvalidSettings(f"{model_dir} is no model directory: it holds no config.json")
        if find_spec("vllm") is None:
            raise InvalidSettings(
                "vLLM is not installed in this environment",
                hint="on a GPU machine: pip install '.[vllm]'; for the CPU build: `make setup-vllm`, then run"
                " `.venv-vllm/bin/stalewise act --engine vllm`; or set actor.vllm.url to a server that runs elsewhere",
            )
        self._engine = _start(model_dir, settings, seed)
        self._limits = Limits(
            vocab_size=self._engine.model_config.get_vocab_size(),
            max_model_tokens=self._engine.model_config.max_model_len,
            end_ids=end_token_ids(model_dir),
        )
        self._version: PolicyVersion = -1
        self.pause_s = 0.0
        """How long no token was drawn for the last load."""
        self._ids = itertools.count()
        self._generating: dict[str, str] = {}  # ids of requests that `abort` ends, and vLLM's own ids of them
        self._finished: dict[str, Any] = {}
        self._lora_rank = settings.lora_rank
        self._adapters = AdapterVersions()
        self._fetched_dir = ""
        self._turns = Turns()
        self._steps = SharedSteps()
        self._rpc("init_weight_transfer_engine", source.as_init_info())

    @property
    def version(self) -> PolicyVersion:
        """The version of the weights in use; -1 before the first load."""
        return self._version

    @property
    def max_tokens(self) -> int:
        """Prompt and response together, at most: what vLLM was started for."""
        return self._limits.max_model_tokens

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Draw all requests; vLLM batches them. Raises InvalidRequest, InvalidSettings.

        Raises CorruptWeights before the first load, and when a load went wrong meanwhile.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = [
            SamplingParams(
                **self._limits.sampling_params(request), flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
            )
            for request in requests
        ]
        with self._turns.take():
            adapter = self._adapters.begin()
        try:
            prompts = [request.prompt_ids for request in requests]
            outputs = self._run(list(zip(prompts, params, strict=True)), adapter, abortable=True)
        finally:
            with self._turns.take():
                self._adapters.end(adapter)
        return [self._completion(r, output, adapter) for r, output in zip(requests, outputs, strict=True)]

    def abort(self) -> None:
        """End every request of `generate` after the running decode step, with the tokens drawn so far."""
        from vllm.v1.engine import FinishReason as VllmFinishReason

        with self._turns.take():
            states = self._engine.output_processor.request_states
            for id_, vllm_id in self._generating.items():
                if vllm_id in states:
                    # vLLM's own abort forgets what was drawn, but for requests that came over HTTP
                    self._finished[id_] = states[vllm_id].make_request_output([], None, VllmFinishReason.ABORT, None)
            self._engine.abort_request(list(self._generating))

    def fetch(self, manifest: Manifest) -> None:
        """Bring the workers' host mirrors to a version while generation goes on. Raises CorruptWeights, NotFound."""
        self._fetched_dir = fetch(self._rpc_in_turn, manifest, lora_rank=self._lora_rank)

    def discard(self) -> None:
        """Forget what was fetched: the next version comes from a keyframe."""
        self._rpc_in_turn("stalewise_discard")

    def load(self, manifest: Manifest) -> None:
        """Put the fetched version into use after the running decode step. Raises CorruptWeights.

        After an error the engine holds no version until another load succeeds.
        """
        with self._turns.take():
            began_s = time.monotonic()
            self._version = -1
            if self._fetched_dir:
                self._switch(self._adapters.new(manifest.version, self._fetched_dir))
            else:
                self._replace(manifest.version)
            self._version = manifest.version
            self.pause_s = time.monotonic() - began_s
        log.info("version %d is in use after a pause of %.1f ms", manifest.version, 1e3 * self.pause_s)

    def _replace(self, version: PolicyVersion) -> None:
        self._rpc("start_weight_update")
        self._rpc("update_weights", {"version": version})
        self._rpc("finish_weight_update")
        # requests in flight go on, their KV recomputed: old KV would make log-probs that belong to neither version
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(version))

    def _switch(self, adapter: LoadedAdapter) -> None:
        """Draw new requests under an adapter; those in flight end under theirs."""
        try:
            self._engine.add_lora(_lora_request(adapter))
        except ValueError as error:  # of another shape or rank than the model's modules
            raise CorruptWeights(f"vLLM refuses the adapter of version {adapter.version}: {error}") from error
        for retired in self._adapters.switch(adapter):
            self._engine.remove_lora(retired.number)
            self._rpc("stalewise_drop_adapter", retired.directory)

    def score(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return the log-probs [N - 1] of token_ids[1:] at temperature 1. Raises InvalidRequest."""
        from vllm import SamplingParams

        self._limits.check(token_ids, 1)
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._run([(token_ids, params)], self._adapters.current, abortable=False)
        pairs = zip(token_ids[1:].tolist(), output.prompt_logprobs[1:], strict=True)
        return np.array([position[token].logprob for token, position in pairs], np.float32)

    def _completion(self, request: GenerationRequest, output: Any, adapter: LoadedAdapter | None) -> Completion:
        """Translate a finished vLLM output. Its log-probs list, token after token, the drawn one first."""
        (drawn,) = output.outputs
        flat = drawn.logprobs
        bounds = list(zip(flat.start_indices, flat.end_indices, strict=True))
        kept = self._limits.kept(
            request.sampling,
            (list(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True)) for start, end in bounds),
        )
        return Completion(
            response_ids=np.array(drawn.token_ids, np.int32),
            behavior_logprobs=np.array([flat.logprobs[start] for start, _ in bounds], np.float32),
            spans=spans_of(drawn.token_ids, adapter)
            or tuple(VersionSpan(start=s.start, end=s.end, version=int(s.version)) for s in drawn.weight_versions),
            finish_reason=kept.finish_reason(drawn.finish_reason),
            kept_token_ids=kept.ids,
            kept_token_counts=kept.counts,
        )

    def _run(
        self, requests: list[tuple[npt.NDArray[np.int32], Any]], adapter: LoadedAdapter | None, *, abortable: bool
    ) -> list[Any]:
        """Run requests to their end, one step a turn; threads that run at once share them. Raises CorruptWeights."""
        from vllm.inputs import tokens_input

        ids = [str(next(self._ids)) for _ in requests]
        lora = None if adapter is None else _lora_request(adapter)
        with self._turns.take():
            for id_, (prompt_ids, params) in zip(ids, requests, strict=True):
                vllm_id = self._engine.add_request(id_, tokens_input(prompt_ids.tolist()), params, lora_request=lora)
                if abortable:
                    self._generating[id_] = vllm_id
        try:
            self._steps.until(lambda: all(id_ in self._finished for id_ in ids), self._step)
        finally:
            with self._turns.take():
                self._engine.abort_request(ids)  # of those that are not finished
                outputs = [self._finished.pop(id_, None) for id_ in ids]
                for id_ in ids:
                    self._generating.pop(id_, None)
        return outputs

    def _step(self) -> bool:
        """Draw a token for every running request; whether one of them has ended."""
        with self._turns.take():
            if self._version < 0:
                raise CorruptWeights("the engine holds no weights", hint="a version must be loaded first")
            ended = {output.request_id: output for output in self._engine.step() if output.finished}
            self._finished |= ended
        return bool(ended)

    def _rpc(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker; the caller owns the core, or nobody else uses it yet."""
        results: list[Any] = self._engine.collective_rpc(method, args=arguments)
        return results

    def _rpc_in_turn(self, method: str, *arguments: Any) -> list[Any]:
        with self._turns.take():
            return self._rpc(method, *arguments)


def _lora_request(adapter: LoadedAdapter) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=adapter.name, lora_int_id=adapter.number, lora_path=adapter.directory)


def _start(model_dir: Path, settings: VllmSettings, seed: int) -> Any:
    """Return vLLM's synchronous engine, its core in this process and its steps one at a time."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the core steps by itself, in another process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.cpu_kv_gib))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # actors share a machine: vLLM must not pin cores
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform
    from vllm.version import __version__

    check_version(__version__)
    arguments = EngineArgs(
        model=str(model_dir),
        load_format="auto" if settings.lora_rank else "dummy",
        enable_lora=settings.lora_rank > 0,
        max_lora_rank=max_lora_rank(settings.lora_rank),
        max_loras=settings.lora_slots,
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=settings.dtype,
        seed=seed,
        max_model_len=settings.max_model_tokens,
        max_num_seqs=settings.max_sequences,
        gpu_memory_utilization=settings.memory_share,
        tensor_parallel_size=settings.tensor_parallel,
        enforce_eager=not settings.compile,
        logprobs_mode="processed_logprobs",
        max_logprobs=MAX_LOGPROBS,
        weight_transfer_config={"backend": BACKEND},
        worker_extension_cls=WORKER_EXTENSION,
        async_scheduling=False,  # else a step in flight outlives the turn that began it
        disable_log_stats=True,
    )
    engine = LLMEngine.from_engine_args(arguments)
    if current_platform.is_cpu():
        check_head_size(engine.model_config.get_head_size())
    return engine


def check_head_size(head_size: int) -> None:
    """Refuse at start what the CPU build would die of in its first step."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in known:
        raise InvalidSettings(
            f"the model's attention heads are {head_size} wide; vLLM's CPU build knows {', '.join(map(str, known))}",
            hint="use actor.engine = torch, or a model with other num_attention_heads",
        )
