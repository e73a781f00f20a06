"""Adapters: what is trained, what the reference is, what is saved, and what an engine makes of it."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from actor.adapters import base_weights, merged
from buffer.errors import InvalidSettings
from buffer.weights.manifest import Adapter, Probe
from learner.checkpoint import Checkpoints
from learner.collate import collate
from learner.errors import CorruptCheckpoint
from learner.lora import AdapterPolicy
from learner.policy import Policy
from learner.settings import LearnerSettings, LoraSettings
from learner.snapshot import take_snapshot
from learner.step import Trainer
from learner.tokens import Column
from tests.learner.builders import make_policy, make_trainer, plain_samples
from tests.learner.stores import ListedStore, publisher_to

LORA = LoraSettings(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj"))


def _adapted(model_dir: Path, *, objective: str = "grpo", micro_batch_tokens: int = 10_000) -> Trainer:
    return make_trainer(model_dir, objective=objective, micro_batch_tokens=micro_batch_tokens, lora=LORA)


def _train(trainer: Trainer, seeds: range) -> None:
    for seed in seeds:
        trainer.update(collate(plain_samples(seed), clock=trainer.progress.clock))


def _parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.policy.model.named_parameters()}


def test_only_the_adapter_moves_and_it_starts_as_nothing(model_dir: Path) -> None:
    trainer = _adapted(model_dir)
    batch = collate(plain_samples(0), clock=0)
    plain = make_policy(model_dir).forward(batch, frozenset()).scores.logprobs
    before = _parameters(trainer)
    assert trainer.policy.forward(batch, frozenset()).scores.logprobs.equal(plain)

    _train(trainer, range(3))

    moved = {name for name, parameter in _parameters(trainer).items() if not parameter.equal(before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 2 * 2  # A and B of two modules in two layers
    assert (trainer.policy.forward(batch, frozenset()).scores.logprobs - plain).abs().max() > 1e-3


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 8])
def test_the_reference_is_the_model_without_its_adapter_and_costs_no_copy(
    model_dir: Path, micro_batch_tokens: int
) -> None:
    trainer = _adapted(model_dir, objective="reval", micro_batch_tokens=micro_batch_tokens)
    _train(trainer, range(2))
    batch = collate(plain_samples(7), clock=2)
    assert trainer.reference is not None

    columns = trainer.reference.columns(batch)

    untouched = make_trainer(model_dir, objective="reval").reference
    assert untouched is not None
    expected = untouched.columns(batch)[Column.REFERENCE_LOGPROBS]
    torch.testing.assert_close(columns[Column.REFERENCE_LOGPROBS], expected, atol=1e-5, rtol=0)
    assert trainer.reference.policy.model is trainer.policy.model
    assert (trainer.policy.forward(batch, frozenset()).scores.logprobs - expected).abs().max() > 1e-3


def test_a_step_with_a_reference_takes_the_same_way_as_one_whose_reference_is_a_copy(model_dir: Path) -> None:
    """Switching the adapter off between forward and backward must not disturb the gradient."""
    adapted, copied = (_adapted(model_dir, objective="reval") for _ in range(2))
    copied.policy.load_weights(adapted.policy.weights())
    copied.reference = make_trainer(model_dir, objective="reval").reference

    for trainer in (adapted, copied):
        _train(trainer, range(3))

    for name, tensor in adapted.policy.weights().items():
        torch.testing.assert_close(tensor, copied.policy.weights()[name], atol=1e-5, rtol=0)


def test_a_checkpoint_holds_the_adapter_alone_and_resumes_bit_for_bit(model_dir: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, model_fingerprint="f" * 64, resolved_settings={})
    straight, first_half = (_adapted(model_dir, objective="reval") for _ in range(2))
    first_half.policy.load_weights(straight.policy.weights())
    _train(straight, range(4))
    _train(first_half, range(2))
    saved = checkpoints.save(first_half)

    resumed = _adapted(model_dir, objective="reval")
    checkpoints.restore(saved, resumed)
    _train(resumed, range(2, 4))

    assert resumed.policy.weights().keys() == straight.policy.weights().keys()
    for name, tensor in straight.policy.weights().items():
        assert tensor.equal(resumed.policy.weights()[name]), name
    (shard,) = saved.glob("shard-*.safetensors")
    stored = safetensors.torch.load_file(shard)
    assert {name for name in stored if name.startswith("policy/")} == {
        f"policy/{name}" for name in straight.policy.weights()
    }
    assert all("lora_" in name for name in stored if name != "torch_random_state")
    assert json.loads((saved / "state.json").read_text())["reference_id"] == "update-0"
    with pytest.raises(CorruptCheckpoint, match="tensors differ by name"):
        checkpoints.restore(saved, make_trainer(model_dir, objective="reval"))


@pytest.mark.parametrize(
    ("modules", "sentence"), [(("query",), r"target_modules=\['query'\]"), (("norm",), r"target_modules=\['norm'\]")]
)
def test_modules_that_cannot_be_adapted_are_named(model_dir: Path, modules: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        AdapterPolicy.on(make_policy(model_dir), LoraSettings(target_modules=modules))


def test_a_reference_that_is_reset_cannot_be_had_with_an_adapter() -> None:
    with pytest.raises(ValueError, match="reference_reset_every=5 with lora"):
        LearnerSettings(lora=LORA, reference_reset_every=5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_adapters_are_peft_files_and_merged_by_an_actor_they_pass_the_canary(
    model_dir: Path, tmp_path: Path, dtype: str
) -> None:
    trainer, store = _adapted(model_dir, objective="grpo"), ListedStore()
    publisher = publisher_to(store, keyframe_every=1)
    _train(trainer, range(3))

    publisher.begin(take_snapshot(trainer.policy, dtype=dtype, tolerance_nats=0.05), version=0)
    publisher.flush()

    manifest, base = store.manifest(0), make_policy(model_dir)
    assert manifest.adapter == Adapter(rank=3, alpha=6.0, target_modules=LORA.target_modules)
    tensors = safetensors.torch.load(b"".join(store.blob(manifest.payloads[0].sha256)))
    assert tensors.keys() == trainer.policy.weights().keys()
    probe = torch.tensor(manifest.probe.logprobs)
    assert (_score(base, manifest.probe) - probe).abs().max() > 0.05
    base.load_weights(merged(base_weights(model_dir), tensors, manifest.adapter, version=0))
    torch.testing.assert_close(_score(base, manifest.probe), probe, atol=1e-4, rtol=0)


@torch.no_grad()
def _score(policy: Policy, probe: Probe) -> Tensor:
    ids = torch.tensor(probe.token_ids.astype("int64"))
    logprobs: Tensor = policy.model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None]).squeeze(-1)
