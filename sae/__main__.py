"""Where the command `sae` begins: Ctrl-C while its modules are imported ends it as quietly as later."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main() -> None:
    """Import the command line, and run it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as in `nohup sae … &`
        from sae import cli
    else:
        signal.signal(signal.SIGINT, _leave)  # an exception could be lost in the code of modules being imported
        from sae import cli

        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli.main()
    except KeyboardInterrupt:  # before or after what `cli.main` guards
        _leave(signal.SIGINT, None)


def _leave(signum: int, frame: FrameType | None) -> None:
    """End the process: nothing has been opened yet."""
    os.write(2, b"interrupted before anything was begun\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
