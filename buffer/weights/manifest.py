"""The manifest: the commit of one published version."""

from typing import Annotated, Literal

from pydantic import Field

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
    """`keyframe`: all tensors, as a safetensors file."""
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=1)]


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
