"""The learner's packing and log-probs against the plain ways, and the whole step on a GPU where there is one.

  packing    processed tokens of padded batches of 8 against packed micro-batches, at the lengths of real rollouts:
             log-normal, mean 1 k, cap 8 k. Counted, not timed.
  step       CPU time of forward and backward of a 50 M-parameter model, and the peak of its memory above model, batch
             and gradients, packed against padded batches of 8, at the same lengths divided by 16: the real ones take a
             CPU hours. Each in a process of its own.
  logprobs   one fused head of the same model, forward and backward: full logits, ours by chunks, TRL's by chunks of the
             vocabulary if `pip install trl==1.16.0` was done. Each in a process of its own: CPU time of one thread
             after a small warm-up, and the peak of its memory above the inputs.
  gpu        whole updates by `stalewise` of Qwen2.5-0.5B- and 1.5B-shaped random models in bfloat16, in 8 micro-batches
             of 4 k and 16 k tokens: tokens/s, model FLOPs utilisation against the card's measured matrix rate, time
             of each part, peak memory. Says so and ends where there is no CUDA.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.learner packing | step | logprobs [--vocab 32768] [--tokens 2048] | gpu
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from buffer.types import FinishReason, Group, Sample, SampleInfo, SamplingSettings, Split, Trajectory, VersionSpan
from learner.attention import PACKED_ATTENTION
from learner.collate import Batch, collate
from learner.head import HeadShape, scores
from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import build_objective
from learner.packing import pack
from learner.policy import Policy
from learner.scoring import LOGPROBS, Targets
from learner.settings import ComputeSettings, LearnerSettings
from learner.step import Trainer

HIDDEN = 512
MICRO_BATCHES, UPDATES = 8, 3
"""Of an update, and how many are timed on a GPU."""
QWEN: dict[str, dict[str, int]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
PLAIN = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)


def rollout_lengths(number: int, *, divisor: int = 1) -> list[int]:
    """Log-normal with mean 1 k and cap 8 k tokens (sigma 1), divided."""
    drawn = np.random.default_rng(0).lognormal(np.log(1024) - 0.5, 1.0, number)
    return [max(4, int(length) // divisor) for length in drawn.clip(64, 8192)]


def padded_tokens(lengths: list[int], rows: int) -> int:
    """Tokens that batches of `rows`, in the order of arrival, are padded to."""
    return sum(rows * max(lengths[start : start + rows]) for start in range(0, len(lengths), rows))


def packing() -> None:
    lengths = rollout_lengths(4096)
    real = sum(lengths)
    print(f"{len(lengths)} sequences, {real} tokens, longest {max(lengths)}")
    for rows in (8, 32):
        print(f"padded batches of {rows}: {padded_tokens(lengths, rows) / real:.2f} x")
    for capacity in (16_384, 32_768):
        bins = [pack(lengths[start : start + 256], capacity) for start in range(0, len(lengths), 256)]
        room = capacity * sum(len(of_window) for of_window in bins)
        print(
            f"packed, windows of 256, budget {capacity}: 1.00 x processed, {1 - real / room:.1%} of the budget unused, "
            f"{padded_tokens(lengths, 8) / real:.2f} x fewer tokens than padded batches of 8"
        )


def make_batch(lengths: list[int], vocab_size: int) -> Batch:
    """Groups of 8: the first eighth of each sequence is its prompt."""
    random = np.random.default_rng(1)
    samples = []
    for start in range(0, len(lengths), 8):
        trajectories = []
        for index, length in enumerate(lengths[start : start + 8]):
            prompt = max(1, length // 8)
            trajectories.append(
                Trajectory(
                    trajectory_id=f"t{index}",
                    prompt_ids=random.integers(0, vocab_size, prompt, dtype=np.int32),
                    response_ids=random.integers(0, vocab_size, length - prompt, dtype=np.int32),
                    response_mask=np.ones(length - prompt, np.bool_),
                    behavior_logprobs=np.full(length - prompt, -1.0, np.float32),
                    spans=(VersionSpan(start=0, end=length - prompt, version=0),),
                    sampling=PLAIN,
                    reward=float(index % 2),
                    finish_reason=FinishReason.STOP,
                )
            )
        name = f"g{start}"
        group = Group(run_id="r", group_id=name, prompt_id=name, split=Split.TRAIN, trajectories=tuple(trajectories))
        samples.append(
            Sample(group=group, info=SampleInfo(probability=1.0, num_candidates=1, times_sampled=1, age_updates=0))
        )
    return collate(samples, clock=0)


def make_model(vocab_size: int, **shape: int) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True, **shape
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=PACKED_ATTENTION
    )
    return model


def run_packed(policy: Policy, batch: Batch) -> None:
    """Forward and backward of sum(log pi), as an update does them."""
    forward = policy.forward(batch, frozenset())
    policy.backward(batch, forward, -forward.scores.logprobs.sum())


def run_padded(model: PreTrainedModel, batch: Batch, rows: int) -> None:
    """The same gradient by padded batches, each forward and backward once, with full logits."""
    for start in range(0, len(batch.keys), rows):
        width = int(batch.sequence_lengths[start : start + rows].max())
        ids = batch.token_ids[start : start + rows, :width]
        logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        position = torch.arange(1, width)
        trained = (position >= batch.prompt_lengths[start : start + rows, None]) & (
            position < batch.sequence_lengths[start : start + rows, None]
        )
        (-chosen[trained].sum()).backward()  # type: ignore[no-untyped-call]


STEPS: dict[str, Callable[[PreTrainedModel, Batch, int], None]] = {
    "padded batches of 8": lambda model, batch, _: run_padded(model, batch, 8),
    "packed, one micro-batch": lambda model, batch, tokens: run_packed(policy_of(model, tokens), batch),
    "packed, micro-batches of 2048": lambda model, batch, _: run_packed(policy_of(model, 2_048), batch),
}


def policy_of(model: PreTrainedModel, micro_batch_tokens: int) -> Policy:
    return Policy(model, micro_batch_tokens=micro_batch_tokens, compute=ComputeSettings())


def step() -> None:
    for name in STEPS:
        arguments = ["-m", "benchmarks.learner", "one-step", "--way", name]
        subprocess.run([sys.executable, *arguments], check=True)


def one_step(name: str) -> None:
    """Measure in this process: prints CPU seconds and the peak above model and batch."""
    model = make_model(
        32_768, hidden_size=HIDDEN, intermediate_size=1_408, num_hidden_layers=12, num_attention_heads=8
    ).eval()
    lengths = rollout_lengths(64, divisor=16)
    batch = make_batch(lengths, 32_768)
    STEPS[name](model, make_batch(lengths[:1] * 8, 32_768), sum(lengths))  # small: the gradients are there
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began_s = time.process_time()
    STEPS[name](model, batch, sum(lengths))
    spent_s = time.process_time() - began_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mib
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {sum(lengths)} tokens, {name}: "
        f"{spent_s:.1f} s of CPU, {sum(lengths) / spent_s:.0f} tokens/s, peak {peak_mib:.0f} MiB",
        flush=True,
    )


def naive(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probs by full logits."""
    return (hidden @ weight.T).log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]


