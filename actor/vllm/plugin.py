"""What vLLM calls in each of its processes, as a `vllm.general_plugins` entry point: our weight transfer made known.

[project.entry-points."vllm.general_plugins"]
stalewise = "actor.vllm.plugin:register"
"""

import os

from buffer.errors import InvalidSettings

BACKEND = "stalewise"
"""Name of our weight transfer: --weight-transfer-config '{"backend": "stalewise"}'."""
WORKER_EXTENSION = "actor.vllm.transfer.FetchingWorker"
"""What --worker-extension-cls adds to vLLM's workers."""
SUPPORTED = ((0, 32), (0, 34))
"""vLLM releases from the first up to, not including, the second: what `vllm` in pyproject.toml says."""


def check_version(version: str) -> None:
    """Raise InvalidSettings for a vLLM whose inside we do not know: it moves from release to release."""
    first, after = SUPPORTED
    major, minor = version.split(".")[:2]
    if not first <= (int(major), int(minor)) < after:
        raise InvalidSettings(
            f"vLLM {version} is not supported",
            hint=f"install a release from {first[0]}.{first[1]} up to, not including, {after[0]}.{after[1]}",
        )


def register() -> None:
    """Register the weight transfer, and work around virtual machines that advertise AMX and die of it.

    Harmless in a vLLM that is not ours, and when called again.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "actor.vllm.transfer", "MirrorTransfer")
    if current_platform.is_cpu():
        import torch

        # the CPU build is for tests, not for speed
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        torch.cpu._is_amx_tile_supported = lambda: False
