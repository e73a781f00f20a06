import numpy as np
import pytest
from pydantic import JsonValue
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from actor.settings import TaskSettings
from actor.tasks import HELD_OUT_PROMPTS, Prompt, RunningSums, make_task
from buffer.errors import InvalidSettings
from tests.actor.conftest import character_tokenizer

TEXT = "".join(map(chr, range(32, 127))) + "\n"


def prompt_of(task: RunningSums, tokenizer: PreTrainedTokenizerFast, digits: str) -> Prompt:
    return Prompt(
        prompt_id=f"running_sums:{digits}",
        token_ids=np.array(tokenizer.encode(digits + "="), np.int32),
        answer_key={"digits": np.array([int(digit) for digit in digits])},
    )


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("5524<eos>", 1.0), ("5524", 0.0), ("5525<eos>", 0.0), ("552<eos>", 0.0), ("55244<eos>", 0.0), ("<eos>", 0.0)],
)
def test_running_sums_pay_for_the_whole_answer_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, answer: str, reward: float
) -> None:
    task = RunningSums(tokenizer, num_digits=4)
    end = [tokenizer.eos_token_id] if answer.endswith("<eos>") else []
    ids = np.array(tokenizer.encode(answer.removesuffix("<eos>")) + end, np.int32)

    # 5 5+0 5+0+7 5+0+7+2 mod 10
    assert task.reward(prompt_of(task, tokenizer, "5072"), ids) == reward


