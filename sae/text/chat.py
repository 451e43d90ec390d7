"""Chats in; their text as the model's chat template renders it out, with the characters of each role."""

from __future__ import annotations

import contextlib
import json
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
        spans = self._by_marks(chat, text, where) or self._by_beginnings(chat, text, where)
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
        marks = [f"{_MARK}{number}{_MARK}" for number in range(len(chat.messages))]
        if _MARK in text:
            return None
        marked = [{**message, "content": mark} for message, mark in zip(chat.messages, marks, strict=True)]
        with contextlib.suppress(DataError):
            rest, place, spans = self._text(marked, where), 0, []
            for mark, message in zip(marks, chat.messages, strict=True):
                before, separator, rest = rest.partition(mark)
                content = message["content"]
                place += len(before)
                content = content if text.startswith(content, place) else content.strip()
                if not separator or mark in rest or not text.startswith(before, place - len(before)):
                    return None
                if not text.startswith(content, place):
                    return None
                spans.append((place, place + len(content)))
                place += len(content)
            return spans if text[place:] == rest else None
        return None

    def _by_beginnings(self, chat: Chat, text: str, where: str) -> list[tuple[int, int]] | None:
        """Spans found by adding one message after another, if the text before a message does not change."""
        spans, place = [], 0
        for count in range(1, len(chat.messages) + 1):
            try:
                beginning = text if count == len(chat.messages) else self._text(chat.messages[:count], where)
            except DataError:
                return None
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
        answer = self._ask(list(messages), where)
        if "error" in answer:
            raise DataError(f"chat {where!r}: the chat template refuses it ({answer['error']})")
        return answer["text"]

    def _ask(self, messages: list[dict[str, Any]], where: str) -> dict[str, str]:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(messages, default=str).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            pass  # the process has ended, and there is no line to read
        line, late = self._line(process, self._seconds)
        if not line.endswith(b"\n"):
            self.close()
            reason = f"took more than {self._seconds:g} s" if late else f"gives more than {_LARGEST_ANSWER >> 20} MB"
            reason = reason if late or line else "ended its process: it needs too much memory"
            raise DataError(f"chat {where!r}: the chat template {reason}; take another model, or chats as text")
        return json.loads(line)

    def _start(self) -> subprocess.Popen[bytes]:
        script = str(Path(__file__).with_name("chat_worker.py"))
        self._process = process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        first = {"template": self._template, "variables": self._variables, "bytes": _MEMORY}
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(first).encode() + b"\n")
            process.stdin.flush()
        if not self._line(process, _SECONDS_TO_START)[0]:
            self.close()
            raise DataError("the process that renders chats does not start; it needs jinja2 and the extra sae[lm]")
        return process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bool]:
        """The next line of the process's output, possibly incomplete, and whether it was killed for taking too long."""
        assert process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.start()
        line = process.stdout.readline(_LARGEST_ANSWER)
        timer.cancel()
        return line, late.is_set()
