"""FSDP2 over two gloo ranks on the CPU, through torchrun: what one process computes, two compute."""

from pathlib import Path

import pytest
import safetensors.torch

from learner.distributed import ALONE
from tests.distributed.launch import on_two_ranks
from tests.distributed.run import train
from tests.learner.builders import save_tiny_model

NOT_COMPARED = ("time/", "reference/cache_")
"""Clocks, and what the cache of the reference's terms counts: a resumed run begins with an empty one."""


@pytest.mark.timeout(600)
def test_two_ranks_then_one_then_two_learn_what_one_process_learns(tmp_path: Path) -> None:
    model_dir, run_dir = tmp_path / "model", tmp_path / "run"
    save_tiny_model(model_dir)
    expected = train(model_dir, tmp_path / "straight", ALONE, 0, 9)

    seen = on_two_ranks(model_dir, run_dir, 0, 4)
    (checkpoint,) = run_dir.glob("update-*")
    shards = [safetensors.torch.load_file(shard) for shard in sorted(checkpoint.glob("shard-*.safetensors"))]
    seen += train(model_dir, run_dir, ALONE, 4, 6)
    seen += on_two_ranks(model_dir, run_dir, 6, 9)

    for update, (of_one, of_two) in enumerate(zip(expected, seen, strict=True)):
        assert of_two.keys() == of_one.keys()
        for name in [name for name in of_one if not name.startswith(NOT_COMPARED)]:
            assert of_two[name] == pytest.approx(of_one[name], rel=2e-3, abs=2e-5), (update, name)
    # each rank wrote its half of the embedding, and nobody a whole one
    name = "policy/model.embed_tokens.weight"
    assert [tuple(shard[name].shape) for shard in shards] == [(12, 16), (12, 16)]