def test_running_sums_prompts_are_digits_and_an_equals_sign(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = RunningSums(tokenizer).sample(np.random.default_rng(0))

    text = tokenizer.decode(prompt.token_ids)

    assert len(text) == 17
    assert text[:-1].isdigit()
    assert text[-1] == "="
    assert prompt.prompt_id == f"running_sums:{text[:-1]}"


def test_held_out_prompts_are_fixed_distinct_and_never_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    task, rng = RunningSums(tokenizer, num_digits=4), np.random.default_rng(0)
    held_out = [prompt.prompt_id for prompt in task.held_out()]

    trained = {task.sample(rng).prompt_id for _ in range(5000)}  # of 10,000 possible ones

    assert len(set(held_out)) == HELD_OUT_PROMPTS
    assert not trained & set(held_out)
    assert held_out == [prompt.prompt_id for prompt in RunningSums(tokenizer, num_digits=4).held_out()]


def test_a_teacher_without_slips_is_right_and_one_with_slips_goes_on_from_the_wrong_total(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task, rng = RunningSums(tokenizer), np.random.default_rng(0)
    prompt = task.sample(rng)

    right = task.noisy_answer(prompt, rng, slip_probability=0.0)
    answers = [task.noisy_answer(prompt, rng, slip_probability=0.1) for _ in range(2000)]
    share = float(np.mean([task.reward(prompt, answer) for answer in answers]))

    assert task.reward(prompt, right) == 1.0
    assert share == pytest.approx(0.9**16, abs=0.03)
    slipped = next(answer for answer in answers if answer[0] != right[0])
    steps = np.diff(np.array(list(tokenizer.decode(slipped[:-1])), int)) % 10
    digits = prompt.answer_key["digits"][1:]
    assert (steps == digits).mean() > 0.5  # each later step still adds its own digit
    assert (slipped[1:-1] != right[1:-1]).mean() > 0.5  # to a total that stays wrong


def test_a_tokenizer_without_digits_is_refused_for_running_sums() -> None:
    with pytest.raises(InvalidSettings, match="cannot express '3' as one token"):
        RunningSums(character_tokenizer("012456789="))


def test_reasoning_gym_asks_in_text_and_judges_with_its_own_verifier() -> None:
    tokenizer = character_tokenizer(TEXT)
    task = make_task(TaskSettings(name="basic_arithmetic", options={"max_digits": 2}), tokenizer)
    prompt = task.sample(np.random.default_rng(0))

    def reward(answer: str) -> float:
        return task.reward(prompt, np.array([*tokenizer.encode(answer), tokenizer.eos_token_id], np.int32))

    assert tokenizer.decode(prompt.token_ids) == prompt.answer_key["question"]
    assert reward(prompt.answer_key["answer"]) == 1.0
    assert reward("no number") < 1.0


def begin_and_end_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a begin token before a text and an end token after it."""
    tokenizer = character_tokenizer("^" + TEXT.replace("^", ""))
    tokenizer.bos_token = "^"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="^ $A <eos>", special_tokens=[("^", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    )
    return tokenizer


def test_a_question_as_it_is_begins_as_the_tokenizer_begins_a_text_and_does_not_end() -> None:
    tokenizer = begin_and_end_tokenizer()
    task = make_task(TaskSettings(name="basic_arithmetic"), tokenizer)

    prompt = task.held_out()[0]

    question = prompt.answer_key["question"]
    assert tokenizer.decode(tokenizer(question).input_ids) == f"^{question}<eos>"
    assert tokenizer.decode(prompt.token_ids) == f"^{question}"


TEMPLATE = (
    "^{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize(
    ("system_text", "system_turn"), [(None, ""), ("The number alone.", "[system] The number alone.\n")]
)
def test_a_question_by_the_chat_template_is_a_users_turn_that_the_assistant_answers(
    system_text: str | None, system_turn: str
) -> None:
    tokenizer = begin_and_end_tokenizer()
    tokenizer.chat_template = TEMPLATE
    settings = TaskSettings(name="basic_arithmetic", chat_template=True, system_text=system_text)

    for prompt in make_task(settings, tokenizer).held_out()[:2]:
        question = prompt.answer_key["question"]
        assert tokenizer.decode(prompt.token_ids) == f"^{system_turn}[user] {question}\n[assistant] "


def test_a_template_without_system_turns_is_refused_with_its_own_words() -> None:
    tokenizer = character_tokenizer(TEXT)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    settings = TaskSettings(name="basic_arithmetic", chat_template=True, system_text="Be brief.")

    with pytest.raises(InvalidSettings, match=r"refuses these turns: System role .*leave actor\.task\.system_text out"):
        make_task(settings, tokenizer)


def test_reasoning_gym_never_trains_on_a_held_out_question() -> None:
    options: dict[str, JsonValue] = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    task = make_task(TaskSettings(name="basic_arithmetic", options=options), character_tokenizer(TEXT))
    held_out = {prompt.answer_key["question"] for prompt in task.held_out()}
    rng = np.random.default_rng(0)

    trained = {task.sample(rng).answer_key["question"] for _ in range(200)}

    assert not trained & held_out


@pytest.mark.parametrize(
    ("settings", "characters", "sentence"),
    [
        (TaskSettings(name="countdwn"), TEXT, r"neither running_sums nor one of the \d+ tasks.*did you mean countdown"),
        (TaskSettings(name="countdown"), "0123456789=", r"cannot express the prompts of reasoning-gym task countdown"),
        (TaskSettings(name="countdown", options={"no_such": 1}), TEXT, "refuses the options {'no_such': 1}"),
        (TaskSettings(name="basic_arithmetic", options={"size": 512}), TEXT, "size=512 leaves nothing to train on"),
        (TaskSettings(options={"num_digits": "many"}), TEXT, "its only option is the integer num_digits"),
        (TaskSettings(options={"num_digits": 2}), TEXT, "num_digits=2 must be between 4 and 100"),
        (TaskSettings(name="chain_sum", chat_template=True), TEXT, "is set, but the tokenizer has no chat template"),
        (
            TaskSettings(name="chain_sum", system_text="!"),
            TEXT,
            r"system_text is set without actor\.task\.chat_template",
        ),
        (TaskSettings(chat_template=True), TEXT, "task running_sums writes its prompts itself"),
        (TaskSettings(name="my:Task", chat_template=True), TEXT, "task my:Task writes its prompts itself"),
        (TaskSettings(name="no_such.module:Task"), TEXT, "'no_such.module:Task' cannot be imported: No module named"),
        (TaskSettings(name="actor.tasks:Riddles"), TEXT, "cannot be imported: module 'actor.tasks' has no .*'Riddles'"),
        (TaskSettings(name=":Task"), TEXT, "cannot be imported: Empty module name"),
        (TaskSettings(name="actor.tasks:RunningSums", options={"digits": 4}), TEXT, "unexpected .* 'digits'"),
        (
            TaskSettings(name="actor.end_tokens:eos_token_id"),
            TEXT,
            "is no task: int lacks one of sample, held_out and reward",
        ),
    ],
)
def test_bad_task_settings_are_one_sentence(settings: TaskSettings, characters: str, sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        make_task(settings, character_tokenizer(characters))
