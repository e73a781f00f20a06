"""The vLLM server that a `RemoteVllmEngine` talks to: its command line and its environment."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from actor.settings import VllmSettings
from actor.vllm.adapters import max_lora_rank
from actor.vllm.plugin import BACKEND, WORKER_EXTENSION
from actor.vllm.sampling import MAX_LOGPROBS
from buffer.errors import InvalidSettings


def server_command(model_dir: Path, settings: VllmSettings, *, host: str, port: int, seed: int) -> list[str]:
    """Return the command that starts the server. Its environment: `server_environment`.

    `seed` must differ from server to server, or all of them draw the same responses.
    """
    options = {
        "--model": str(model_dir),
        "--host": host,
        "--port": str(port),
        "--load-format": "auto" if settings.lora_rank else "dummy",
        "--generation-config": "vllm",
        "--dtype": settings.dtype,
        "--seed": str(seed),
        "--max-num-seqs": str(settings.max_sequences),
        "--gpu-memory-utilization": str(settings.memory_share),
        "--tensor-parallel-size": str(settings.tensor_parallel),
        "--logprobs-mode": "processed_logprobs",
        "--max-logprobs": str(MAX_LOGPROBS),
        "--weight-transfer-config": json.dumps({"backend": BACKEND}),
        "--worker-extension-cls": WORKER_EXTENSION,
    }
    if settings.max_model_tokens is not None:
        options["--max-model-len"] = str(settings.max_model_tokens)
    flags = ["--enable-scale-out", "--skip-tokenizer-init", "--disable-uvicorn-access-log"]
    if settings.lora_rank:
        flags.append("--enable-lora")
        options |= {"--max-lora-rank": str(max_lora_rank(settings.lora_rank)), "--max-loras": str(settings.lora_slots)}
    if not settings.compile:
        flags.append("--enforce-eager")
    # not `vllm serve`: that command asks for metadata of a distribution called vllm, which the CPU build is not
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return [*program, *flags, *(part for option in options.items() for part in option)]


def server_environment(settings: VllmSettings) -> dict[str, str]:
    """Return the variables that the server needs; those that the caller's environment sets win."""
    needed = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # processes share a machine: vLLM must not pin cores
    }
    # the routes for pauses, updates, aborts and adapters
    routes = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if settings.lora_rank else "0"}
    return needed | dict(os.environ) | routes


def run_server(model_dir: Path, settings: VllmSettings, *, host: str, port: int, seed: int) -> None:
    """Become the server. Raises InvalidSettings when vLLM is not installed here."""
    if find_spec("vllm") is None:
        raise InvalidSettings(
            "vLLM is not installed in this environment",
            hint="on a GPU machine: pip install '.[vllm]'; for the CPU build: `make setup-vllm`, then run"
            " `.venv-vllm/bin/stalewise serve-vllm`",
        )
    command = server_command(model_dir, settings, host=host, port=port, seed=seed)
    os.execve(command[0], command, server_environment(settings))
