"""A loss computed from a file equals the loss of the tensors, and bad files are refused in one sentence."""

import json
import math
from pathlib import Path

import pytest

from buffer.errors import InvalidRequest
from learner.objectives.batch_file import batch_tokens, evaluated, read_batch
from learner.objectives.catalog import catalog, described
from learner.objectives.pieces import pieces
from learner.objectives.recipes import RECIPES, build_objective
from learner.tokens import Column, MissingColumns
from tests.learner.objectives.batches import ALL_PARTS, ROWS, Row, gradient, tokens_of

VERSION = 200


def entry(row: Row) -> dict[str, object]:
    """A row of the common batch as the file has it, with nan behind the mask."""

    def holed(values: list[float]) -> list[float]:
        return [value if m else math.nan for value, m in zip(values, row.mask, strict=True)]

    return {
        "logprobs": holed(row.logprobs),
        "behavior_logprobs": holed(row.behavior),
        "mask": [bool(m) for m in row.mask],
        "reward": row.reward,
        "group": f"g{row.group}",
        "episode": f"e{row.episode}",
        "spans": [
            {"start": t, "end": t + 1, "version": None if age < 0 else VERSION - age} for t, age in enumerate(row.ages)
        ],
        "columns": {
            "unit_logprobs": holed(row.unit),
            "reference_logprobs": holed(row.reference),
            "proximal_logprobs": holed(row.proximal),
            "first_logit": row.first_logit,
            "reference_first_logit": row.reference_first_logit,
        },
    }


def written(tmp_path: Path, batch: object) -> Path:
    path = tmp_path / "batch.json"
    path.write_text(batch if isinstance(batch, str) else json.dumps(batch))
    return path


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_file_gives_the_loss_and_gradients_of_its_tensors(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"learner_version": VERSION, "trajectories": [entry(row) for row in ROWS]})
    options = ALL_PARTS if name == "stalewise" else {}
    tokens, objective = tokens_of(), build_objective(name, options)
    loss = objective(tokens, objective.initial_multipliers())

    found = evaluated(name, options, path)

    assert found["loss"] == pytest.approx(loss.total.item(), rel=1e-6)
    wanted = gradient(loss.total, tokens.logprobs)
    gradients = found["gradients"]
    assert isinstance(gradients, dict)
    for i, row in enumerate(ROWS):
        assert gradients["logprobs"][i] == pytest.approx(wanted[i, : len(row.mask)].tolist(), rel=1e-5, abs=1e-8)
    if Column.FIRST_LOGIT in objective.columns:
        by_logit = gradient(loss.total, tokens.columns[Column.FIRST_LOGIT])
        assert gradients["first_logit"] == pytest.approx(by_logit.tolist(), rel=1e-5)
    json.dumps(found, allow_nan=False)


def test_ages_groups_and_episodes_come_from_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, {"learner_version": VERSION, "trajectories": [entry(row) for row in ROWS]})

    tokens, expected = batch_tokens(read_batch(path)), tokens_of()

    assert tokens.logprobs.requires_grad
    for column, values in tokens.columns.items():
        assert values.requires_grad == expected.columns[column].requires_grad
    for name in ("mask", "rewards", "group", "episode"):
        assert getattr(tokens, name).tolist() == getattr(expected, name).tolist()
    assert tokens.age_updates.tolist() == expected.age_updates.tolist()


def test_logits_give_the_worked_numbers_of_reval(tmp_path: Path) -> None:
    def trajectory(ids: list[int], logits: list[list[float]], reference: list[list[float]], reward: float) -> object:
        return {
            "token_ids": ids,
            "logits": logits,
            "reference_logits": reference,
            "behavior_logprobs": [-1.0, -1.0],
            "reward": reward,
            "group": f"g{ids}",
        }

    first = trajectory([0, 2], [[0.5, -0.2, 0.1], [1.0, 0.0, -1.0]], [[0.2, 0.1, 0.0], [0.4, 0.3, -0.2]], 1.0)
    second = trajectory([1, 1], [[0.5, -0.2, 0.1], [0.3, 0.6, -0.4]], [[0.2, 0.1, 0.0], [0.0, 0.5, 0.1]], 0.0)

    found = evaluated("reval", {"beta": 0.5, "centring": "none"}, written(tmp_path, {"trajectories": [first, second]}))

    assert found["loss"] == pytest.approx(3.431054, abs=2e-6)
    gradients = found["gradients"]
    assert isinstance(gradients, dict)
    assert gradients["first_logit"] == pytest.approx([-2.610030, -0.223277], abs=2e-6)


