"""What token ids read as, for people who look at a group; no model is loaded."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from fastapi import Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from tokenizers import Tokenizer

from buffer.types import MAX_ITEMS, Record
from services.bodies import answer, read_record, wanted_media_type
from services.context import ServiceContext
from services.model_dir import local_model_dir
from services.operations import Operation

log = logging.getLogger(__name__)

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class TokenTextRequest(Record):
    """The body of POST /v1/token_texts."""

    token_ids: Annotated[list[TokenId], Field(max_length=MAX_ITEMS)]


class TokenTexts(Record):
    """One text per id, in the order asked for."""

    texts: list[str | None]
    """null for an id that the tokenizer does not have; all null where the service has no tokenizer."""


class TokenTextReader:
    """Reads ids with the tokenizer of a model directory; loaded at the first question."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = lru_cache(maxsize=1)(lambda: _load(model))

    def texts(self, token_ids: Sequence[int]) -> list[str | None]:
        """Return what each id reads as alone; a part of a character reads as the replacement character."""
        tokenizer = self._tokenizer()
        return [None if tokenizer is None else _text(tokenizer, token_id) for token_id in token_ids]


def token_text_operation(context: ServiceContext) -> Operation:
    """Return the operation that reads token ids."""

    async def token_texts(request: Request) -> Response:
        """Return what token ids read as."""
        wanted = wanted_media_type(request)
        asked = await read_record(request, TokenTextRequest, max_bytes=context.settings.max_body_bytes)
        return await run_in_threadpool(lambda: answer(TokenTexts(texts=context.token_texts(asked.token_ids)), wanted))

    return Operation(
        route="POST /v1/token_texts",
        endpoint=token_texts,
        body=TokenTextRequest,
        answers={200: TokenTexts},
        problems=(406, 413, 415, 422),
    )


def _load(model: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_file(str(local_model_dir(model) / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 the library raises no narrower type; without it no group could be looked at
        log.info("token ids are shown without their text: %s", error)
        return None


def _text(tokenizer: Tokenizer, token_id: int) -> str | None:
    token: str | None = tokenizer.id_to_token(token_id)
    if token is None or "▁" in token:  # SentencePiece's space, which decoding one token alone would drop
        return token and token.replace("▁", " ")
    text: str = tokenizer.decode([token_id], skip_special_tokens=False)
    return text
