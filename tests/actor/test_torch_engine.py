import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedTokenizerFast, Qwen2Config

from actor.decoding import Decoding
from actor.engine import Completion, GenerationRequest
from actor.model_config import load_config, vocab_size
from actor.torch_engine import TorchEngine
from buffer.errors import CorruptWeights, InvalidRequest, InvalidSettings
from buffer.types import FinishReason, SamplingSettings
from tests.actor.conftest import EOS, VOCABULARY

PLAIN = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
GRID = [
    PLAIN,
    SamplingSettings(temperature=0.6, top_p=1.0, top_k=0, min_p=0.0),
    SamplingSettings(temperature=1.7, top_p=0.8, top_k=0, min_p=0.0),
    SamplingSettings(temperature=1.0, top_p=1.0, top_k=5, min_p=0.0),
    SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.1),
    SamplingSettings(temperature=1.3, top_p=0.9, top_k=8, min_p=0.02),
]


def request(
    prompt: Sequence[int] = (3, 4, 5), *, sampling: SamplingSettings = PLAIN, max_new_tokens: int = 8
) -> GenerationRequest:
    return GenerationRequest(prompt_ids=np.array(prompt, np.int32), sampling=sampling, max_new_tokens=max_new_tokens)


def clean_logits(model_dir: Path, keyframe: Path, request: GenerationRequest, completion: Completion) -> Tensor:
    """Return the logits [T, V] that plain transformers gives the response, without padding, cache or batch."""
    model = AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(model_dir)).eval()
    weights = load_file(keyframe)
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    ids = np.concatenate([request.prompt_ids, completion.response_ids]).astype(np.int64)
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
    return logits[len(request.prompt_ids) - 1 : -1]


def assert_exact(
    model_dir: Path, keyframes: Sequence[Path], request: GenerationRequest, completion: Completion
) -> None:
    """Compare every behaviour log-prob with a clean recomputation under the version of its span."""
    length = len(completion.response_ids)
    expected = torch.full((length,), torch.nan)
    counts = completion.kept_token_counts if completion.kept_token_counts is not None else np.zeros(length, np.int32)
    kept_ids = completion.kept_token_ids if completion.kept_token_ids is not None else np.zeros(0, np.int32)
    kept = np.split(kept_ids, np.cumsum(counts)[:-1])
    for span in completion.spans:
        assert span.version is not None
        logits = clean_logits(model_dir, keyframes[span.version % len(keyframes)], request, completion)
        for t in range(span.start, span.end):
            scaled = logits[t] / request.sampling.temperature
            support = torch.from_numpy(kept[t].astype(np.int64)) if request.sampling.truncates else slice(None)
            expected[t] = scaled[int(completion.response_ids[t])] - scaled[support].logsumexp(0)
    np.testing.assert_allclose(completion.behavior_logprobs, expected.numpy(), atol=3e-5)


@pytest.mark.parametrize("sampling", GRID, ids=str)
def test_behavior_logprobs_are_exact_under_the_version_of_their_span(
    model_dir: Path, keyframes: list[Path], engine: TorchEngine, sampling: SamplingSettings
) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(2, VOCABULARY, length) for length in (3, 11, 11, 1, 7)]
    requests = [request(list(p), sampling=sampling, max_new_tokens=60) for p in prompts for _ in range(3)]
    done = threading.Event()

    def swap() -> None:
        version = 0
        while not done.wait(0.02):
            version += 1
            engine.load(keyframes[version % len(keyframes)], version)

    swapper = threading.Thread(target=swap)
    swapper.start()
    completions: list[Completion] = []
    pairs: list[tuple[GenerationRequest, Completion]] = []
    deadline = time.monotonic() + 60
    while not any(len(c.spans) > 2 and c.spans[1].end > c.spans[1].start + 1 for c in completions):
        assert time.monotonic() < deadline, "no swap fell into a generation"
        completions = engine.generate(requests)
        pairs = list(zip(requests, completions, strict=True))
    done.set()
    swapper.join()

    for one, completion in pairs:
        assert_exact(model_dir, keyframes, one, completion)


