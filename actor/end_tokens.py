"""Which tokens end a response: the same for every engine."""

import json
import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from actor.tokenizer import load_tokenizer
from buffer.errors import InvalidSettings

log = logging.getLogger(__name__)


def end_token_ids(model_dir: Path) -> tuple[int, ...]:
    """Return the tokenizer's end token and, ascending, those that generation_config.json names beside it.

    Chat models end a turn with another token than a text: <end_of_turn>, <|end|>. Raises InvalidSettings.
    """
    tokenizer = load_tokenizer(model_dir)
    first = eos_token_id(tokenizer)
    ids = (first, *sorted(_of_generation_config(model_dir) - {first}))
    log.info("responses end with %s", ", ".join(f"{tokenizer.convert_ids_to_tokens(id_)} ({id_})" for id_ in ids))
    return ids


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the end token. Raises InvalidSettings when the tokenizer has none."""
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise InvalidSettings(
            "the tokenizer names no end token, so that no response could stop",
            hint="set eos_token in its tokenizer_config.json",
        )
    return int(eos_id)


def _of_generation_config(model_dir: Path) -> set[int]:
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return set()
    try:
        named = json.loads(path.read_bytes()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InvalidSettings(f"{path} cannot be read: {error}") from error
    if named is None:
        return set()
    ids = named if isinstance(named, list) else [named]
    if not all(type(id_) is int for id_ in ids):
        raise InvalidSettings(f"{path} has eos_token_id {named!r}, which is neither an id nor a list of ids")
    return set(ids)
