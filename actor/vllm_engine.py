"""The engine on vLLM, in process: the only file that touches vLLM.

    who            waits for                      does
    generator      its turn, one decode step      adds its requests, steps until they are finished
    weight sync    the end of the running step    load: new weights, caches dropped; score: steps its own request

vLLM's engine core runs in this process and moves only when one of us calls `step`, so the gap between two steps
is the safe point: a load that arrives in mid-generation waits for one decode step, replaces the weights,
preempts the running requests (their KV is recomputed under the new weights) and lets them go on.
vLLM labels every token with the version it was drawn under; a completion then has one span per version.
"""

import itertools
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actor.engine import Completion, GenerationRequest
from actor.settings import VllmSettings
from actor.tasks import eos_token_id
from actor.tokenizer import load_tokenizer
from actor.turns import Turns
from buffer.errors import CorruptWeights, InvalidRequest, InvalidSettings
from buffer.types import FinishReason, PolicyVersion, SamplingSettings, VersionSpan
from buffer.weights.manifest import Adapter

MIN_TEMPERATURE = 0.01
"""vLLM silently raises lower temperatures to this one: the log-probs would belong to other settings."""
MAX_TOP_K = 64
"""Kept ids are read from each token's top log-probs, so their number bounds what is shipped per token."""
TIES = 8
"""Log-probs asked beyond top_k: tokens tied at the threshold are kept as well."""


def check_sampling(sampling: SamplingSettings) -> None:
    """Raise InvalidSettings for sampling settings whose behaviour log-probs vLLM cannot report in full."""
    if sampling.temperature < MIN_TEMPERATURE:
        raise InvalidSettings(
            f"temperature={sampling.temperature} is below {MIN_TEMPERATURE}: vLLM would silently use {MIN_TEMPERATURE}",
            hint="for the most likely token set top_k = 1",
        )
    if sampling.truncates and not 1 <= sampling.top_k <= MAX_TOP_K:
        raise InvalidSettings(
            f"top_p={sampling.top_p}, top_k={sampling.top_k}, min_p={sampling.min_p}: vLLM reports which tokens"
            f" truncated sampling kept only among the {MAX_TOP_K} most likely ones",
            hint=f"set top_k between 1 and {MAX_TOP_K} as well, or top_p = 1, top_k = 0 and min_p = 0",
        )