def test_the_log_has_the_first_token_of_each_version_once(
    model_dir: Path, keyframes: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="actor.torch_engine")
    engine = TorchEngine(model_dir, seed=0)
    for version in (0, 4):
        engine.load(keyframes[version % len(keyframes)], version)
        for _ in range(2):
            engine.generate([request()])

    assert caplog.messages == [f"first token under version {version}, of a new batch" for version in (0, 4)]


def test_a_ragged_batch_gives_each_request_what_it_asked_for(
    model_dir: Path, keyframes: list[Path], engine: TorchEngine
) -> None:
    requests = [
        request(range(2, 2 + length), sampling=GRID[i % len(GRID)], max_new_tokens=limit)
        for i, (length, limit) in enumerate([(1, 40), (9, 1), (3, 2), (17, 30), (5, 3), (2, 5), (8, 70)])
    ]

    completions = engine.generate(requests)

    for one, completion in zip(requests, completions, strict=True):
        length, stopped = len(completion.response_ids), completion.response_ids[-1] == EOS
        assert completion.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert length == one.max_new_tokens or (stopped and length < one.max_new_tokens)
        assert EOS not in completion.response_ids[:-1]
        assert (completion.kept_token_ids is not None) == one.sampling.truncates
        assert_exact(model_dir, keyframes, one, completion)
    assert any(completion.finish_reason is FinishReason.STOP for completion in completions)


def test_shipped_distributions_are_what_each_row_of_a_ragged_batch_was_drawn_from(
    model_dir: Path, keyframes: list[Path]
) -> None:
    engine = TorchEngine(model_dir, seed=7, ship_distributions=True)
    engine.load(keyframes[0], 0)
    requests = [
        request(range(2, 2 + length), sampling=GRID[i % len(GRID)], max_new_tokens=limit)
        for i, (length, limit) in enumerate([(1, 40), (9, 1), (3, 2), (17, 30), (5, 3), (2, 5), (8, 70)])
    ]

    completions = engine.generate(requests)

    for one, completion in zip(requests, completions, strict=True):
        logits = clean_logits(model_dir, keyframes[0], one, completion) / one.sampling.temperature  # [T, V]
        expected = logits.log_softmax(-1)
        if completion.kept_token_ids is not None and completion.kept_token_counts is not None:
            kept = np.split(completion.kept_token_ids.astype(np.int64), np.cumsum(completion.kept_token_counts)[:-1])
            expected = torch.cat([row[ids].log_softmax(0) for row, ids in zip(logits, kept, strict=True)])
        assert completion.distribution_logprobs is not None
        np.testing.assert_allclose(completion.distribution_logprobs, expected.flatten().numpy(), atol=3e-5)


def test_distributions_are_shipped_only_when_asked(engine: TorchEngine) -> None:
    assert engine.generate([request()])[0].distribution_logprobs is None


@pytest.mark.parametrize("sampling", [GRID[0], GRID[1], GRID[5]], ids=str)
def test_tokens_are_drawn_as_often_as_the_softmax_says(
    model_dir: Path, keyframes: list[Path], engine: TorchEngine, sampling: SamplingSettings
) -> None:
    draws = 20_000
    one = request(sampling=sampling, max_new_tokens=1)

    completions = engine.generate([one] * draws)

    logits = clean_logits(model_dir, keyframes[0], one, completions[0])[0] / sampling.temperature
    if completions[0].kept_token_ids is not None:
        cut = torch.ones(VOCABULARY, dtype=torch.bool)
        cut[torch.from_numpy(completions[0].kept_token_ids.astype(np.int64))] = False
        logits[cut] = -torch.inf
    expected = logits.softmax(0).numpy()
    seen = np.bincount([c.response_ids[0] for c in completions], minlength=VOCABULARY) / draws
    standard_error = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(seen - expected) <= 4.5 * standard_error + 1e-9)


def test_the_same_seed_draws_the_same_and_another_seed_does_not(model_dir: Path, keyframes: list[Path]) -> None:
    def drawn(seed: int) -> list[list[int]]:
        engine = TorchEngine(model_dir, seed=seed)
        engine.load(keyframes[0], 0)
        return [c.response_ids.tolist() for c in engine.generate([request(max_new_tokens=12)] * 4)]

    first, again, other = drawn(1), drawn(1), drawn(2)

    assert first == again
    assert first != other
    assert len({tuple(response) for response in first}) > 1


