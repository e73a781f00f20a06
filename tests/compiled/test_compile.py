"""`learner.compute.compile`: compiled layers give the losses and gradients of plain ones, through whole updates.

Starts a C++ compiler, and takes some minutes of a core: only with --compile (make test-compile).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from learner.collate import collate
from learner.distributed import ALONE
from learner.settings import ComputeSettings
from learner.snapshot import take_snapshot
from learner.step import Trainer
from tests.distributed.launch import on_two_ranks
from tests.distributed.run import train
from tests.learner.builders import make_policy, make_trainer, mixed_samples, plain_samples, save_tiny_model

BATCHES = (plain_samples(0), mixed_samples())
"""Unequal shapes, several micro-batches, tool tokens, truncated sampling."""


def _updates(trainer: Trainer) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    """Return the metrics and the clipped gradients of an update on each batch."""
    seen = []
    for samples in BATCHES:
        metrics = trainer.update(collate(samples, clock=3))
        parameters = trainer.policy.model.named_parameters()
        seen.append((metrics, {name: p.grad.clone() for name, p in parameters if p.grad is not None}))
    return seen


@pytest.fixture(autouse=True)
def only_when_asked(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--compile"):
        pytest.skip("compiles C++: make test-compile")
    torch.set_num_threads(1)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # the compiler looks at what warns; as errors its warnings break it
def test_compiled_layers_give_the_losses_and_gradients_of_plain_ones(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)

    def trainer(*, compiled: bool) -> Trainer:
        compute = ComputeSettings(compile=compiled)
        return make_trainer(tmp_path, objective="stalewise", micro_batch_tokens=24, compute=compute)

    plain = _updates(trainer(compiled=False))
    graphs_before = counters["stats"]["unique_graphs"]
    compiled = _updates(trainer(compiled=True))

    assert counters["stats"]["unique_graphs"] > graphs_before  # it did not fall back to plain layers
    for (metrics, gradients), (metrics_compiled, gradients_compiled) in zip(plain, compiled, strict=True):
        for name in [name for name in metrics if not name.startswith("time/")]:
            assert metrics_compiled[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
        assert gradients_compiled.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradients_compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_versions_between_updates_leave_a_compiled_policy_as_it_is_and_have_the_canary_of_plain_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model(tmp_path)
    seen: list[list[tuple[np.ndarray, float, Tensor]]] = []
    for compiled in (False, True):
        trainer = make_trainer(tmp_path, lr=1e-3, compute=ComputeSettings(compile=compiled))
        seen.append([])
        for _ in range(10):  # more than Dynamo compiles one layer anew for
            probe = take_snapshot(trainer.policy, dtype="bfloat16", tolerance_nats=0.05).probe
            loss = trainer.update(collate(BATCHES[0], clock=3))["loss/total"]
            weights = torch.cat([weight.flatten() for weight in trainer.policy.weights().values()])
            seen[-1].append((probe.logprobs, loss, weights.clone()))

    assert "recompile_limit" not in caplog.text
    for (probe, loss, weights), (probe_compiled, loss_compiled, weights_compiled) in zip(*seen, strict=True):
        np.testing.assert_allclose(probe_compiled, probe, atol=1e-2)
        assert loss_compiled == pytest.approx(loss, rel=1e-3, abs=1e-4)
        torch.testing.assert_close(weights_compiled, weights, rtol=1e-2, atol=2e-4)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_the_reference_of_a_compiled_policy_runs_compiled(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    reference = make_policy(tmp_path, compute=ComputeSettings(compile=True)).frozen_copy()
    graphs_before = counters["stats"]["unique_graphs"]

    reference.forward(collate(mixed_samples(), clock=3), frozenset())

    assert counters["stats"]["unique_graphs"] > graphs_before


@pytest.mark.timeout(900)
def test_compiled_layers_on_two_ranks_learn_what_plain_ones_in_one_process_do(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    save_tiny_model(model_dir)
    plain = train(model_dir, tmp_path / "plain", ALONE, 0, 2)

    compiled = on_two_ranks(model_dir, tmp_path / "compiled", 0, 2, "--compile", timeout_s=800)

    for of_plain, of_compiled in zip(plain, compiled, strict=True):
        for name in [name for name in of_plain if name.startswith(("loss/", "gradient/"))]:
            assert of_compiled[name] == pytest.approx(of_plain[name], rel=2e-3, abs=2e-5), name
