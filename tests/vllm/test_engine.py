"""vLLM samples from the version it says, with the log-probs that transformers gives: tolerance 1e-4 nats, float32."""

import itertools
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actor.engine import Completion, GenerationRequest
from actor.vllm.engine import VllmEngine
from actor.weight_sync import check_canary
from buffer.errors import CanaryFailed, CorruptWeights, InvalidRequest
from buffer.types import FinishReason, SamplingSettings, VersionSpan
from tests.factories import UNTRUNCATED
from tests.vllm.conftest import END_IDS, MAX_MODEL_TOKENS, Served, kept_at

pytestmark = pytest.mark.vllm

TOLERANCE_NATS = 1e-4
PROBE_IDS = np.arange(2, 34, dtype=np.int32)
GREEDY = SamplingSettings(temperature=1.0, top_p=1.0, top_k=1, min_p=0.0)


def requests_for(sampling: SamplingSettings, *, num: int = 8, max_new_tokens: int = 24) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt_ids=np.array([2 + i % 40, 11, 7], np.int32), sampling=sampling, max_new_tokens=max_new_tokens
        )
        for i in range(num)
    ]


def assert_logprobs_are_those_of_the_spans(
    served: Served, requests: list[GenerationRequest], drawn: list[Completion]
) -> None:
    for request, completion in zip(requests, drawn, strict=True):
        expected = served.policies.recompute(request.prompt_ids, completion, request.sampling.temperature)
        difference = np.abs(completion.behavior_logprobs - expected).max()
        assert difference < TOLERANCE_NATS


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [(1.0, 1.0, 0, 0.0), (0.7, 1.0, 0, 0.0), (1.0, 1.0, 5, 0.0), (0.7, 0.8, 8, 0.0), (1.3, 1.0, 48, 0.05)],
)
def test_logprobs_equal_transformers_over_a_grid_of_sampling_settings(
    served: Served, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    requests = requests_for(SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p))

    for parity in (0, 1):
        version = served.load(parity)
        drawn = served.engine.generate(requests)

        assert served.engine.version == version
        assert all(d.spans == (VersionSpan(start=0, end=len(d.response_ids), version=version),) for d in drawn)
        assert_logprobs_are_those_of_the_spans(served, requests, drawn)


def test_kept_ids_are_the_top_k_of_transformers(served: Served) -> None:
    served.load(0)
    request = requests_for(SamplingSettings(temperature=1.0, top_p=1.0, top_k=5, min_p=0.0), num=1)[0]

    (drawn,) = served.engine.generate([request])

    sequence = np.concatenate([request.prompt_ids, drawn.response_ids])
    expected = served.policies.logits(sequence, 0)[len(request.prompt_ids) - 1 : -1].topk(5).indices.tolist()
    kept = [kept_at(drawn, position) or [] for position in range(len(drawn.response_ids))]
    assert [sorted(ids) for ids in kept] == [sorted(ids) for ids in expected]


def test_top_k_1_is_greedy_decoding_of_the_loaded_version(served: Served) -> None:
    for parity in (0, 1):
        version = served.load(parity)
        for request in requests_for(GREEDY, num=4):
            (drawn,) = served.engine.generate([request])

            sequence = served.policies.models[version % 2].generate(
                torch.from_numpy(request.prompt_ids.astype(np.int64))[None], do_sample=False, max_new_tokens=24
            )[0]
            assert drawn.response_ids.tolist() == sequence[len(request.prompt_ids) :].tolist()
            assert not drawn.behavior_logprobs.any()


def test_a_response_ends_with_an_end_token_or_at_its_length(served: Served) -> None:
    served.load(0)

    drawn = served.engine.generate(requests_for(UNTRUNCATED, num=64))

    assert {d.finish_reason for d in drawn} == {FinishReason.STOP, FinishReason.LENGTH}
    assert set(END_IDS) < {d.response_ids[-1] for d in drawn}
    for completion in drawn:
        ended = completion.finish_reason is FinishReason.STOP
        assert (completion.response_ids[-1] in END_IDS) == ended
        assert not set(END_IDS) & set(completion.response_ids[:-1].tolist())
        assert ended or len(completion.response_ids) == 24


