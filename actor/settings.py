"""The actor's section of settings; imports neither torch nor an engine."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from buffer.settings import Settings
from buffer.types import SamplingSettings

EngineName = Literal["torch", "vllm"]


class TaskSettings(Settings):
    """Where prompts and rewards come from."""

    name: str = "running_sums"
    """`running_sums`, any task of the reasoning-gym package by its name, such as `countdown`, or one of yours as
    `module:class`: installed, or a file in the working directory of the actor. The module's code is run."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the task, such as {num_digits = 16} or a reasoning-gym configuration."""
    chat_template: bool = False
    """Whether a question goes to the model as a user's turn of the tokenizer's chat template, which instruct models are
    trained on; false = as it is. For tasks of reasoning-gym: the other ones write their prompts themselves."""
    system_text: str | None = None
    """Text of the system turn before the question; null = what the template does without one. With `chat_template`."""
    max_unscored_groups: Annotated[int, Field(ge=1)] = 32
    """Groups in a row whose reward cannot be had, since it raises or is no finite number, after which the actor ends;
    fewer are dropped and counted. The default is two batches."""


class VllmSettings(Settings):
    """How vLLM runs. Its own defaults, but for what is named here."""

    url: str | None = None
    """Address of a server that `stalewise serve-vllm` started, such as http://127.0.0.1:8100; null = vLLM runs in the
    actor's own process. The actor then uses `start_timeout_s`, `request_timeout_s` and `lora_rank` of this section; the
    rest says how the server is started."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait for the server at `url`: large models take minutes to come up."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds that the server at `url` may take for one response, waiting for its turn included."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the weights in use; `auto` is the one in the model's config, which the learner publishes in."""
    max_model_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt plus response, in tokens; null = the model's own limit. Less leaves more room for KV."""
    max_sequences: Annotated[int, Field(ge=1)] = 256
    """Sequences decoded side by side; further requests wait inside vLLM."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that vLLM takes for weights and KV; without effect on a CPU."""
    cpu_kv_gib: Annotated[int, Field(ge=1)] = 1
    """KV cache of the CPU build, in GiB; enough for tiny models."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """GPUs that one copy of the model is split over."""
    lora_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Largest rank of the adapters that the learner publishes, on top of the weights in the model directory; 0 = it
    publishes whole weights."""
    lora_slots: Annotated[int, Field(ge=1)] = 4
    """Adapters in use at once: responses end under the version that they began with, later ones wait for a slot. With
    several batches in flight more versions are in use, if they come faster than responses end."""
    compile: bool = False
    """Whether vLLM compiles the model at start: faster tokens on a GPU for a minute or more of start-up."""


class EvaluationSettings(Settings):
    """How the policy is measured on held-out prompts, apart from training."""

    every_updates: Annotated[int, Field(ge=1)] | None = None
    """One version of each so many is evaluated, by one actor; the same for all actors of a run. null = none: an actor
    that evaluates does not generate."""
    num_prompts: Annotated[int, Field(ge=1)] = 64
    """Held-out prompts, always the first ones of the task's list; fewer when it has fewer, and without those that
    leave no room for `max_new_tokens`."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 8
    """Responses per prompt. pass@k is estimated for 1, 2, 4 ... up to this number."""
    sampling: SamplingSettings = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    """How tokens are drawn; the default is the policy itself. Stays the same when training is sampled differently."""
    lease_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Seconds that an evaluation may take; later another actor may begin one, and this one's result is refused."""


class ActorSettings(Settings):
    """What one actor generates, and how long it bears with an absent service."""

    engine: EngineName = "torch"
    """`torch` samples on one CPU thread; `vllm` needs vLLM in the actor's environment (docs/vllm.md)."""
    vllm: VllmSettings = VllmSettings()
    """How vLLM runs; unused by the torch engine."""
    task: TaskSettings = TaskSettings()
    """Where prompts and rewards come from."""
    sampling: SamplingSettings = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    """How tokens are drawn. Temperature 1 without truncation: the policy itself, and no kept ids to ship."""
    ship_distributions: bool = False
    """Whether each token brings the whole distribution it was drawn from, 4 bytes times the vocabulary: exact trust
    regions for tiny vocabularies. Torch engine only."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Responses per prompt; the baseline of group advantages needs at least 2."""
    groups_per_batch: Annotated[int, Field(ge=1)] = 16
    """Groups generated side by side; 128 sequences keep one core busy with a tiny model."""
    batches_in_flight: Annotated[int, Field(ge=1, le=64)] = 1
    """Batches drawn at once by one engine, vLLM alone: each is scored and submitted as soon as its longest answer has
    ended, while the engine goes on with the others. 1 = the engine waits for that answer and for the rewards; many
    batches of one group keep it full (docs/vllm.md)."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens per response at most, end token included."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """How the policy is measured on held-out prompts."""
    spool_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """Disk for groups finished while the service is away; generation pauses when it is full. 0 = no spool."""
    poll_s: Annotated[float, Field(gt=0)] = 20.0
    """Length of one long poll for new weights, in seconds; below the usual proxy timeout of 30 s."""
    retry_s: Annotated[float, Field(gt=0)] = 0.5
    """First pause after a refusal or a lost connection, in seconds; doubled up to 16 times this, with jitter."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between heartbeats; the dashboard's resolution."""
    stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds of waiting after which the log warns, and again each time as long."""
