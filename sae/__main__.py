"""Where the command `sae` begins and ends: Ctrl-C while modules are imported, or at exit, leaves no stack trace."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main() -> None:
    """Import the command line, and run it."""
    obeyed = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else ignored, as in `nohup sae … &`
    if obeyed:
        signal.signal(signal.SIGINT, _leave)  # an exception could be lost in the code of modules being imported
    from sae.cli import main as cli

    try:
        if obeyed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main()
    except KeyboardInterrupt:  # before or after what `cli.main` guards
        os._exit(INTERRUPTED)
    finally:
        if obeyed:
            signal.signal(signal.SIGINT, _end)


def _leave(signum: int, frame: FrameType | None) -> None:
    """End the process: nothing has been opened yet."""
    os.write(2, b"interrupted before anything was begun\n")
    os._exit(INTERRUPTED)


def _end(signum: int, frame: FrameType | None) -> None:
    """End the process: everything is done and said."""
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
