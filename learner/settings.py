"""The learner's knobs. Imports no torch, so that a recipe can be read and checked anywhere."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from buffer.selectors import Fifo, Fresh, Selector, Uniform
from buffer.settings import Settings


class OptimizerSettings(Settings):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate; 1e-6 is usual for RL on models from 0.5 B parameters, tiny models want 1e-4 to 1e-3."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW's decay rates a step. 0.99, not 0.999: the gradient of RL changes fast."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay a step, times lr. 0: RL starts from a good model, and decay moves ReVal's value (its logits)."""
    grad_clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm over all parameters; longer gradients are scaled down to it. At or below the usual
    `gradient/norm` it steadies high rates; the default seldom binds on a loss that is a mean over tokens."""
    spike_factor: Annotated[float, Field(gt=1)] | None = 30.0
    """An update is skipped when its gradient norm is this many times the median of the last 64. 30: clipping copes with
    less, and a sound batch does not give more. None = never."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How lr goes on after the warm-up; linear and cosine reach 0 after `total_updates`."""
    warmup_updates: Annotated[int, Field(ge=0)] = 20
    """Updates over which lr rises linearly to its peak; 20 lets AdamW's second moment settle."""


class ObjectiveSettings(Settings):
    """Which recipe, by name, with what options."""

    name: str = "stalewise"
    """A recipe of learner/objectives/recipes.py (`stalewise objectives` lists them). stalewise is made for old data."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """The recipe's own options; an unknown one is an error at start. {} = the recipe's defaults."""


class ComputeSettings(Settings):
    """How the model is run: numbers, kernels and memory. None of it changes what is learnt but for rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of matrix products and activations. Weights, gradients and optimiser stay float32. bfloat16 is
    right on a GPU, where it is several times faster; CPUs without fast bfloat16 are slower with it."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """sdpa: PyTorch's own kernels, on a GPU in bfloat16 its variable-length flash attention. flash_attention_2: the
    flash-attn package, for models whose heads those kernels do not take."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and run it again in the backward pass: a third more work for activations that
    take the memory of one layer in place of all."""
    compile: bool = False
    """torch.compile each layer: the first steps take minutes, the others less time on a GPU."""
    logits_chunk_tokens: Annotated[int, Field(ge=1)] = 256
    """Tokens whose logits over the vocabulary exist at once. 256 is the knee on a CPU; a GPU wants 1024 to 4096."""


class LoraSettings(Settings):
    """A low-rank adapter on a frozen model (peft)."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of each update; RL moves weights little, and 8 to 32 are usual."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter counts alpha / rank times; twice the rank is usual."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Last parts of the names of the linear modules that get one: all of a Qwen, Llama, Mistral or Gemma layer."""


class LearnerSettings(Settings):
    """Everything the learner process can be told."""

    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW and its schedule."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """What is optimised."""
    compute: ComputeSettings = ComputeSettings()
    """How the model is run."""
    lora: LoraSettings | None = None
    """Train, save and publish an adapter in place of the weights; needs the extra `lora`. null = all weights. The
    learning rate wants to be about 10 times that of whole weights."""
    groups_per_update: Annotated[int, Field(ge=1)] = 16
    """Groups in one batch, hence in one optimiser step."""
    total_updates: Annotated[int, Field(ge=1)] = 1_000
    """Updates after which the learner is done; also the end of the learning-rate schedule."""
    selector: Selector = Fifo()
    """How a batch is chosen. Fifo trains on every group in the order of arrival."""
    replay_updates: Annotated[int, Field(ge=0)] = 0
    """Updates on replayed data after each one by `selector`: ReVal's K - 1. 0 = every batch comes by `selector`."""
    replay_selector: Selector = Uniform()
    """How those batches are chosen."""
    prefetch_batches: Annotated[int, Field(ge=0)] = 1
    """Batches drawn ahead while a step runs; each ages the data by one update. 0 = draw when the step is done."""
    sample_timeout_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds that the service may hold one request for a batch; short, because a shutdown waits for it."""
    stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a batch after which the learner warns, and again after each further such time."""
    publish_every: Annotated[int, Field(ge=1)] = 1
    """Updates between published versions. 1 keeps the actors as fresh as the buffer allows."""
    publish_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the published weights; bfloat16 halves the transfer, and actors then run rounded weights."""
    keyframe_every: Annotated[int, Field(ge=1)] = 20
    """Published versions from one keyframe to the next, or fewer once the deltas between are as large as it is: what a
    newcomer fetches, the keyframe and the deltas since, is never more than two models."""
    probe_tolerance_nats: Annotated[float, Field(gt=0)] = 0.05
    """Largest difference on the canary that an engine may show. Engines in float32 differ by less than 1e-3;
    one that computes in bfloat16 wants 0.5. Wrong weights differ by several nats."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Updates between checkpoints, hence the work that a crash can lose."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that are kept; 2 leave one if a disk spoils the other."""
    early_stop_evaluations: Annotated[int, Field(ge=1)] | None = None
    """Evaluations in a row without a new best pass@1 after which the run ends. null = it goes on to total_updates."""
    keep_best: bool = False
    """Keep the weights of the version with the best pass@1 as a model directory, `learner/best` of the run's: one model
    on disk more, fetched from the weight store at each new best. Off: they stay in the store, which pins them."""
    keep_final: bool = True
    """Keep the last version as a model directory, `learner/final` of the run's, once total_updates are done: one model
    on disk more, fetched from the weight store."""
    reference_reset_every: Annotated[int, Field(ge=1)] | None = None
    """Updates after which the reference becomes the current policy, again and again; ReVal uses 200. None = never."""
    reference_cache_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """Bytes of cached reference log-probs; 256 MiB hold 60 million tokens. Replayed groups then need no second
    forward pass."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 16_384
    """Prompt and response tokens in one forward pass, packed without padding; the loss is exact for any value. Bounds
    memory. A longer sequence is run alone."""
    sampler_correction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Exponent of the importance weights 1 / (N p) by which the groups of a weighted selector count. 1: the gradient is
    that of uniform draws, only less noisy where the weights are well chosen; 0: groups count as often as they are
    drawn, a curriculum. Other selectors know no weights."""
    max_skipped_updates: Annotated[int, Field(ge=1)] = 10
    """Updates in a row that may be skipped for numbers that are not finite or a gradient spike before the run stops."""
    max_closed_updates: Annotated[int, Field(ge=1)] = 10
    """Updates in a row in which a gate closes every token before the run stops: it learns nothing any more."""
    device: str = "cpu"
    """The torch device of model and optimiser."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of torch. 1: processes that share cores with several threads each slow down tenfold and more."""
    report_tokens: Annotated[int, Field(ge=0)] = 65_536
    """Response tokens of trained groups that go to the service with one update, for the dashboard: about 13 bytes
    each. Groups beyond are left out of its ring; 0 = none are sent."""
    wandb_project: str | None = None
    """Weights & Biases project that gets the metrics too. None = JSONL and TensorBoard files only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optimizer.warmup_updates > self.total_updates:
            raise ValueError(
                f"optimizer.warmup_updates={self.optimizer.warmup_updates} exceeds total_updates={self.total_updates}: "
                "the learning rate would never reach its peak"
            )
        if self.lora is not None and self.reference_reset_every is not None:
            raise ValueError(
                f"reference_reset_every={self.reference_reset_every} with lora: the reference of an adapter is the "
                "model without it, which cannot be reset"
            )
        if self.replay_updates and self.replay_selector == Fresh():
            raise ValueError(
                "replay_selector is `fresh`: replayed groups were handed out before; use uniform, fifo or mix"
            )
        return self
