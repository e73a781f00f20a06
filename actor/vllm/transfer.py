"""Our weight transfer inside a vLLM worker: versions pulled over HTTP into a host mirror, loaded layer by layer.

    who               does                                                     while vLLM
    fetching thread   download, verify, decode into the mirror: `fetch`        goes on generating
    vLLM's worker     mirror -> model: start, update, finish of vLLM's update  is paused

Copying into the parameters is not enough: vLLM packs linear layers and drops the originals. Its layerwise reload
restores, loads and packs again; but it only warns about a layer that got nothing, and an output layer that shares the
embedding's parameter gets nothing: its packed copy would stay the old one.
"""

import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.version import __version__

from buffer.client import HttpWeightStore, ServiceClient
from buffer.connection import ClientSettings
from buffer.errors import CorruptWeights, InvalidRequest, ServiceUnreachable, StalewiseError, StoreUnavailable
from buffer.types import PolicyVersion
from buffer.weights.follower import Follower
from buffer.weights.manifest import Manifest

MIRROR_FILE = "mirror.safetensors"
"""The file of a Follower's mirror: the workers of a machine that do not follow read the leader's."""


@dataclass
class Source(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM has no types here
    """Where versions are fetched from."""

    url: str
    token: str | None = field(default=None, repr=False)
    ca_file: str | None = None


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]  # vLLM has no types here
    """Which version the mirror must hold."""

    version: int


class MirrorTransfer(WeightTransferEngine):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's interface for weight transfers, one per worker."""

    init_info_cls, update_info_cls = Source, Update

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # one thread: a fetch that a killed actor began ends before the next one starts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stalewise-fetch")
        self._fetch: Future[None] | None = None
        self._source: Source | None = None
        self._client: ServiceClient | None = None
        # one file for all workers of a machine: the first of them writes it
        self._directory = Path(tempfile.gettempdir()) / f"stalewise-{self.vllm_config.instance_id}"
        self._clean_up: Callable[[], object] | None = None  # deletes the directory, in the worker that leads
        self._follower: Follower | None = None
        self._version: PolicyVersion = -1  # that the file holds
        self._adapter_dir: Path | None = None  # of the last version fetched, if it is an adapter
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shared: dict[str, str] = {}
        self._expected: set[str] = set()
        self._loaded: set[str] = set()
        # it warns about every layer without weights of its own, each time; what was not reached we say ourselves
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

    def init_transfer_engine(self, init_info: Source) -> None:
        """Connect to the replay service; the same one again changes nothing, the mirror included."""
        if init_info == self._source:
            return
        self.shutdown()
        self._source = init_info
        self._directory.mkdir(mode=0o700, exist_ok=True)
        settings = ClientSettings(ca_file=Path(init_info.ca_file) if init_info.ca_file else None)
        self._client = ServiceClient(init_info.url, token=init_info.token, settings=settings)
        self._follower = Follower(HttpWeightStore(self._client), self._directory)
        self._shapes = tensor_shapes(self.model_config.hf_config)

    def shutdown(self) -> None:
        """Let the service and the mirror go."""
        if self._client is not None:
            self._client.close()
        self._client = self._source = self._follower = None
        self._version = -1
        if self._clean_up is not None:
            self._clean_up()
            self._clean_up = None

    def fetch(self, manifest: Manifest, *, leads: bool) -> None:
        """Begin to bring the mirror to a version; `fetched` tells how it went. One worker of a machine leads."""
        if self._follower is None:
            raise InvalidRequest("no replay service to fetch from", hint="call init_weight_transfer_engine first")
        if leads and self._clean_up is None:  # also at the end of the process
            self._clean_up = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._fetch = self._thread.submit(self._follow, self._follower if leads else None, manifest)

    def fetched(self) -> dict[str, Any]:
        """Tell whether the last fetch is `done`, and the name, detail and hint of the error that ended it.

        `adapter_dir` is where vLLM finds the version, if that is an adapter and this worker leads.
        """
        if self._fetch is None or not self._fetch.done():
            return {"done": False}
        error = self._fetch.exception()
        if error is None:
            return {"done": True, "adapter_dir": str(self._adapter_dir or "")}
        if isinstance(error, httpx.TransportError):
            error = ServiceUnreachable(f"the replay service broke off: {error or type(error).__name__}")
        if not isinstance(error, StalewiseError):
            error = StoreUnavailable(f"the fetch died of {type(error).__name__}: {error}")
        return {"done": True, "error": error.code(), "detail": error.detail, "hint": error.hint}

    def discard(self) -> None:
        """Forget the mirror: the next version comes from a keyframe."""
        if self._follower is not None:
            self._thread.submit(self._follower.discard).result()

    def drop_adapter(self, directory: str) -> None:
        """Delete an adapter that no request uses."""
        if Path(directory).parent == self._directory:
            shutil.rmtree(directory, ignore_errors=True)

    def _follow(self, follower: Follower | None, manifest: Manifest) -> None:
        self._version, self._adapter_dir, adapter = -1, None, manifest.adapter
        if follower is not None:
            mirror, _ = follower.follow(manifest)
            if adapter is None:
                check_shapes({name: t.spec.shape for name, t in mirror.tensors.items()}, self._shapes, manifest.version)
            else:
                assert mirror.path is not None
                # a new directory each time: vLLM's caches go by its name
                self._adapter_dir = Path(tempfile.mkdtemp(prefix=f"adapter-{manifest.version}-", dir=self._directory))
                shutil.copyfile(mirror.path, self._adapter_dir / "adapter_model.safetensors")
                (self._adapter_dir / "adapter_config.json").write_text(json.dumps(adapter.peft_config()))
        self._version = manifest.version

    def start_weight_update(self) -> None:
        """See WeightTransferEngine. Makes every layer wait for its weights."""
        self._shared = shared_parameters(self.model)
        initialize_layerwise_reload(self.model)
        self._expected = {name for name, _ in self.model.named_parameters()}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See WeightTransferEngine, whose own method synchronises a device that a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Load the mirror into the model. Raises InvalidRequest when it holds another version, else CorruptWeights.

        After an error the weights are those of no version, but another update may be started.
        """
        try:
            if self._version != update_info.version:
                raise InvalidRequest(f"version {update_info.version} was not fetched: the mirror holds {self._version}")
            with safe_open(self._directory / MIRROR_FILE, framework="pt") as mirror:
                loaded = self.model.load_weights((name, mirror.get_tensor(name)) for name in mirror.keys())  # noqa: SIM118
            missed = self._expected - loaded - self._tied(loaded)
            if missed:
                raise CorruptWeights(
                    f"version {update_info.version}: vLLM left {', '.join(sorted(missed))} as they were"
                )
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)  # else the next update finds layers half loaded
            raise
        self._loaded = loaded

    def finish_weight_update(self) -> None:
        """See WeightTransferEngine. Packs what is left, and the output layer that shares the embedding's parameter."""
        finalize_layerwise_reload(self.model, self.model_config)
        for name in self._tied(self._loaded):
            layer = self.model.get_submodule(name.rpartition(".")[0])
            layer.quant_method.process_weights_after_loading(layer)

    def _tied(self, loaded: set[str]) -> set[str]:
        """Return the parameters that got nothing because another layer owns them and did."""
        return {name for name, owner in self._shared.items() if owner in loaded and name not in loaded}


