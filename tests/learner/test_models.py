"""Any causal LM: packed scores and gradients of each family equal those of transformers' own forward, one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from buffer.errors import InvalidSettings
from learner.collate import Batch, collate
from learner.head import HeadShape
from learner.policy import Policy
from learner.settings import ComputeSettings
from learner.tokens import Column
from tests.factories import make_group, make_trajectory
from tests.learner.builders import VOCAB, as_sample, make_policy, make_trainer, mixed_samples, plain_samples

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen2, tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3, untied": Qwen3Config(**SHAPE, tie_word_embeddings=False),
    "llama": LlamaConfig(**SHAPE),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=3),
    "gemma2, caps and window": Gemma2Config(
        **SHAPE, final_logit_softcapping=3.0, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=3
    ),
    "gemma3, window": Gemma3TextConfig(**SHAPE, sliding_window=3, layer_types=["sliding_attention", "full_attention"]),
    "granite, divided logits": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "cohere, multiplied logits": CohereConfig(**SHAPE, logit_scale=0.25),
    "gpt2, learnt positions": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4
    ),
}
WANTED = frozenset({Column.UNIT_LOGPROBS, Column.LOGSUMEXP, Column.FIRST_LOGIT})


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chunks be as small as the settings say: those of a vocabulary of 24 would hold every token."""
    monkeypatch.setattr("learner.head._SMALLEST_CHUNK_LOGITS", 1)


