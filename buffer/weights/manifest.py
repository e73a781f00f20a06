"""The manifest: the commit of one published version, with the ways to reach it."""

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, JsonValue, model_validator

from buffer.arrays import Float32Array, Int32Array
from buffer.types import Identifier, PolicyVersion, Record

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PublishedVersion = Annotated[PolicyVersion, Field(ge=0, lt=1 << 53)]


class Probe(Record):
    """The canary: a fixed token sequence and the log-probs that the published weights give it."""

    token_ids: Int32Array
    """[N] int32: scored as one sequence; the first token has no log-prob."""
    logprobs: Float32Array
    """[N - 1] float32, nats, temperature 1, computed by the learner from the rounded weights it published."""
    tolerance: Annotated[float, Field(gt=0)]
    """Largest absolute difference, in nats, that an engine may show."""


class Payload(Record):
    """One downloadable file. A step whose tensors were published by several ranks consists of several files."""

    kind: Literal["keyframe", "delta"]
    """`keyframe`: all tensors that are published, of an adapter version those of the adapter, as a safetensors file.
    `delta`: the changed values (buffer.weights.delta)."""
    version: PublishedVersion
    """The version that it leads to."""
    base_version: PublishedVersion | None = None
    """The version that a delta must be applied to; null for a keyframe."""
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "delta") != (self.base_version is not None):
            raise ValueError(f"a {self.kind} has base_version={self.base_version}")
        if self.base_version is not None and self.base_version >= self.version:
            raise ValueError(f"a delta leads from version {self.base_version} to {self.version}")
        return self


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
    """Everything an actor needs to load a version, from wherever it is, and to prove that it did."""

    run_id: Identifier
    version: PublishedVersion
    created_s: float
    """Unix time at which the learner had these weights, seconds."""
    model_fingerprint: Sha256
    """sha256 over the model's config and tokenizer files (buffer.fingerprint)."""
    checksum: Sha256
    """sha256 over names, dtypes, shapes and hashes of the tensors, whichever way they come (buffer.weights.tensors)."""
    payloads: Annotated[tuple[Payload, ...], Field(min_length=1, max_length=1 << 16, strict=False)]
    """Every step of the ways that lead here: a keyframe, the deltas since it, and earlier deltas that are worth it."""
    probe: Probe
    adapter: Adapter | None = None
    """Set when the version is an adapter: its payloads hold the adapter's tensors. None = whole weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        reached = {payload.version for payload in self.payloads if payload.kind == "keyframe"}
        for payload in sorted(self.payloads, key=lambda payload: payload.version):
            if payload.version > self.version:
                raise ValueError(f"version {self.version} is not reached over version {payload.version}")
            if payload.base_version in reached:
                reached.add(payload.version)
        if self.version not in reached:
            raise ValueError(f"no payloads lead from a keyframe to version {self.version}")
        return self
