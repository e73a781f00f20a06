"""The engine on plain PyTorch: a Hugging Face causal LM on one CPU thread, batched, with a KV cache.

    who            waits for                      does
    generator      its turn, one decode step      one token for every unfinished row of the batch
    weight sync    the end of the running step    load: new weights; score: one forward pass

A batch notices new weights at its next step: it recomputes the KV of everything drawn so far under them and opens a
version span, so that each log-prob is the one of its span's version given the whole context.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from actor.adapters import base_weights, merged
from actor.decoding import PAD, Decoding
from actor.end_tokens import end_token_ids
from actor.engine import Completion, GenerationRequest
from actor.model_config import load_config, max_positions
from actor.sampling import draw, sampling_logprobs
from actor.turns import Turns
from buffer.errors import CorruptWeights, InvalidRequest
from buffer.types import PolicyVersion
from buffer.weights.manifest import Adapter

log = logging.getLogger(__name__)


class TorchEngine:
    """`actor.engine.Engine` on a model directory's config and tokenizer; its weights are read for adapters alone.

    `seed` must differ from actor to actor, or all of them draw the same responses. Weights are held in float32.
    With `ship_distributions` a completion brings the distribution of each token.
    """

    def __init__(self, model_dir: Path, *, seed: int, ship_distributions: bool = False) -> None:
        """Build the model. Raises InvalidSettings when the directory is none, or its tokenizer has no end token."""
        torch.set_num_threads(1)  # two threads in each of several processes are 10-40 times slower
        config = load_config(model_dir)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        self._end_ids = end_token_ids(model_dir)
        self._vocab_size: int = self._model.get_input_embeddings().num_embeddings
        self.max_tokens = max_positions(config)
        """See Engine."""
        self._weights = _weights_by_names(self._model)
        self._model_dir = model_dir
        self._base: dict[str, Tensor] | None = None  # of adapters, once there was one
        self._generator = torch.Generator().manual_seed(seed)
        self._ship_distributions = ship_distributions
        self._turns = Turns()
        self._abort = threading.Event()
        self._version: PolicyVersion = -1
        self._sampled_version: PolicyVersion = -1  # the newest one that a token was drawn under

    @property
    def version(self) -> PolicyVersion:
        """See Engine."""
        return self._version

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """See Engine. Raises InvalidRequest for prompts the model cannot hold, and before the first load."""
        if self._version < 0:
            raise InvalidRequest("the engine holds no weights yet", hint="load a published version first")
        if not requests:
            return []
        for request in requests:
            self._check(request)
        decoding = Decoding(
            requests,
            end_ids=self._end_ids,
            vocab_size=self._vocab_size,
            ship_distributions=self._ship_distributions,
        )
        self._abort.clear()
        while decoding.num_unfinished:
            with self._turns.take(), torch.inference_mode():
                self._step(decoding)
            if self._abort.is_set():
                decoding.abort()
        return decoding.completions()

    def abort(self) -> None:
        """See Engine."""
        self._abort.set()

    def load(self, weights: Path, version: PolicyVersion, *, adapter: Adapter | None = None) -> None:
        """See Engine. Raises CorruptWeights when the file is unreadable or does not hold exactly this model's tensors.

        The weights in use stay untouched then. An adapter is merged: it costs no time a token, and a copy of its base.
        """
        try:
            tensors = load_file(weights)
        except (SafetensorError, OSError) as error:
            raise CorruptWeights(f"version {version}: {weights} is not a readable safetensors file: {error}") from error
        if adapter is not None:
            if self._base is None:
                self._base = base_weights(self._model_dir)
            tensors = merged(self._base, tensors, adapter, version=version)
        pairs = self._matched(tensors, version)
        with self._turns.take(), torch.no_grad():
            for current, loaded in pairs:
                current.copy_(loaded)
            self._version = version

    def score(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """See Engine. Raises InvalidRequest for fewer than 2 tokens or more than the model holds."""
        if not 2 <= len(token_ids) <= self.max_tokens:
            raise InvalidRequest(f"a sequence to score has 2 to {self.max_tokens} tokens, not {len(token_ids)}")
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]  # [1, N]
        with self._turns.take(), torch.inference_mode():
            logprobs = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scores: npt.NDArray[np.float32] = logprobs.gather(1, ids[0, 1:, None]).squeeze(1).numpy()
        return scores

    def _check(self, request: GenerationRequest) -> None:
        prompt_ids, total = request.prompt_ids, len(request.prompt_ids) + request.max_new_tokens
        if not len(prompt_ids) or prompt_ids.min() < 0 or prompt_ids.max() >= self._vocab_size:
            raise InvalidRequest(f"a prompt needs at least one token, and ids from 0 to {self._vocab_size - 1}")
        if request.max_new_tokens < 1 or total > self.max_tokens:
            raise InvalidRequest(
                f"{len(prompt_ids)} prompt tokens and max_new_tokens={request.max_new_tokens} do not fit the"
                f" {self.max_tokens} positions of the model",
                hint="lower actor.max_new_tokens to at least 1 and at most the rest",
            )

    def _step(self, decoding: Decoding) -> None:
        """Draw one token for every row."""
        before = decoding.version
        if before != self._version:
            logits = self._prefill(decoding)
            decoding.open_span(self._version)
        else:
            logits = self._decode(decoding)
        logprobs = sampling_logprobs(logits, decoding.settings)
        ids, drawn = draw(logprobs, self._generator)
        decoding.append(ids, drawn, logprobs)
        if self._version > self._sampled_version:
            self._sampled_version = self._version
            when = "of a new batch" if before is None else "in mid-generation"
            log.info("first token under version %d, %s", self._version, when, extra={"version": self._version})

    def _prefill(self, decoding: Decoding) -> Tensor:
        """Fill a new cache with the whole context, siblings of one prompt once; return next-token logits [B, V]."""
        context, row_of = torch.unique(decoding.context, dim=0, return_inverse=True)  # [U, N], [B]
        mask = context != PAD
        cache = DynamicCache()
        logits = self._model(
            input_ids=context.clamp(min=0),
            attention_mask=None if mask.all() else mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_select_indices(row_of)
        decoding.cache = cache
        next_logits: Tensor = logits[row_of]
        return next_logits

    def _decode(self, decoding: Decoding) -> Tensor:
        """Feed the last token of every row; return next-token logits [B, V]."""
        next_logits: Tensor = self._model(
            input_ids=decoding.context[:, -1:],
            attention_mask=decoding.attention_mask,
            # a finished row that waits for compaction may run past the last position
            position_ids=decoding.last_positions.clamp(max=self.max_tokens - 1),
            past_key_values=decoding.cache,
            use_cache=True,
        ).logits[:, -1]
        return next_logits

    def _matched(self, tensors: dict[str, Tensor], version: PolicyVersion) -> list[tuple[Tensor, Tensor]]:
        """Pair the model's tensors with a file's, by name; every name once, tied weights under any of their names."""
        pairs, missing, unexpected = [], [], set(tensors)
        for names, current in self._weights.items():
            found = next((name for name in names if name in tensors), None)
            if found is None:
                missing.append(names[0])
                continue
            unexpected.discard(found)
            if tensors[found].shape != current.shape:
                raise CorruptWeights(
                    f"version {version} has {found} of shape {list(tensors[found].shape)}, the model needs"
                    f" {list(current.shape)}",
                    hint="publish from the model directory that the actors use",
                )
            pairs.append((current, tensors[found]))
        if missing or unexpected:
            raise CorruptWeights(
                f"version {version} does not hold exactly the model's tensors: missing {missing[:4]},"
                f" unexpected {sorted(unexpected)[:4]}",
                hint="publish from the model directory that the actors use, tied weights once",
            )
        return pairs


def _weights_by_names(model: torch.nn.Module) -> dict[tuple[str, ...], Tensor]:
    """Return every tensor of the model once, under all names that share it."""
    names: dict[int, list[str]] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    return {tuple(aliases): state[aliases[0]] for aliases in names.values()}
