"""Text from files, made fit for a terminal."""

from __future__ import annotations

import json
import re
from typing import Any

UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0 with ESC, C1 with the 8-bit control sequence introducer
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, line ends, what cannot be seen
    "\ud800-\udfff"  # bytes of a file name that are no text
    "\U000e0000-\U000e007f]"
)
"""Characters that a terminal obeys, cannot show, or cannot encode."""
_UNFIT_BUT_LINES = re.compile(rf"(?![\n\t]){UNFIT.pattern}")

_UNFIT_IN_STRING = re.compile(rf"(?![\n\ud800-\udfff]){UNFIT.pattern}")
"""Those that `json.dumps` leaves. A line end of its own is between strings; half a surrogate pair is no text."""


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text that a terminal shows and does not obey: control and direction characters become escapes such as `\x1b`.

    Args:
        text: whatever a file, a library or a user gave.
        lines: keep line ends and tabs.
    """
    return (_UNFIT_BUT_LINES if lines else UNFIT).sub(_escape, text)


def json_text(content: Any, **settings: Any) -> str:
    """`json.dumps` that escapes control and direction characters, and leaves all others as they are.

    Args:
        content: what becomes JSON.
        settings: of `json.dumps`.
    """
    text = json.dumps(content, ensure_ascii=False, **settings)
    return _UNFIT_IN_STRING.sub(lambda match: json.dumps(match[0])[1:-1], text)


def one_line(text: str, longest: int) -> str:
    """Text with its line ends as spaces, and an ellipsis for what is more than so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[:longest]}…"


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")
