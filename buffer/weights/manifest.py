"""The manifest: the commit of one published version."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, JsonValue

from buffer.arrays import Float32Array, Int32Array
from buffer.types import Identifier, PolicyVersion, Record

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Probe(Record):
    """The canary: a fixed token sequence and the log-probs that the published weights give it."""

    token_ids: Int32Array
    """[N] int32: scored as one sequence; the first token has no log-prob."""
    logprobs: Float32Array
    """[N - 1] float32, nats, temperature 1, computed by the learner from the rounded weights it published."""
    tolerance: Annotated[float, Field(gt=0)]
    """Largest absolute difference, in nats, that an engine may show."""


class Payload(Record):
    """One downloadable file of a version."""

    kind: Literal["keyframe"]
    """`keyframe`: all tensors that are published, as a safetensors file; of an adapter version those of the adapter."""
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=1)]


class Adapter(Record):
    """What the tensors of an adapter version mean: LoRA on top of the weights in the run's model directory.

    They bear peft's names, `base_model.model.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]; a
    module's weight becomes W + alpha / rank * B A.
    """

    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[FiniteFloat, Field(gt=0)]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Last parts of the names of the adapted linear modules, such as q_proj."""

    def peft_config(self) -> dict[str, JsonValue]:
        """Return the content of the adapter_config.json that peft and vLLM read beside adapter_model.safetensors."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.target_modules),
            "lora_dropout": 0.0,
            "bias": "none",
        }


class Manifest(Record):
    """Everything an actor needs to load a version and to prove that it did."""

    run_id: Identifier
    version: Annotated[PolicyVersion, Field(ge=0, lt=1 << 53)]
    created_s: float
    """Unix time at publication, seconds."""
    model_fingerprint: Sha256
    """sha256 over the model's config and tokenizer files (buffer.fingerprint)."""
    payloads: Annotated[tuple[Payload, ...], Field(min_length=1, strict=False)]
    probe: Probe
    adapter: Adapter | None = None
    """Set when the version is an adapter: its payload is a keyframe of the adapter's tensors. None = whole weights."""