def example_1(behavior_logprobs: list[float] | None = None, *, temperature: float = 1.0) -> dict[str, object]:
    """Worked example 1 of TRM, its second token one of a tool."""
    behavior = [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.9, 0.05, 0.05]]
    policy = [[0.6, 0.3, 0.1], [0.5, 0.25, 0.25], [0.85, 0.05, 0.1]]

    def logits(rows: list[list[float]]) -> list[list[float]]:
        return [[temperature * math.log(p) + 3.0 for p in row] for row in rows]

    return {
        "token_ids": [0, 2, 1],
        "logits": logits(policy),
        "behavior_logits": logits(behavior),
        "behavior_logprobs": behavior_logprobs or [math.log(0.7), math.nan, math.log(0.05)],
        "mask": [True, False, True],
        "temperature": temperature,
        "reward": 1.0,
        "group": "g",
    }


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_behavior_logits_give_exact_masks_and_bounds(temperature: float, tmp_path: Path) -> None:
    path = written(tmp_path, {"trajectories": [example_1(temperature=temperature)]})

    tokens = batch_tokens(read_batch(path))
    closed = evaluated("trm", {"max_k2": "inf", "max_kl": 0.026}, path)
    found = evaluated("trm", {"max_k2": "inf", "max_kl": 0.027}, path)

    assert tokens.columns[Column.EXACT_KL][0].tolist() == pytest.approx([0.026812, 0.010068, 0.016785], abs=1e-6)
    assert tokens.columns[Column.EXACT_TV][0].tolist() == pytest.approx([0.1, 0.05, 0.05], abs=1e-6)
    assert closed["gates"] == {"trust_region_max": [[False] * 3]}
    assert found["gates"] == {"trust_region_max": [[True] * 3]}
    metrics = found["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["trust_region/kl_nats_max"] == pytest.approx(0.026812, abs=1e-6)
    assert metrics["trust_region/sequence_kl_nats_mean"] == pytest.approx(0.026812 + 0.016785, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"behavior_logprobs": [math.log(0.6), 0.0, math.log(0.05)]}, "differ by 0.154 nats at a drawn token"),
        ({"behavior_logprobs": [math.log(0.8), 0.0, math.log(0.05)]}, "differ by 0.134 nats at a drawn token"),
        ({"behavior_logprobs": [math.nan, 0.0, math.log(0.05)]}, "differ by nan nats at a drawn token"),
        ({"behavior_logits": [[0.0] * 4] * 3}, r"behavior_logits are \[3, 4\], logits \[3, 3\]: give one vocabulary"),
        ({"behavior_logits": [[0.0] * 3] * 2}, "behavior_logits has 2 entries for 3 behavior_logprobs"),
        ({"logits": None, "logprobs": [-1.0] * 3}, "behavior_logits need logits: a divergence is between the two"),
    ],
)
def test_behavior_logits_that_fit_nothing_are_refused(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"trajectories": [{**example_1(), **change}]})

    with pytest.raises(InvalidRequest, match=sentence):
        evaluated("trm", {}, path)


def test_the_first_logit_is_that_of_the_first_trained_token(tmp_path: Path) -> None:
    entry = {
        "token_ids": [0, 1, 0, 1],
        "logits": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]],
        "reference_logits": [[1.1, 1.2], [1.3, 1.4], [1.5, 1.6], [1.7, 1.8]],
        "behavior_logprobs": [-1.0] * 4,
        "mask": [False, True, True, True],
        "reward": 1,
        "group": "g",
    }
    given = {**entry, "logits": None, "logprobs": [-1.0] * 4}

    columns = batch_tokens(read_batch(written(tmp_path, {"trajectories": [entry]}))).columns
    of_the_reference = batch_tokens(read_batch(written(tmp_path, {"trajectories": [given]}))).columns

    assert columns[Column.FIRST_LOGIT].tolist() == pytest.approx([0.4])
    assert columns[Column.REFERENCE_FIRST_LOGIT].tolist() == pytest.approx([1.4])
    assert of_the_reference.keys() == {Column.REFERENCE_LOGPROBS, Column.REFERENCE_FIRST_LOGIT}


def test_a_trajectory_is_an_episode_of_its_own_unless_it_says_otherwise(tmp_path: Path) -> None:
    shared = {**GOOD, "episode": "0"}  # a name is no number: the first trajectory is not of this episode

    of_another_group = {**shared, "group": "another"}

    tokens = batch_tokens(
        read_batch(written(tmp_path, {"trajectories": [GOOD, GOOD, shared, shared, of_another_group]}))
    )

    assert tokens.episode.tolist() == [0, 1, 2, 2, 3]


def test_ages_are_counted_from_the_version_of_the_learner_which_is_0_when_left_out(tmp_path: Path) -> None:
    spanned = {**GOOD, "spans": [{"start": 0, "end": 1, "version": 0}, {"start": 1, "end": 2, "version": None}]}

    for batch, ages in (({"trajectories": [spanned]}, [0, -1]), ({"trajectories": [GOOD]}, [-1, -1])):
        assert batch_tokens(read_batch(written(tmp_path, batch))).age_updates.tolist() == [ages]


