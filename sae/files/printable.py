"""Text from files, made safe for a terminal."""

from __future__ import annotations

import json
import re
from typing import Any

UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0 with ESC, C1 with the 8-bit control sequence introducer
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, line ends, invisible
    "\ud800-\udfff"  # undecodable bytes of a file name
    "\U000e0000-\U000e007f]"
)
"""Characters that a terminal obeys, cannot show, or cannot encode."""
_UNFIT_BUT_LINES = re.compile(rf"(?![\n\t]){UNFIT.pattern}")

_UNFIT_IN_STRING = re.compile(rf"(?![\n\ud800-\udfff]){UNFIT.pattern}")
"""Those that `json.dumps` leaves. Its own line ends are between strings; half a surrogate pair is not text."""


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text that is safe to show in a terminal: control and direction characters become escapes such as `\x1b`.

    Args:
        text: from a file, a library or a user.
        lines: keep line ends and tabs.
    """
    return (_UNFIT_BUT_LINES if lines else UNFIT).sub(_escape, text)


def json_text(content: Any, **settings: Any) -> str:
    """`json.dumps` that escapes control and direction characters, and no others.

    Args:
        content: the object to serialise.
        settings: arguments of `json.dumps`.
    """
    text = json.dumps(content, ensure_ascii=False, **settings)
    return _UNFIT_IN_STRING.sub(lambda match: json.dumps(match[0])[1:-1], text)


def one_line(text: str, longest: int) -> str:
    """Text on one line, with an ellipsis after `longest` characters if there are more."""
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[:longest]}…"


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")