class VllmEngine:
    """`actor.engine.Engine` on a vLLM engine core in this process.

    Made from a directory with a model's config and tokenizer; its weights, if any, are not read: `load` brings them.
    `seed` must differ from actor to actor, or all of them draw the same responses.
    """

    def __init__(self, model_dir: Path, settings: VllmSettings, *, sampling: SamplingSettings, seed: int) -> None:
        """Start vLLM, which takes from seconds (CPU, tiny) to minutes (compiled).

        Raises InvalidSettings when vLLM is not installed, the model directory is none, or `sampling` is refused.
        """
        check_sampling(sampling)
        if not (model_dir / "config.json").is_file():
            raise InvalidSettings(f"{model_dir} is no model directory: it holds no config.json")
        if find_spec("vllm") is None:
            raise InvalidSettings(
                "vLLM is not installed in this environment",
                hint="install the vLLM environment with `make setup-vllm`, then run"
                " `.venv-vllm/bin/stalewise act --engine vllm`",
            )
        self._engine = _start(model_dir, settings, seed)
        self._shapes = _tensor_shapes(model_dir)
        self._max_model_tokens: int = self._engine.model_config.max_model_len
        self._vocabulary: int = self._engine.model_config.get_vocab_size()
        self._eos_id = eos_token_id(load_tokenizer(model_dir))
        self._version: PolicyVersion = -1
        self._ids = itertools.count()
        self._finished: dict[str, Any] = {}
        self._turns = Turns()

    @property
    def version(self) -> PolicyVersion:
        """The version of the weights in use; -1 before the first load."""
        return self._version

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Draw all requests; vLLM batches them. Raises InvalidRequest, InvalidSettings."""
        for request in requests:
            check_sampling(request.sampling)
            self._check_tokens(request.prompt_ids, request.max_new_tokens)
        outputs = self._run([(r.prompt_ids, self._sampling_params(r)) for r in requests])
        return [self._completion(request, output) for request, output in zip(requests, outputs, strict=True)]

    def load(self, weights: Path, version: PolicyVersion, *, adapter: Adapter | None = None) -> None:
        """Replace the weights after the running decode step; returns once they are in use.

        Raises CorruptWeights when the file does not hold this model's tensors; the old ones then stay in use.
        """
        if adapter is not None:
            raise InvalidSettings(
                f"version {version} is an adapter, which engine vllm cannot load",
                hint="use actor.engine = torch, or train whole weights",
            )
        self._check_file(weights, version)
        with self._turns.take():
            self._version = -1
            missing = self._engine.collective_rpc(_load_weights, args=(str(weights),))
            if any(missing):
                raise CorruptWeights(f"version {version}: vLLM left {', '.join(missing[0])} as they were")
            # requests in flight go on, their KV recomputed: old KV would make log-probs that belong to neither version
            self._engine.reset_prefix_cache(reset_running_requests=True)
            self._engine.set_weight_version(str(version))
            self._version = version

    def score(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return the log-probs [N - 1] of token_ids[1:] at temperature 1. Raises InvalidRequest."""
        from vllm import SamplingParams

        self._check_tokens(token_ids, 1)
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._run([(token_ids, params)])
        pairs = zip(token_ids[1:].tolist(), output.prompt_logprobs[1:], strict=True)
        return np.array([position[token].logprob for token, position in pairs], np.float32)

    def _check_tokens(self, prompt_ids: npt.NDArray[np.int32], max_new_tokens: int) -> None:
        """Refuse what vLLM, without a tokenizer to ask, would die of in mid-step."""
        if not len(prompt_ids) or prompt_ids.min() < 0 or prompt_ids.max() >= self._vocabulary:
            raise InvalidRequest(
                f"a prompt needs token ids from 0 to {self._vocabulary - 1}, not {prompt_ids.tolist()}"
            )
        if len(prompt_ids) + max_new_tokens > self._max_model_tokens:
            raise InvalidRequest(
                f"{len(prompt_ids)} prompt tokens and max_new_tokens={max_new_tokens} exceed the"
                f" {self._max_model_tokens} tokens this engine was started for",
                hint="lower actor.max_new_tokens, or raise actor.vllm.max_model_tokens up to the model's limit",
            )

    def _check_file(self, weights: Path, version: PolicyVersion) -> None:
        """Compare names and shapes with the model's before vLLM is touched: it cannot go back."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(weights, framework="np") as checkpoint:
                found = {name: tuple(checkpoint.get_slice(name).get_shape()) for name in checkpoint.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptWeights(f"version {version}: {weights} is no safetensors file: {error}") from error
        for name, shape in self._shapes.items():
            if found.get(name) != shape:
                seen = f"has {name} with shape {found[name]}" if name in found else f"lacks {name}"
                raise CorruptWeights(
                    f"version {version}: the file {seen}, the model needs shape {shape}",
                    hint="give the actor the model directory that the learner started from",
                )

    def _sampling_params(self, request: GenerationRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=request.max_new_tokens,
            stop_token_ids=[self._eos_id],
            logprobs=self._num_reported(sampling),
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _num_reported(self, sampling: SamplingSettings) -> int:
        """How many of the most likely tokens come with each drawn one, which always comes."""
        return min(sampling.top_k + TIES, self._vocabulary) if sampling.truncates else 0

    def _completion(self, request: GenerationRequest, output: Any) -> Completion:
        """Translate a finished vLLM output. Its log-probs list, token after token, the drawn one first."""
        (drawn,) = output.outputs
        logprobs = np.array(drawn.logprobs.logprobs, np.float32)[drawn.logprobs.start_indices]
        kept_ids, kept_counts = (
            self._kept(request.sampling, drawn.logprobs) if request.sampling.truncates else (None,) * 2
        )
        return Completion(
            response_ids=np.array(drawn.token_ids, np.int32),
            behavior_logprobs=logprobs,
            spans=tuple(VersionSpan(start=s.start, end=s.end, version=int(s.version)) for s in drawn.weight_versions),
            finish_reason=FinishReason(drawn.finish_reason),
            kept_token_ids=kept_ids,
            kept_token_counts=kept_counts,
        )

    def _kept(self, sampling: SamplingSettings, reported: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return the ids that truncated sampling kept, ragged: the reported ones whose log-prob is not -inf."""
        ids: list[int] = []
        counts: list[int] = []
        num_reported = self._num_reported(sampling)
        for start, end in zip(reported.start_indices, reported.end_indices, strict=True):
            pairs = zip(reported.token_ids[start:end], reported.logprobs[start:end], strict=True)
            kept = {token for token, logprob in pairs if logprob > -np.inf}
            if len(kept) >= num_reported < self._vocabulary:
                raise InvalidSettings(
                    f"{TIES} tokens or more tie with the last of top_k={sampling.top_k}: the kept ids are incomplete",
                    hint="set another top_k, or none",
                )
            ids.extend(sorted(kept))
            counts.append(len(kept))
        return np.array(ids, np.int32), np.array(counts, np.int32)

    def _run(self, requests: list[tuple[npt.NDArray[np.int32], Any]]) -> list[Any]:
        """Run requests to their end, one step a turn; threads that run at once share the steps."""
        from vllm.inputs import tokens_input

        ids: list[str] = []
        with self._turns.take():
            for prompt_ids, params in requests:
                ids.append(str(next(self._ids)))
                self._engine.add_request(ids[-1], tokens_input(prompt_ids.tolist()), params)
        while True:
            with self._turns.take():
                if all(id_ in self._finished for id_ in ids):
                    return [self._finished.pop(id_) for id_ in ids]
                if self._version < 0:
                    self._engine.abort_request(ids)
                    raise InvalidRequest("no weights are loaded yet", hint="load a published version first")
                self._finished |= {output.request_id: output for output in self._engine.step() if output.finished}