def test_temperature_applies_to_ratios_and_not_to_the_unit_column(tmp_path: Path) -> None:
    entry = {
        "token_ids": [1],
        "logits": [[0.0, math.log(4.0)]],
        "behavior_logprobs": [-1.0],
        "reward": 1,
        "group": "g",
    }

    tokens = batch_tokens(read_batch(written(tmp_path, {"trajectories": [{**entry, "temperature": 2.0}]})))
    plain = batch_tokens(read_batch(written(tmp_path, {"trajectories": [entry]})))

    assert plain.logprobs.item() == plain.columns[Column.UNIT_LOGPROBS].item()
    assert tokens.logprobs.item() == pytest.approx(math.log(2 / 3), abs=1e-6)
    assert tokens.columns[Column.UNIT_LOGPROBS].item() == pytest.approx(math.log(4 / 5), abs=1e-6)
    assert tokens.columns[Column.OTHER_SQUARED_PROBS].item() == pytest.approx(1 / 9, abs=1e-6)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert tokens.columns[Column.ENTROPY].item() == pytest.approx(entropy, abs=1e-6)


GOOD: dict[str, object] = {"logprobs": [-1.0, -2.0], "behavior_logprobs": [-1.0, -2.0], "reward": 1, "group": "g"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"logprobs": [-1.0]}, "logprobs has 1 entries for 2"),
        ({"logits": [[0.0], [0.0]]}, "give either logprobs or logits"),
        ({"logprobs": None}, "give either logprobs or logits"),
        ({"reference_logits": [[0.0], [0.0]]}, "logits need token_ids"),
        ({"reference_logits": [[0.0], [0.0]], "token_ids": [0, 1]}, "token_ids below it"),
        ({"reference_logits": [[0.0], [0.0]], "token_ids": [-1, 0]}, "token_ids below it"),
        ({"reference_logits": [[0.0], [0.0, 1.0]], "token_ids": [0, 0]}, "one width"),
        ({"mask": [False, False]}, "no token is trained"),
        ({"columns": {"first_logit": [1.0, 2.0]}}, "columns.first_logit must be one number"),
        ({"columns": {"entropy": 1.0}}, "columns.entropy must be a list"),
        ({"columns": {"entropy": [1.0]}}, "columns.entropy has 1 entries for 2"),
        ({"spans": [{"start": 0, "end": 1, "version": 3}]}, "spans must tile"),
        ({"rewards": 1}, "rewards: Extra inputs"),
        ({"reward": "much"}, "reward: .*number"),
    ],
)
def test_a_bad_trajectory_is_refused_in_one_sentence(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"trajectories": [{**GOOD, **change}]})

    with pytest.raises(InvalidRequest, match=sentence) as refusal:
        batch_tokens(read_batch(path))

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not JSON"), ("{}", "trajectories: Field required")])
def test_a_bad_file_is_refused_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        read_batch(written(tmp_path, text))


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nothing.json cannot be read: No such file"):
        read_batch(tmp_path / "nothing.json")


def test_a_column_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, {"trajectories": [GOOD]})

    with pytest.raises(MissingColumns, match="proximal_logprobs"):
        evaluated("icepop", {}, path)


def test_the_catalog_lists_every_recipe_and_describes_each_option() -> None:
    assert [row.name for row in catalog()] == list(RECIPES)
    for name, recipe in RECIPES.items():
        text = described(name)
        assert recipe.sentence in text
        assert (recipe.__doc__ or "nothing") in text
        assert all(f"  {option} = " in text for option in recipe.model_fields)
    assert "needs: no column but the log-probs" in described("dapo")
    assert "needs: first_logit, reference_first_logit, reference_logprobs, unit_logprobs" in described("reval")


def test_the_catalog_names_the_pieces_that_a_recipe_chose() -> None:
    everything: dict[str, object] = {"lambda_max": 0.1, "bellman_coefficient": 1.0, "mean_k3": 0.1}

    assert pieces(build_objective("stalewise", everything)) == (
        "policy: tapered_score(soft_clip(prefix_ratio)), standardised, mean_over_tokens, "
        "gate where_bad(sequence_largest_k2), gate where_bad(sequence_mean(k3))",
        "variance: ratio_variance(bounded_ratio), mean_over_tokens, dual ascent",
        "bellman: reval_residual(leave_one_out), squared, sum_over_sequences_per_token",
    )
    assert pieces(build_objective("grpo", {"reference_kl": 0.04})) == (
        "policy: hard_clip(token_ratio), standardised, mean_over_sequences_of_means",
        "reference_kl: reference_k3, mean_over_sequences_of_means",
    )
    for row in catalog():
        assert row.pieces == pieces(build_objective(row.name, {}))
        assert all(f"\n  {line}\n" in described(row.name) for line in row.pieces)


def test_the_example_in_the_docs_is_true(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text()
    example = docs.split("```json\n")[1].split("```")[0]

    found = evaluated("tis", {"advantage": "none"}, written(tmp_path, example))

    assert f"{found['loss']:.6f}" in docs
