"""Chats in; their text as the model's chat template renders it out, with the characters of each role."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import DataError
from sae.text.document import Chat

SECONDS_PER_CHAT = 10.0
_SECONDS_TO_START = 120.0
_MEMORY = 512 << 20
_LARGEST_ANSWER = 64 << 20
_MARK = "\ue000"
"""Begins and ends the placeholder for a content while its place is determined; a private-use character."""
_ANY_MARK = re.compile(f"{_MARK}[0-9]+{_MARK}")


@dataclass(frozen=True)
class Rendered:
    """A chat's text.

    Attributes:
        spans: character ranges of the contents whose roles count, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A model's chat template, rendered in a separate process that is ended if it takes too long.

    Args:
        tokenizer: the model's.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, seconds: float = SECONDS_PER_CHAT) -> None:
        try:
            self._template = tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:
            raise DataError(
                "the column holds chats, and the model's tokenizer has no chat template: take a chat model, or give "
                "the chats as text"
            ) from error
        self._variables = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if token is not None}
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, chat: Chat, where: str, roles: Collection[str] | None = None) -> Rendered:
        """The chat's text, with the spans of the contents of `roles`; if None, one span covers the whole text.

        Raises:
            DataError: the template refuses the chat, takes too long or too much memory, or changes contents so that
                roles cannot be told apart.
        """
        text = self._text(chat.messages, where)
        if roles is None:
            return Rendered(text, ((0, len(text)),))
        spans = None
        for find in (self._by_marks, self._by_beginnings):
            with contextlib.suppress(DataError):  # the template refuses other contents, or fewer messages
                spans = spans or find(chat, text, where)
        if spans is None:
            raise DataError(
                f"chat {where!r}: the chat template changes the messages, so that their roles cannot be told apart in "
                "the text; set data.chat_roles=null, so that all of them count"
            )
        chosen = [span for span, message in zip(spans, chat.messages, strict=True) if message["role"] in roles]
        return Rendered(text, tuple(chosen))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _by_marks(self, chat: Chat, text: str, where: str) -> list[tuple[int, int]] | None:
        """Spans found by rendering marks instead of the contents, and checked against the real text."""
        if _MARK in text:
            return None
        marks = [f"{_MARK}{number}{_MARK}" for number in range(len(chat.messages))]
        marked = [{**message, "content": mark} for message, mark in zip(chat.messages, marks, strict=True)]
        rendered = self._text(marked, where)
        if _ANY_MARK.findall(rendered) != marks:
            return None
        *parts, end = _ANY_MARK.split(rendered)
        place, spans = 0, []
        for before, message in zip(parts, chat.messages, strict=True):
            start, content = place + len(before), message["content"]
            content = content if text.startswith(content, start) else content.strip()
            if not text.startswith(before + content, place):
                return None
            place = start + len(content)
            spans.append((start, place))
        return spans if text[place:] == end else None

    def _by_beginnings(self, chat: Chat, text: str, where: str) -> list[tuple[int, int]] | None:
        """Spans found by adding one message after another, if the text before a message does not change."""
        spans, place = [], 0
        for count in range(1, len(chat.messages) + 1):
            beginning = text if count == len(chat.messages) else self._text(chat.messages[:count], where)
            if not text.startswith(beginning) or len(beginning) < place:
                return None
            content = chat.messages[count - 1]["content"].strip()
            start = text.find(content, place, len(beginning)) if content else place
            if start < 0:
                return None
            spans.append((start, start + len(content)))
            place = len(beginning)
        return spans

    def _text(self, messages: Sequence[dict[str, Any]], where: str) -> str:
        line, late = self._answer(self._process or self._start(), messages, self._seconds)
        if not line.endswith(b"\n"):
            self.close()
            reason = f"took more than {self._seconds:g} s" if late else f"gives more than {_LARGEST_ANSWER >> 20} MB"
            reason = reason if late or line else "ended its process: it needs too much memory"
            raise DataError(f"chat {where!r}: the chat template {reason}; take another model, or chats as text")
        answer = json.loads(line)
        if "error" in answer:
            raise DataError(f"chat {where!r}: the chat template refuses it ({answer['error']})")
        return answer["text"]

    def _start(self) -> subprocess.Popen[bytes]:
        script = str(Path(__file__).with_name("chat_worker.py"))
        self._process = process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        first = {"template": self._template, "variables": self._variables, "bytes": _MEMORY}
        if not self._answer(process, first, _SECONDS_TO_START)[0]:
            self.close()
            raise DataError("the process that renders chats does not start; it needs jinja2 and the extra sae[lm]")
        return process

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], message: object, seconds: float) -> tuple[bytes, bool]:
        """The process's answer, possibly an incomplete line, and whether it was killed for taking too long."""
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):  # the process has ended, and there is no line to read
            process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            process.stdin.flush()
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.start()
        line = process.stdout.readline(_LARGEST_ANSWER)
        timer.cancel()
        return line, late.is_set()
