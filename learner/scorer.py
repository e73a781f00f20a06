"""A causal LM as the learner runs it: packed sequences in, scores of trained tokens out.

Legend: S tokens of a micro-batch; n of them trained; b sequences; H hidden size.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from buffer.errors import InvalidSettings
from learner.attention import PACKED_ATTENTION
from learner.head import HeadShape, descent, scores
from learner.packing import Packed
from learner.scoring import Targets
from learner.settings import ComputeSettings
from learner.tokens import Column

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LARGEST_DIFFERENCE_NATS = 1e-2
"""Between our log-probs and transformers' own, in float32, of a model that we run rightly; a wrong one is off by 1."""


class Scorer(nn.Module):
    """The model's forward pass as one module, so that what wraps modules (sharding) sees all of it.

    Weights stay float32; with `compute.dtype` bfloat16 they are rounded for each product, gradients arrive in float32.
    """

    def __init__(self, model: PreTrainedModel, compute: ComputeSettings) -> None:
        super().__init__()
        self.model = model
        self._dtype = _DTYPES[compute.dtype]
        config = model.config.get_text_config()
        self._head_shape = HeadShape(
            scale=getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
            dtype=self._dtype,
            chunk_tokens=compute.logits_chunk_tokens,
        )

    def forward(
        self,
        packed: Packed,
        drawn: Targets,
        wanted: frozenset[Column],
        gradients: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the scores [n] by name; with known `gradients` [n] of scores, a `descent` [] with their gradient."""
        output = self.model.get_output_embeddings()
        hidden = self._hidden(packed)[drawn.positions]
        if gradients is None:
            return scores(hidden, output.weight, output.bias, drawn, wanted, self._head_shape)
        return {"descent": descent(hidden, output.weight, output.bias, drawn, gradients, self._head_shape)}

    def logits(self, token_ids: Tensor) -> Tensor:
        """Return transformers' own logits [1, S, V] of one sequence [1, S], in the weights' precision.

        By our own attention, whatever the settings choose: flash-attn refuses float32.
        """
        with _attention(self.model, PACKED_ATTENTION):
            logits: Tensor = self.model(input_ids=token_ids, use_cache=False).logits
        return logits

    def _hidden(self, packed: Packed) -> Tensor:
        """[S, H]: what predicts the token after each one."""
        device = self.model.device
        token_ids, bounds = packed.token_ids.to(device), packed.bounds.to(device)
        with torch.autocast(device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            inputs: dict[str, Tensor] = {"input_ids": token_ids}
            if self._dtype != torch.float32:  # else the residual stream would be float32, twice the memory
                inputs = {"inputs_embeds": self.model.get_input_embeddings()(token_ids).to(self._dtype)}
            output = self.model.base_model(
                **inputs,
                position_ids=packed.position_ids.to(device),
                use_cache=False,
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=packed.longest,
                max_length_k=packed.longest,
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


def attention_name(compute: ComputeSettings) -> str:
    """Return what transformers calls the attention of these settings. Raises InvalidSettings."""
    if compute.attention == "sdpa":
        return PACKED_ATTENTION
    if importlib.util.find_spec("flash_attn") is None:
        raise InvalidSettings(
            "learner.compute.attention='flash_attention_2' but flash-attn is not installed",
            hint="pip install flash-attn, or leave the setting out: on a GPU, sdpa runs PyTorch's own flash kernel",
        )
    if compute.dtype == "float32":
        raise InvalidSettings(
            "flash_attention_2 computes in 16 bits, learner.compute.dtype is 'float32'",
            hint="set learner.compute.dtype to 'bfloat16'",
        )
    return compute.attention


def prepare_layers(model: PreTrainedModel, compute: ComputeSettings) -> None:
    """Make each layer of the model drop its activations, or compile it, as the settings say. Raises InvalidSettings."""
    layers = _layers(model)
    if not layers and (compute.activation_checkpointing or compute.compile):
        raise InvalidSettings(
            f"{type(model).__name__} names no layers, which activation_checkpointing and compile work on",
            hint="leave learner.compute.activation_checkpointing and learner.compute.compile out",
        )
    if compute.activation_checkpointing:
        for layer in layers:  # transformers' own switch works in training mode alone
            layer.forward = partial(_recomputed, layer.forward)
    if compute.compile:
        compile_layers(model)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer in place, for sequences of any length."""
    for layer in _layers(model):
        layer.compile(dynamic=True)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@torch.no_grad()
def check_scores(model: PreTrainedModel) -> None:
    """Raise InvalidSettings unless two packed sequences score as they do alone through transformers' own forward.

    They are run in float32 by our own attention, whatever the settings choose afterwards.
    """
    config = model.config.get_text_config()
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):  # two short sequences would not show it
        raise InvalidSettings(
            f"{type(model).__name__} cannot be trained: its attention looks at chunks of "
            f"{config.attention_chunk_size} tokens, which packed attention does not know",
            hint="train a model of full or sliding-window attention",
        )
    vocab_size = int(model.get_input_embeddings().num_embeddings)
    token_ids = torch.arange(1, 13) * 7919 % vocab_size
    lengths = [7, 5]
    ours = Scorer(model, ComputeSettings())(
        Packed(
            token_ids=token_ids[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            bounds=torch.tensor([0, 7, 12], dtype=torch.int32),
            longest=7,
        ),
        _all_but_first(token_ids, lengths, model.device),
        frozenset(),
    )["logprobs"]
    with _attention(model, "eager"):
        theirs = [
            model(input_ids=sequence[None].to(model.device), use_cache=False)
            .logits[0, :-1]
            .float()
            .log_softmax(-1)
            .gather(-1, sequence[1:, None].to(model.device))[:, 0]
            for sequence in torch.split(token_ids, lengths)
        ]
    apart = float((ours - torch.cat(theirs)).abs().max())
    if not apart < _LARGEST_DIFFERENCE_NATS:
        raise InvalidSettings(
            f"{type(model).__name__} cannot be trained: packed, its log-probs differ by {apart:.3g} nats from what "
            "transformers computes of the same sequences alone",
            hint="its attention looks across sequences, or its logits are made in a way that the learner does not know",
        )


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model attend by the implementation of that name, which its own one is changed back to."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _all_but_first(token_ids: Tensor, lengths: list[int], device: torch.device) -> Targets:
    positions = torch.cat(
        [torch.arange(length - 1) + start for start, length in zip((0, lengths[0]), lengths, strict=True)]
    )
    return Targets(
        token_ids=token_ids[positions + 1].to(device),
        positions=positions.to(device),
        temperature=None,
        truncated=None,
        kept=None,
        shipped=None,
    )


def _recomputed(forward: object, *args: object, **kwargs: object) -> object:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)  # type: ignore[arg-type]
