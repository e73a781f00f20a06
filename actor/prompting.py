"""How a question in text becomes the token ids of a prompt."""

from collections.abc import Callable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from buffer.errors import InvalidSettings

Prompting = Callable[[str], list[int]]
"""Token ids of the prompt that asks a question."""


def as_it_is(tokenizer: PreTrainedTokenizerBase) -> Prompting:
    """Ask with the question alone, after the begin token where the tokenizer puts one; never with an end token."""

    def prompt(question: str) -> list[int]:
        token_ids: list[int] = tokenizer.encode(question, add_special_tokens=False)
        begins = tokenizer.bos_token_id is not None and tokenizer.encode(question)[:1] == [tokenizer.bos_token_id]
        return [tokenizer.bos_token_id, *token_ids] if begins else token_ids

    return prompt


def as_chat(tokenizer: PreTrainedTokenizerBase, *, system_text: str | None) -> Prompting:
    """Ask in a user's turn of the tokenizer's chat template, after a system turn if there is a text for one.

    Raises InvalidSettings when there is no template, or when it takes no such turns.
    """
    if tokenizer.chat_template is None:
        raise InvalidSettings(
            "actor.task.chat_template is set, but the tokenizer has no chat template",
            hint="leave it out, or choose a model that is made for chats (Instruct, -it)",
        )
    system = [] if system_text is None else [{"role": "system", "content": system_text}]

    def prompt(question: str) -> list[int]:
        messages = [*system, {"role": "user", "content": question}]
        # without return_dict=False transformers 5 answers with a BatchEncoding
        token_ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return token_ids

    try:
        prompt("?")
    except TemplateError as error:
        raise InvalidSettings(
            f"the tokenizer's chat template refuses these turns: {error}",
            hint="leave actor.task.system_text out: some templates have no system turn",
        ) from error
    return prompt
