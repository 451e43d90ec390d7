"""A separate process that renders chats: a JSON line with a chat in, a JSON line with its text out.

Chat templates are programs that come with a model. Jinja's sandbox keeps them from files and the network. This process
limits their memory, and the waiting process (`sae.text.chat`) their time. It runs as a script and must not import the
package, whose libraries would take seconds and a gigabyte.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

_FIRST_LINE = ("template", "variables", "bytes")


def main() -> None:
    """Read the template and its variables from the first line, then render until the input ends."""
    del sys.path[0]  # this folder, whose files must not stand in for libraries
    answer = sys.stdout
    sys.stdout = sys.stderr
    template, variables, limit = map(json.loads(sys.stdin.readline()).get, _FIRST_LINE)
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = _FixedDate  # type: ignore[attr-defined]
    _limit_memory(limit)
    answer.write("{}\n")  # ready
    answer.flush()
    for line in sys.stdin:
        answer.write(json.dumps(_render(chat_template_utils, template, variables, json.loads(line))) + "\n")
        answer.flush()


class _FixedDate:
    """A fixed date for templates that print today's, so that a text is always the same. It is Llama 3's default."""

    @staticmethod
    def now() -> Any:
        from datetime import datetime

        return datetime(2024, 7, 26)


def _render(library: Any, template: str, variables: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, str]:
    try:
        texts, _ = library.render_jinja_template([messages], chat_template=template, **variables)
        return {"text": texts[0]}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself too often"}
    except Exception as error:  # templates can raise anything
        return {"error": " ".join(str(error).split())[:200] or type(error).__name__}


def _limit_memory(size: int) -> None:
    """Limit memory to `size` bytes more than is in use, if the system supports it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as pages:  # noqa: PTH123
            used = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + size, used + size))


if __name__ == "__main__":
    main()
