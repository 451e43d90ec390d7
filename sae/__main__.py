"""Entry point of the command `sae`. Ctrl-C during imports or at exit leaves no stack trace."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


def main() -> None:
    """Import the command line and run it."""
    handles_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in `nohup sae … &`
    if handles_interrupts:
        signal.signal(signal.SIGINT, _leave)  # an exception could be lost in the code of modules being imported
    from sae.cli import main as cli

    try:
        if handles_interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main()
    except KeyboardInterrupt:  # before or after the part that `cli.main` guards
        os._exit(INTERRUPTED)
    finally:
        if handles_interrupts:
            signal.signal(signal.SIGINT, _end)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Exit: nothing has been opened yet."""
    os.write(2, b"interrupted before any work started\n")
    os._exit(INTERRUPTED)


def _end(signum: int, frame: FrameType | None) -> None:
    """Exit: everything is done and printed."""
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