def test_a_delta_brings_the_next_version_where_its_keyframe_is_not_to_be_had(served: Served) -> None:
    base = served.publish(parity=0)
    served.take(base)
    manifest = served.publish_delta(base, parity=1)
    served.forget(base.payloads[0])

    served.take(manifest)

    check_canary(served.engine, manifest.probe, version=manifest.version)
    requests = requests_for(UNTRUNCATED)
    drawn = served.engine.generate(requests)
    assert {span.version for completion in drawn for span in completion.spans} == {manifest.version}
    assert_logprobs_are_those_of_the_spans(served, requests, drawn)


def test_weights_that_change_in_mid_generation_open_a_span_keep_logprobs_exact_and_lose_no_request(
    served: Served,
) -> None:
    held = served.publish(parity=0)
    served.take(held)
    requests = requests_for(UNTRUNCATED, num=16, max_new_tokens=100)
    drawn: list[Completion] = []
    generator = threading.Thread(target=lambda: drawn.extend(served.engine.generate(requests)))

    generator.start()
    for number in itertools.count(1):
        held = served.publish_delta(held, parity=number % 2) if number % 4 else served.publish(parity=0)
        served.take(held)
        if not generator.is_alive():
            break
    generator.join()

    assert len(drawn) == len(requests)
    assert {completion.finish_reason for completion in drawn} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert max(len(completion.spans) for completion in drawn) >= 2
    assert_logprobs_are_those_of_the_spans(served, requests, drawn)


def test_batches_of_two_threads_overlap_and_each_follows_the_versions_of_its_own_time(served: Served) -> None:
    first, second = served.publish(parity=0), served.publish(parity=1)
    long, short = requests_for(UNTRUNCATED, num=16, max_new_tokens=120), requests_for(UNTRUNCATED, max_new_tokens=2)
    drawn: list[Completion] = []

    def generate_long() -> None:
        drawn[:] = served.engine.generate(long)

    overlapped = False
    while not overlapped:  # the longest of the long ones may end too early
        served.take(first)
        generator = threading.Thread(target=generate_long)
        generator.start()
        before = served.engine.generate(short)
        served.take(second)
        after = served.engine.generate(short)
        overlapped = generator.is_alive()
        generator.join()

    for completions, version in ((before, first.version), (after, second.version)):
        assert {span.version for completion in completions for span in completion.spans} == {version}
        assert_logprobs_are_those_of_the_spans(served, short, completions)
    assert (first.version, second.version) in {tuple(span.version for span in c.spans) for c in drawn}
    assert_logprobs_are_those_of_the_spans(served, long, drawn)


def test_abort_ends_generation_with_the_tokens_drawn_so_far(served: Served) -> None:
    served.load(0)
    requests = requests_for(UNTRUNCATED, num=16, max_new_tokens=120)
    drawn: list[Completion] = []

    def generate() -> None:
        drawn[:] = served.engine.generate(requests)

    def partial(completion: Completion) -> bool:
        return completion.finish_reason is FinishReason.ABORT and len(completion.response_ids) > 0

    while not any(map(partial, drawn)):  # an abort may come before the first token, or after the last
        generator = threading.Thread(target=generate)
        generator.start()
        served.engine.score(PROBE_IDS)
        served.engine.abort()
        generator.join()

    for completion in drawn:
        assert sum(span.end - span.start for span in completion.spans) == len(completion.response_ids)
    drawn_some = [(r, c) for r, c in zip(requests, drawn, strict=True) if len(c.response_ids)]
    assert_logprobs_are_those_of_the_spans(served, *map(list, zip(*drawn_some, strict=True)))
    assert_logprobs_are_those_of_the_spans(served, requests, served.engine.generate(requests))