def test_score_equals_a_clean_forward_pass(model_dir: Path, keyframes: list[Path], engine: TorchEngine) -> None:
    sequence = np.array([5, 6, 7, 8, 2, 3], np.int32)
    completion = engine.generate([request(max_new_tokens=1)])[0]

    scores = engine.score(sequence)

    whole = Completion(
        response_ids=sequence[1:],
        behavior_logprobs=scores,
        spans=completion.spans[:1],
        finish_reason=FinishReason.LENGTH,
        kept_token_ids=None,
        kept_token_counts=None,
    )
    logits = clean_logits(model_dir, keyframes[0], request(sequence[:1].tolist()), whole)
    expected = logits.log_softmax(-1).gather(1, torch.from_numpy(sequence[1:].astype(np.int64))[:, None]).squeeze(1)
    np.testing.assert_allclose(scores, expected.numpy(), atol=3e-5)


def test_a_file_that_is_not_this_model_is_refused_and_the_weights_in_use_stay(
    keyframes: list[Path], engine: TorchEngine, tmp_path: Path
) -> None:
    probe = np.arange(2, 10, dtype=np.int32)
    before, tensors = engine.score(probe), load_file(keyframes[1])
    norm = "model.norm.weight"
    broken = {
        "missing": {name: tensor for name, tensor in tensors.items() if name != norm},
        "unexpected": {**tensors, "extra.weight": torch.zeros(2)},
        "shape": {**tensors, norm: torch.zeros(3)},
        "twice": {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    }

    for name, content in broken.items():
        save_file(content, tmp_path / name)
        with pytest.raises(CorruptWeights, match=r"version 5"):
            engine.load(tmp_path / name, 5)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(CorruptWeights, match="not a readable safetensors file"):
        engine.load(tmp_path / "text", 5)

    assert engine.version == 0
    np.testing.assert_array_equal(engine.score(probe), before)


def test_requests_that_the_model_cannot_hold_are_refused_with_a_sentence(engine: TorchEngine) -> None:
    for bad in (request([]), request([VOCABULARY]), request([-1]), request(max_new_tokens=0)):
        with pytest.raises(InvalidRequest):
            engine.generate([bad])
    with pytest.raises(InvalidRequest, match="do not fit the 128 positions"):
        engine.generate([request(max_new_tokens=126)])


def test_nothing_is_generated_before_the_first_load(model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="no weights yet"):
        TorchEngine(model_dir, seed=0).generate([request()])


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="is not a model directory"):
        TorchEngine(tmp_path, seed=0)


def test_a_model_that_has_text_among_other_parts_generates(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = Gemma3Config(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 64,
        },
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    weights = AutoModelForCausalLM.from_config(config).state_dict()
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    engine = TorchEngine(tmp_path, seed=0)
    engine.load(tmp_path / "model.safetensors", 0)

    assert engine.max_tokens == 64
    assert vocab_size(load_config(tmp_path)) == VOCABULARY
    assert len(engine.generate([request(max_new_tokens=4)])[0].response_ids)


def test_an_abort_ends_responses_with_the_tokens_drawn_so_far(model_dir: Path, keyframes: list[Path]) -> None:
    class Counting(TorchEngine):
        """An engine that is told to abort after its third step."""

        def _step(self, decoding: Decoding) -> None:
            super()._step(decoding)
            self.steps += 1
            if self.steps == 3:
                self.abort()

        steps = 0

    engine = Counting(model_dir, seed=7)
    engine.load(keyframes[0], 0)
    requests = [request((3 + i, 4), max_new_tokens=40) for i in range(12)]

    drawn = engine.generate(requests)

    assert engine.steps == 3
    assert {len(completion.response_ids) for completion in drawn if completion.finish_reason == "abort"} == {3}
    assert {completion.finish_reason for completion in drawn} <= {FinishReason.ABORT, FinishReason.STOP}
    for of, completion in zip(requests, drawn, strict=True):
        assert_exact(model_dir, keyframes, of, completion)
    assert all(completion.finish_reason != "abort" for completion in engine.generate(requests))
