"""Contents of documents in; token ids out, in parts for long texts, with the tokens of a chat that count."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sae.errors import DataError
from sae.text.chat import ChatTemplate, Rendered
from sae.text.document import Chat, Content, LongText, TokenIds, essential
from sae.text.pieces import WHOLE, slices_of, token_parts

_WHOLE_AT_MOST = 4_000_000


@dataclass(frozen=True)
class TokenPart:
    """Tokens of a document, or some of them in order.

    Attributes:
        ids: token ids.
        counted: False for tokens of a chat's roles that do not count; None if all count.
    """

    ids: Int[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"] | None = None


class ContentTokenizer:
    """Converts texts, lists of ids and chats to tokens.

    Args:
        tokenizer: the model's.
        chat_roles: roles whose messages count in chats; None means all text of a chat.
        separator: the id that ends a document; a list of ids that ends with it already gets no second one.
        rows: number of tokens with an embedding in the model; None means all that the tokenizer names.
    """

    def __init__(
        self, tokenizer: Any, chat_roles: Collection[str] | None = None, separator: int | None = None,
        rows: int | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.chat_roles, self.separator, self.rows = tokenizer, chat_roles, separator, rows
        self._template: ChatTemplate | None = None

    def __call__(self, documents: Sequence[tuple[str, Content]]) -> list[Iterator[TokenPart]]:
        """The tokens of each (name, content), without special tokens. Short texts are tokenised together, immediately.

        Raises:
            DataError: an id is outside the vocabulary, a chat cannot be rendered, a long text cannot be cut, or the
                model has no embedding for a token; the last two are raised when parts are taken.
        """
        texts = [content for _, content in documents if isinstance(content, str) and len(content) <= WHOLE]
        short = iter(self._whole(texts))
        chats = iter(self._chats([(name, content) for name, content in documents if isinstance(content, Chat)]))
        document_parts: list[Iterator[TokenPart]] = []
        for name, content in documents:
            if isinstance(content, LongText) or (isinstance(content, str) and len(content) > WHOLE):
                parts = self._long(name, content)
            elif isinstance(content, TokenIds):
                parts = iter([self._checked(name, content)])
            else:
                parts = iter([next(chats if isinstance(content, Chat) else short)])
            document_parts.append(map(functools.partial(self._in_rows, name), parts))
        return document_parts

    def compared(self, content: TokenIds | Chat) -> str | TokenIds | Chat:
        """The form in which documents are compared: ids without special tokens at both ends; a chat's text.

        A chat that the template refuses is compared by the keys that templates read.
        """
        if isinstance(content, TokenIds):
            places = np.flatnonzero(~np.isin(content.ids, self._special_ids))
            return TokenIds(content.ids[places[0] : places[-1] + 1] if len(places) else content.ids[:0])
        try:
            self._template = self._template or ChatTemplate(self.tokenizer)
            return self._template.render(content, "").text
        except DataError:
            return essential(content)

    @functools.cached_property
    def _special_ids(self) -> list[int]:
        ids = {*getattr(self.tokenizer, "all_special_ids", ()), self.separator}
        return sorted(token for token in ids if token is not None)

    @functools.cached_property
    def _largest_id(self) -> int:
        """The largest id that the tokenizer names."""
        return max(self.tokenizer.get_vocab().values(), default=-1)

    def close(self) -> None:
        """End the process that renders chats, if there is one."""
        if self._template is not None:
            self._template.close()

    def _whole(self, texts: list[str]) -> list[TokenPart]:
        """The tokens of each text; fast tokenizers spread a batch over all cores."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [TokenPart(np.array(ids, dtype=np.int32)) for ids in encoded["input_ids"]]

    def _long(self, name: str, content: str | LongText) -> Iterator[TokenPart]:
        pieces = content.pieces() if isinstance(content, LongText) else slices_of(content)
        parts = map(TokenPart, token_parts(self.tokenizer, pieces, name))
        if isinstance(content, str) and len(content) <= _WHOLE_AT_MOST:
            try:
                parts = list(parts)
            except DataError:
                parts = self._whole([content])
        yield from parts

    def _checked(self, name: str, content: TokenIds) -> TokenPart:
        ids = content.ids
        if len(ids) and int(ids.max()) > self._largest_id:
            raise DataError(
                f"document {name!r}: its token id {int(ids.max()):,} is outside the vocabulary, which ends with "
                f"{self._largest_id:,}: the ids are another tokenizer's; give the text, or ids of the model's own"
            )
        return TokenPart(ids[:-1] if len(ids) and ids[-1] == self.separator else ids)

    def _in_rows(self, name: str, part: TokenPart) -> TokenPart:
        largest = int(part.ids.max(initial=-1))
        if self.rows is not None and largest >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"document {name!r}: it has the token {token!r} with the id {largest:,}, and the model has embeddings "
                f"of {self.rows:,} tokens; load the tokenizer that the model was trained with"
            )
        return part

    def _chats(self, chats: list[tuple[str, Chat]]) -> list[TokenPart]:
        if not chats:
            return []
        self._template = self._template or ChatTemplate(self.tokenizer)
        rendered = [self._template.render(chat, name, self.chat_roles) for name, chat in chats]
        if self.chat_roles is None:
            return self._whole([chat.text for chat in rendered])
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                "data.chat_roles: the tokenizer does not give the positions of its tokens, so roles cannot be told "
                "apart; set data.chat_roles=null"
            )
        encoded = self.tokenizer(
            [chat.text for chat in rendered],
            add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
        return [
            TokenPart(np.array(ids, dtype=np.int32), _within(chat, places))
            for chat, ids, places in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]


def _within(chat: Rendered, places: Iterable[tuple[int, int]]) -> Bool[np.ndarray, " tokens"]:
    """True for tokens in the chat's spans: some of their characters lie in one, and any others are spaces."""
    inside = np.zeros(len(chat.text), dtype=bool)
    for start, end in chat.spans:
        inside[start:end] = True
    foreign = ~inside & ~np.array([character.isspace() for character in chat.text], dtype=bool)
    bounds = np.array(list(places), dtype=np.int64).reshape(-1, 2)

    def count(marked: np.ndarray) -> np.ndarray:
        before = np.concatenate([[0], np.cumsum(marked)])
        return before[bounds[:, 1]] - before[bounds[:, 0]]

    return (count(inside) > 0) & (count(foreign) == 0)