def test_a_probe_is_scored_at_temperature_1_while_another_thread_generates(served: Served) -> None:
    served.load(1)
    generator = threading.Thread(target=served.engine.generate, args=(requests_for(UNTRUNCATED, num=16),))

    generator.start()
    scores = served.engine.score(PROBE_IDS)
    generator.join()

    logprobs = served.policies.logits(PROBE_IDS, 1)[:-1].log_softmax(-1)
    expected = logprobs[torch.arange(len(PROBE_IDS) - 1), PROBE_IDS[1:].tolist()]
    assert scores.dtype == np.float32
    assert np.abs(scores - expected.numpy()).max() < TOLERANCE_NATS


def test_the_canary_catches_a_load_with_one_wrong_tensor(
    served: Served, tmp_path_factory: pytest.TempPathFactory
) -> None:
    right = served.publish(parity=0)
    name = "model.layers.1.mlp.down_proj.weight"
    wrong = load_file(served.policies.file(0)) | {name: load_file(served.policies.file(1))[name]}
    path = tmp_path_factory.mktemp("wrong") / "wrong.safetensors"
    save_file(wrong, path)

    served.take(served.publish(path, parity=0))

    with pytest.raises(CanaryFailed, match="off by"):
        check_canary(served.engine, right.probe, version=right.version)
    served.load(0)
    check_canary(served.engine, right.probe, version=right.version)


def test_what_a_server_draws_after_a_failed_canary_bears_no_version(served: Served) -> None:
    if isinstance(served.engine, VllmEngine):
        pytest.skip("nobody but its actor draws from it")
    served.load(0)

    served.engine.discard()  # what the weight sync does then

    with pytest.raises(CorruptWeights, match="drew tokens under weights that it calls 'none'"):
        served.engine.generate(requests_for(UNTRUNCATED, num=1))
    assert served.load(0) == served.engine.version
    served.engine.generate(requests_for(UNTRUNCATED, num=1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"lacks model\.norm\.weight, the model needs shape \(64,\)"),
        ("reshaped", r"up_proj\.weight with shape \(8, 8\), the model needs shape \(96, 64\)"),
        ("flipped", "leads to other weights than its manifest names"),
    ],
)
def test_a_version_that_is_not_this_model_is_named_and_the_old_weights_stay(
    served: Served, tmp_path_factory: pytest.TempPathFactory, damage: str, message: str
) -> None:
    before = served.load(0)
    tensors = load_file(served.policies.file(1))
    path = tmp_path_factory.mktemp("damaged") / "damaged.safetensors"
    if damage == "missing":
        del tensors["model.norm.weight"]
    if damage == "reshaped":
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 8)
    save_file(tensors, path)
    manifest = served.publish_unproven(path)
    if damage == "flipped":
        served.flip_a_bit(manifest)

    with pytest.raises(CorruptWeights, match=message):
        served.take(manifest)

    assert served.engine.version == before
    requests = requests_for(UNTRUNCATED)
    assert_logprobs_are_those_of_the_spans(served, requests, served.engine.generate(requests))


def test_a_prompt_with_ids_outside_the_vocabulary_is_refused_before_vllm_dies_of_it(served: Served) -> None:
    served.load(0)
    foreign = GenerationRequest(prompt_ids=np.array([48], np.int32), sampling=UNTRUNCATED, max_new_tokens=4)

    with pytest.raises(InvalidRequest, match="token ids from 0 to 47"):
        served.engine.generate([foreign])


def test_a_request_longer_than_the_engine_was_started_for_is_refused(served: Served) -> None:
    served.load(0)

    with pytest.raises(InvalidRequest, match=f"exceed the {MAX_MODEL_TOKENS} tokens"):
        served.engine.generate(requests_for(UNTRUNCATED, max_new_tokens=MAX_MODEL_TOKENS))