def chunked(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    positions = torch.arange(len(token_ids))
    drawn = Targets(token_ids=token_ids, positions=positions, temperature=None, truncated=None, kept=None, shipped=None)
    return scores(hidden, weight, None, drawn, frozenset(), HeadShape())[LOGPROBS]


def streamed(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """TRL's; imported here because it is a package of its own."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, token_ids, 1.0, 8192, None, 1.0, ())[0]


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "naive": naive,
    "chunked": chunked,
    "streamed": streamed,
}


def one_way(name: str, vocab: int, tokens: int) -> None:
    """Measure in this process: prints CPU seconds, peak MiB and the sum of the log-probs."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN).requires_grad_()
    weight = torch.randn(vocab, HIDDEN).mul_(0.05).requires_grad_()  # no copy: the peak would hide behind it
    ids = torch.randint(vocab, (tokens,))
    advantage = torch.randn(tokens)
    small = [tensor[:64].detach().clone().requires_grad_() for tensor in (hidden, weight)]  # the peak is that of below
    WAYS[name](*small, ids[:64] % 64).sum().backward()  # type: ignore[no-untyped-call]
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began_s = time.process_time()
    logprobs = WAYS[name](hidden, weight, ids)
    (logprobs * advantage).sum().backward()  # type: ignore[no-untyped-call]
    spent_s = time.process_time() - began_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mib
    assert weight.grad is not None
    print(f"{name} {spent_s:.2f} {peak_mib:.0f} {float(logprobs.detach().sum()):.3f} {float(weight.grad.norm()):.5g}")


def logprobs(vocab: int, tokens: int) -> None:
    print(f"float32, hidden {HIDDEN}, vocabulary {vocab}, {tokens} tokens: CPU s, peak MiB, sum of log-probs, |dW|")
    for name in WAYS:
        arguments = ["-m", "benchmarks.learner", "one", "--way", name, "--vocab", str(vocab), "--tokens", str(tokens)]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        print(done.stdout.strip() or f"{name}: {done.stderr.strip().splitlines()[-1]}", flush=True)


def gpu() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU part is skipped")
        return
    print(torch.cuda.get_device_name())
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matrix_s = _seconds(lambda: left @ left, 20)
    rate = 2 * 8192**3 / matrix_s
    print(f"bfloat16 matrix products: {rate / 1e12:.0f} TFLOP/s")
    for name, shape in QWEN.items():
        for tokens in (4_096, 16_384):
            torch.cuda.reset_peak_memory_stats()
            model = make_model(151_936, **shape).cuda()
            sentence = updates(model, tokens, matrix_flops=rate, synchronize=torch.cuda.synchronize)
            print(f"{name}: {sentence}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
            del model


def updates(
    model: PreTrainedModel, micro_batch_tokens: int, *, matrix_flops: float, synchronize: Callable[[], None]
) -> str:
    """Say how fast whole updates in bfloat16 are, sequences of an eighth of a micro-batch.

    The FLOPs of a model are 6 a parameter and token and those of attention; what is run again is not counted.
    """

    def now() -> float:
        synchronize()
        return time.perf_counter()

    compute = ComputeSettings(dtype="bfloat16", logits_chunk_tokens=2_048)
    trainer = Trainer(
        policy=Policy(model, micro_batch_tokens=micro_batch_tokens, compute=compute),
        objective=build_objective("stalewise", {}),
        settings=LearnerSettings(compute=compute, micro_batch_tokens=micro_batch_tokens),
        diagnose=diagnose,
        now=now,
    )
    length = micro_batch_tokens // 8
    config = model.config
    batch = make_batch([length] * (8 * MICRO_BATCHES), config.vocab_size)
    trainer.update(batch)
    parts = [trainer.update(batch) for _ in range(UPDATES)]
    times = {name: fmean(part[f"time/{name}_s"] for part in parts) for name in ("forward", "backward", "rest_of_step")}
    update_s, tokens = sum(times.values()), MICRO_BATCHES * micro_batch_tokens
    parameters = sum(parameter.numel() for parameter in model.parameters())
    attention = 12 * config.num_hidden_layers * config.hidden_size * length / 2
    utilisation = tokens * (6 * parameters + attention) / update_s / matrix_flops
    return (
        f"{MICRO_BATCHES} micro-batches of {micro_batch_tokens} tokens: {tokens / update_s:.0f} tokens/s, MFU "
        f"{utilisation:.1%}, " + ", ".join(f"{name} {1e3 * spent_s:.0f} ms" for name, spent_s in times.items())
    )


def _seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["packing", "step", "logprobs", "gpu", "one", "one-step"])
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--way", choices=[*WAYS, *STEPS], default="chunked", help="what `one` and `one-step` run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    match arguments.part:
        case "one":
            one_way(arguments.way, arguments.vocab, arguments.tokens)
        case "logprobs":
            logprobs(arguments.vocab, arguments.tokens)
        case "packing":
            packing()
        case "step":
            step()
        case "one-step":
            one_step(arguments.way)
        case "gpu":
            gpu()


if __name__ == "__main__":
    main()