def _start(model_dir: Path, settings: VllmSettings, seed: int) -> Any:
    """Return vLLM's synchronous engine, its core in this process and its steps one at a time."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the core steps by itself, in another process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.cpu_kv_gib))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # actors share a machine: vLLM must not pin cores
    # virtual machines advertise AMX that dies on its first instruction; vLLM's CPU build is for tests, not for speed
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import torch

        torch.cpu._is_amx_tile_supported = lambda: False
    arguments = EngineArgs(
        model=str(model_dir),
        load_format="dummy",
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
        max_logprobs=MAX_TOP_K + TIES,
        async_scheduling=False,  # else a step in flight outlives the turn that began it
        disable_log_stats=True,
    )
    engine = LLMEngine.from_engine_args(arguments)
    if current_platform.is_cpu():
        _check_head_size(engine.model_config.get_head_size())
    return engine


def _check_head_size(head_size: int) -> None:
    """Refuse at start what the CPU build would die of in its first step."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in known:
        raise InvalidSettings(
            f"the model's attention heads are {head_size} wide; vLLM's CPU build knows {', '.join(map(str, known))}",
            hint="use actor.engine = torch, or a model with other num_attention_heads",
        )


def _tensor_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a checkpoint of this model must hold, tied ones once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir, local_files_only=True))
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def _load_weights(worker: Any, weights: str) -> list[str]:
    """Load a checkpoint through vLLM's layerwise reload, in a vLLM worker; return the parameters it did not reach.

    Copying into the parameters is not enough: vLLM packs linear layers and drops the originals. The life cycle
    restores, loads and packs again, layer by layer; but it only warns about a layer that got nothing, and an output
    layer that shares the embedding's parameter gets nothing: its packed copy would stay the old one.
    """
    from safetensors import safe_open
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    # it warns about every layer without weights of its own, each time; what was not reached we say ourselves
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    model = worker.get_model()
    shared = _shared_parameters(model)
    with safe_open(weights, framework="pt") as checkpoint, set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        expected = {name for name, _ in model.named_parameters()}
        loaded = model.load_weights((name, checkpoint.get_tensor(name)) for name in checkpoint.keys())  # noqa: SIM118
        finalize_layerwise_reload(model, worker.model_config)
        tied = {name for name, owner in shared.items() if owner in loaded and name not in loaded}
        for name in tied:
            layer = model.get_submodule(name.rpartition(".")[0])
            layer.quant_method.process_weights_after_loading(layer)
    return sorted(expected - loaded - tied)


def _shared_parameters(model: Any) -> dict[str, str]:
    """Map the name of each parameter that is another layer's to the name under which that layer owns it."""
    owners: dict[int, str] = {}
    names = [(name, owners.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: owner for name, owner in names if name != owner}