def _save(config: PreTrainedConfig, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def _batch() -> Batch:
    """Ragged, with tool tokens, temperatures and cut supports, and sequences longer than the windows."""
    long = make_trajectory("long", prompt_ids=[3, 9, 4], response_ids=[*range(5, 17), 2])
    return collate([*mixed_samples(), as_sample(make_group("c", trajectories=[long]))], clock=2)


def _of_transformers(model_dir: Path, batch: Batch) -> tuple[dict[str, Tensor], Any]:
    """The same scores [n] by plain forwards of one sequence at a time, and the model that their graph leads to."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    rows: dict[str, list[Tensor]] = {"logprobs": [], "unit_logprobs": [], "logsumexp": [], "first_logit": []}
    for row, length in enumerate(batch.sequence_lengths.tolist()):
        ids = batch.token_ids[row, :length]
        prompt = int(batch.prompt_lengths[row])
        logits = model(input_ids=ids[None]).logits[0, prompt - 1 : -1]
        scaled = logits / batch.temperature[row]
        kept = batch.kept[row]
        if kept is not None:
            owners = torch.arange(len(kept.counts)).repeat_interleave(kept.counts)
            support = torch.zeros(logits.shape, dtype=torch.bool)
            support[owners, kept.token_ids] = True
            scaled = scaled.masked_fill(~support & (kept.counts > 0)[:, None], -torch.inf)
        trained, chosen = batch.mask[row, : length - prompt], ids[prompt:, None]
        rows["logprobs"].append(scaled.log_softmax(-1).gather(-1, chosen)[trained, 0])
        rows["unit_logprobs"].append(logits.log_softmax(-1).gather(-1, chosen)[trained, 0])
        rows["logsumexp"].append(logits.logsumexp(-1)[trained])
        rows["first_logit"].append(logits.gather(-1, chosen)[trained, 0][:1])
    return {name: torch.cat(values) for name, values in rows.items()}, model


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_and_gradients_are_those_of_plain_forwards(
    family: str, small_chunks: None, tmp_path: Path
) -> None:
    model_dir, batch = _save(FAMILIES[family], tmp_path), _batch()
    theirs, model = _of_transformers(model_dir, batch)
    chunks_of_3 = ComputeSettings(logits_chunk_tokens=3)
    # several micro-batches, most with several sequences and several chunks of logits
    policy = make_policy(model_dir, micro_batch_tokens=20, compute=chunks_of_3)

    forward = policy.forward(batch, WANTED)

    columns = {str(column): values for column, values in forward.scores.columns.items()}
    scores = {"logprobs": forward.scores.logprobs, **columns}
    ours = {name: value if value.dim() == 1 else value[batch.mask] for name, value in scores.items()}
    assert len(forward.rows) > 1
    weights = {name: torch.linspace(-1, 1, len(value)) for name, value in theirs.items()}
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=2e-5, rtol=1e-5, msg=f"{name} of {family}")
    torch.autograd.backward(torch.stack([(weights[name] * value).sum() for name, value in theirs.items()]).sum())
    policy.backward(batch, forward, torch.stack([(weights[name] * ours[name]).sum() for name in theirs]).sum())
    gradients = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        largest = float(parameter.grad.abs().max())
        assert gradients[name] is not None
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5 * max(largest, 1.0), rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4),
        BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.4),
    ],
    ids=["a state that runs on", "positions that are not told"],
)
def test_a_model_that_cannot_be_packed_is_refused_with_a_sentence(config: PreTrainedConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"ForCausalLM cannot be trained"):
        make_policy(_save(config, tmp_path))


def test_attention_by_chunks_is_refused_though_short_sequences_do_not_show_it(tmp_path: Path) -> None:
    config = Llama4TextConfig(
        **SHAPE, intermediate_size_mlp=32, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=16
    )
    with pytest.raises(InvalidSettings, match="looks at chunks of 16 tokens"):
        make_policy(_save(config, tmp_path))


def _gradients(policy: Policy, batch: Batch) -> list[Tensor]:
    forward = policy.forward(batch, WANTED)
    policy.backward(batch, forward, (forward.scores.logprobs * torch.linspace(-1, 1, batch.mask.shape[1])).sum())
    return [parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"logits_chunk_tokens": 1}])
def test_checkpointing_and_chunks_change_no_gradient(
    model_dir: Path, small_chunks: None, settings: dict[str, Any]
) -> None:
    batch = _batch()
    plain = _gradients(make_policy(model_dir), batch)
    other = _gradients(make_policy(model_dir, compute=ComputeSettings(**settings)), batch)

    for left, right in zip(plain, other, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_checkpointing_runs_each_layer_again(model_dir: Path) -> None:
    batch, calls = _batch(), []
    for compute in (ComputeSettings(), ComputeSettings(activation_checkpointing=True)):
        policy = make_policy(model_dir, compute=compute)
        count = [0]
        attention = policy.model.model.layers[0].self_attn
        attention.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        _gradients(policy, batch)
        calls.append(count[0])

    assert calls == [1, 2]


def test_bfloat16_keeps_weights_and_gradients_in_float32_and_comes_close(model_dir: Path) -> None:
    batch = _batch()
    exact = make_policy(model_dir).forward(batch, frozenset()).scores.logprobs
    policy = make_policy(model_dir, compute=ComputeSettings(dtype="bfloat16"))

    rounded = policy.forward(batch, frozenset()).scores.logprobs

    apart = (rounded - exact).abs().detach()
    assert rounded.dtype == torch.float32
    assert 1e-4 < float(apart.max()) < 0.5
    assert {tensor.dtype for tensor in (*policy.weights().values(), *_gradients(policy, batch))} == {torch.float32}


def test_bfloat16_factors_have_float32_logits() -> None:
    """A logit of 8 or more that is rounded to bfloat16 lies on a grid of 1/16: a false ratio of 3 %."""
    hidden, matrix = torch.randn(4, 64).bfloat16(), torch.randn(32, 64).bfloat16()

    logits = HeadShape(dtype=torch.bfloat16).logits(hidden, matrix, None)

    exact = hidden.double() @ matrix.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2, tied", "qwen3, untied", "gemma2, caps and window"])
def test_bfloat16_updates_keep_weights_and_moments_in_float32_and_go_the_same_way(family: str, tmp_path: Path) -> None:
    model_dir, moved = _save(FAMILIES[family], tmp_path), []
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(model_dir, objective="stalewise", compute=ComputeSettings(dtype=dtype))
        before = torch.cat([weight.flatten().clone() for weight in trainer.policy.weights().values()])
        for seed in range(3):
            trainer.update(collate(plain_samples(seed), clock=seed))
        after = [weight.flatten() for weight in trainer.policy.weights().values()]
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        assert {tensor.dtype for tensor in (*after, *moments)} == {torch.float32}
        moved.append(torch.cat(after) - before)

    assert torch.cosine_similarity(moved[0], moved[1], dim=0) > 0.95


def test_queries_that_a_norm_left_in_float32_can_take_the_flash_kernel_of_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(query: Tensor, value: Tensor, softcap: float | None) -> bool:
        seen.append((query.dtype, value.dtype))
        return False  # that kernel is a GPU's

    policy = make_policy(_save(FAMILIES["qwen3, untied"], tmp_path), compute=ComputeSettings(dtype="bfloat16"))
    monkeypatch.setattr("learner.attention._flash_can", watched)

    policy.forward(_batch(), frozenset())

    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


def test_flash_attention_that_is_not_installed_is_one_sentence(model_dir: Path) -> None:
    with pytest.raises(InvalidSettings, match="flash-attn is not installed"):
        make_policy(model_dir, compute=ComputeSettings(attention="flash_attention_2"))
