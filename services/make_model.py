"""Makes the tiny model of the demo: a config, a tokenizer of single characters, and weights warmed up on a teacher.

The teacher adds digits up, slips now and then, and goes on from the wrong total. A model that imitates it knows the
algorithm and its slips: right in about one answer of five, and reinforcement learning has something to remove.
"""

import logging
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2Tokenizer

from actor.evaluate import held_out_accuracy
from actor.settings import ActorSettings
from actor.tasks import Prompt, RunningSums
from actor.torch_engine import TorchEngine
from buffer.errors import InvalidSettings
from learner.optimizer import learning_rate
from learner.settings import OptimizerSettings

CHARACTERS = "0123456789=+-*/()., ab"
"""What the tokenizer can say. Digits and `=` are the running sums'; the rest fills the vocabulary up to 24."""

WARMUP_STEPS = 425
"""Supervised steps. The model imitates the teacher from step 200 on; the rest polishes the imitation."""

BATCH_SIZE = 128
"""Answers of the teacher in one step."""

SLIP_PROBABILITY = 0.1
"""Of the teacher's total, a digit: 0.9^16, so about 0.19 of its answers are right."""

OPTIMIZER = OptimizerSettings(lr=3e-3, schedule="linear", warmup_updates=20)
"""Of the warm-up. 1e-2 learns no faster: docs/demo-recipe.md."""

_log = logging.getLogger(__name__)


class TaughtTask(Protocol):
    """A task with a teacher to imitate. Its prompts all have one length, and so have its answers."""

    def sample(self, rng: np.random.Generator) -> Prompt:
        """See actor.tasks.Task."""
        ...

    def noisy_answer(
        self, prompt: Prompt, rng: np.random.Generator, *, slip_probability: float
    ) -> npt.NDArray[np.int32]:
        """Return the tokens of the teacher's answer; it slips with `slip_probability` a step."""
        ...


def make_model(
    out_dir: Path, *, seed: int, warmup_steps: int = WARMUP_STEPS, hidden_size: int = 64, num_layers: int = 2
) -> float:
    """Write a model directory that `from_pretrained` loads; return its accuracy on the held-out prompts.

    The accuracy is exact match at temperature 1. Same seed, same machine, same weights. Takes about 0.1 s a step
    at the default size.
    Raises InvalidSettings when out_dir already holds a model.
    """
    if (out_dir / "config.json").exists():
        raise InvalidSettings(f"{out_dir} already holds a model", hint="give a new directory, or delete this one")
    if warmup_steps < OPTIMIZER.warmup_updates:
        raise InvalidSettings(f"warm-up steps must be at least {OPTIMIZER.warmup_updates}, not {warmup_steps}")
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    task = RunningSums(tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        make_config(tokenizer, hidden_size=hidden_size, num_layers=num_layers), dtype=torch.float32
    )
    warm_up(model, task, steps=warmup_steps, rng=np.random.default_rng(seed))
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    engine = TorchEngine(out_dir, seed=seed)
    engine.load(out_dir / "model.safetensors", 0)
    accuracy = held_out_accuracy(engine, task, ActorSettings())
    _log.info("%s: %.3f of the held-out answers are right", out_dir, accuracy)
    return accuracy


def make_config(tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 64, num_layers: int = 2) -> Qwen2Config:
    """Return the shape of the model: by default 108,736 parameters, 0.44 MB in float32."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        initializer_range=0.08,  # from the usual 0.02 a model this narrow is no good copy after 425 steps
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters: <pad>, <eos>, then CHARACTERS; other characters vanish.

    It is a Qwen2Tokenizer without merges, because AutoTokenizer reads the files of a Qwen2 model with that class
    whatever class wrote them, and another pre-tokenizer would lose its spaces that way.
    """
    byte_level = ByteLevel(add_prefix_space=False)  # how the class writes characters: a space is U+0120
    characters = [byte_level.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")


def warm_up(
    model: PreTrainedModel,
    task: TaughtTask,
    *,
    steps: int,
    rng: np.random.Generator,
    slip_probability: float = SLIP_PROBABILITY,
) -> None:
    """Train the model in place to imitate the noisy teacher."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay)
    for step in range(steps):
        rate = learning_rate(OPTIMIZER, updates_done=step, total_updates=steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        prompts, answers = _teacher_batch(task, rng, slip_probability)
        sequences = torch.cat([prompts, answers], dim=1)  # [B, P + T]
        logits = model(input_ids=sequences[:, :-1], use_cache=False).logits[:, -answers.shape[1] :]  # [B, T, V]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.grad_clip_norm)
        optimizer.step()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            _log.info("warm-up step %d of %d: loss %.3f nats a token", step + 1, steps, loss.item())


def _teacher_batch(task: TaughtTask, rng: np.random.Generator, slip_probability: float) -> tuple[Tensor, Tensor]:
    """Return prompts [B, P] and the teacher's answers [B, T], both int64."""
    prompts = [task.sample(rng) for _ in range(BATCH_SIZE)]
    answers = [task.noisy_answer(prompt, rng, slip_probability=slip_probability) for prompt in prompts]
    prompt_ids = np.stack([prompt.token_ids for prompt in prompts])
    return torch.from_numpy(prompt_ids).long(), torch.from_numpy(np.stack(answers)).long()
