"""A kept version beside training: which one it is, what is in it, and what a crash or an absent service leaves."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from buffer.errors import NotFound, ServiceUnreachable
from buffer.evaluations import ClaimAnswer, Evaluation, EvaluationBoard, EvaluationClaim
from buffer.types import PolicyVersion
from buffer.weights.manifest import Payload
from learner.collate import collate
from learner.evaluation import EvaluationWatch
from learner.kept import KeptVersion
from learner.policy import Policy
from learner.settings import LoraSettings
from learner.snapshot import take_snapshot
from tests.learner.builders import make_policy, make_trainer, plain_samples
from tests.learner.stores import ListedStore, publisher_to
from tests.services.test_evaluations import result


@dataclass
class _Board:
    """Evaluations as a service tells them."""

    results: list[Evaluation] = field(default_factory=list)

    def claim(self, claim: EvaluationClaim) -> ClaimAnswer:
        raise AssertionError("a learner evaluates nothing")

    def record(self, evaluation: Evaluation) -> None:
        self.results.append(evaluation)

    def read(self) -> EvaluationBoard:
        return EvaluationBoard(results=self.results, best_version=None, running=[])


class _Store(ListedStore):
    """Can be away."""

    away = False

    def download(self, payload: Payload, path: Path) -> None:
        if self.away:
            path.write_bytes(b"a beginning")
            raise ServiceUnreachable("nobody answers")
        super().download(payload, path)


def _publish(store: ListedStore, policy: Policy, versions: Sequence[PolicyVersion]) -> None:
    """Publish versions that differ: version n has n added to each norm's weight."""
    publisher = publisher_to(store)
    for version in versions:
        with torch.no_grad():
            policy.model.get_parameter("model.norm.weight").fill_(version)
        publisher.begin(take_snapshot(policy, dtype="bfloat16", tolerance_nats=0.05), version=version)
        publisher.flush()


def _look(board: _Board, best: KeptVersion, tmp_path: Path) -> None:
    """Look once, as a learner does that was just started."""
    path = tmp_path / "evaluations.jsonl"
    EvaluationWatch(board, path, patience_evaluations=None, best_weights=best, stop=threading.Event()).look()


def _norm(directory: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    value: float = model.get_parameter("model.norm.weight")[0].item()
    return value


def test_the_best_version_is_kept_as_a_model_that_can_be_trained_on(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for path in model_dir.iterdir():
        (tmp_path / "old" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    (tmp_path / "old" / "model.safetensors.index.json").write_text("{}")
    store, board = _Store(), _Board()
    _publish(store, make_policy(model_dir), [0, 10, 20, 30])
    best = KeptVersion(store, tmp_path, "best", model_dir=tmp_path / "old")
    kept: list[tuple[int | None, float]] = [(best.version, 0.0)]

    for version, pass_1 in [(0, 0.3), (20, 0.5), (30, 0.5), (10, 0.6)]:  # the last result comes late
        board.record(result(version, pass_1=pass_1))
        _look(board, best, tmp_path)
        kept.append((best.version, _norm(tmp_path / "best")))

    assert kept == [(None, 0.0), (0, 0.0), (20, 20.0), (20, 20.0), (10, 10.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-00000010", "evaluations.jsonl", "old"]
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert names == {"config.json", "evaluation.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert Evaluation.model_validate_json((tmp_path / "best" / "evaluation.json").read_text()) == board.results[-1]
    assert make_trainer(tmp_path / "best").update(collate(plain_samples(0), clock=0))["gradient/norm"] > 0


def test_a_crash_or_an_absent_service_leaves_the_one_before_and_the_next_look_mends_it(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, board = _Store(), _Board([result(0, pass_1=0.3)])
    _publish(store, make_policy(model_dir), [0, 10])
    best = KeptVersion(store, tmp_path, "best", model_dir=model_dir)
    _look(board, best, tmp_path)
    (tmp_path / "best-00000010").mkdir()  # a learner that was killed before the link moved
    (tmp_path / ".best-draft").mkdir()
    (tmp_path / ".best-link").symlink_to("best-00000010")
    board.record(result(10, pass_1=0.5))
    store.away = True

    with caplog.at_level("WARNING"):
        _look(board, best, tmp_path)
    assert (best.version, _norm(tmp_path / "best")) == (0, 0.0)
    assert "version 10, the best one, is not kept yet: nobody answers" in caplog.text
    store.away = False
    _look(board, best, tmp_path)

    assert (best.version, _norm(tmp_path / "best")) == (10, 10.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-00000010", "evaluations.jsonl"]


def test_a_version_that_the_store_has_lost_is_said_once(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board, best = _Board([result(7, pass_1=0.3)]), KeptVersion(_Store(), tmp_path, "best", model_dir=model_dir)
    path = tmp_path / "evaluations.jsonl"
    watch = EvaluationWatch(board, path, patience_evaluations=None, best_weights=best, stop=threading.Event())

    with caplog.at_level("WARNING"):
        watch.look()
        watch.look()

    assert caplog.text.count("is not kept yet: there is no version 7") == 1
    with pytest.raises(NotFound):
        best.keep(7)


def test_of_an_adapter_version_peft_loads_what_was_published(model_dir: Path, tmp_path: Path) -> None:
    lora = LoraSettings(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj"))
    trainer, store = make_trainer(model_dir, lora=lora), ListedStore()
    trainer.update(collate(plain_samples(0), clock=0))
    publisher = publisher_to(store, keyframe_every=1)
    publisher.begin(take_snapshot(trainer.policy, dtype="float32", tolerance_nats=0.05), version=3)

    KeptVersion(store, tmp_path, "best", model_dir=model_dir).keep(3)

    config = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "best")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, trainer.policy.model(input_ids=ids).logits)