class FetchingWorker:
    """Methods that vLLM adds to its workers: `collective_rpc` calls them by name, with texts as arguments."""

    weight_transfer_engine: MirrorTransfer
    model_config: Any
    vllm_config: Any
    local_rank: int

    def stalewise_describe(self) -> dict[str, Any]:
        """Tell how vLLM was started, in what decides about log-probs."""
        names = ("logprobs_mode", "max_logprobs", "generation_config")
        lora = self.vllm_config.lora_config
        return {name: getattr(self.model_config, name) for name in names} | {
            "max_lora_rank": 0 if lora is None else lora.max_lora_rank,
            "version": __version__,
        }

    def stalewise_fetch(self, manifest: str) -> None:
        """Begin to fetch the version of a manifest, in the background."""
        self.weight_transfer_engine.fetch(Manifest.model_validate_json(manifest), leads=self.local_rank == 0)

    def stalewise_fetched(self) -> dict[str, Any]:
        """Tell how the last fetch goes."""
        return self.weight_transfer_engine.fetched()

    def stalewise_discard(self) -> None:
        """Forget the mirror."""
        self.weight_transfer_engine.discard()

    def stalewise_drop_adapter(self, directory: str) -> None:
        """Delete an adapter that no request uses."""
        self.weight_transfer_engine.drop_adapter(directory)


def tensor_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a checkpoint of this model must hold, tied ones once."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(hf_config)
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def check_shapes(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], version: PolicyVersion
) -> None:
    """Raise CorruptWeights unless a version holds the model's tensors: once vLLM is touched it cannot go back."""
    for name, shape in expected.items():
        if found.get(name) != shape:
            seen = f"has {name} with shape {found[name]}" if name in found else f"lacks {name}"
            raise CorruptWeights(
                f"version {version} {seen}, the model needs shape {shape}",
                hint="give the actor the model directory that the learner started from",
            )


def shared_parameters(model: Any) -> dict[str, str]:
    """Map the name of each parameter that is another layer's to the name under which that layer owns it."""
    owners: dict[int, str] = {}
    names = [(name, owners.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: owner for name, owner in names if name != owner}
