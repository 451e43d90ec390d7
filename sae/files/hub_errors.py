"""Explanations of errors of the Hugging Face hub, each one line with a way out."""

from __future__ import annotations

import os
from collections.abc import Iterator

_LONGEST = 200
_LOCAL = {
    "data set": "a local file or folder, or 'stdlib'",
    "model": "a local folder, a .gguf file, or 'demo'",
    "dictionary": "a dictionary's folder",
}
"""What can be given instead."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or the error's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()[:_LONGEST]


def explain_hub_error(error: BaseException, repository: str, kind: str, setting: str) -> str:
    """Reason and way out for an error that a library raised while reading from the hub.

    Args:
        error: as raised; the errors that caused it are examined too.
        repository: name of the model or data set on the hub.
        kind: `model`, `data set` or `dictionary`.
        setting: section of the settings that names it, such as `model`; empty: it is named outside of them.
    """
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    local = _LOCAL[kind]
    revision = f"{setting}.revision" if setting else "what follows @"
    status = next((code for cause in chain if (code := _status(cause)) is not None), 0)
    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "TRUE", "YES")
    reasons = {
        f"access to {repository!r} is restricted on the hub: ask for it on its page, then set HF_TOKEN or run "
        "'hf auth login'": _is(chain, errors.GatedRepoError),
        f"the hub has {repository!r}, but not that revision: check {revision}": _is(
            chain, errors.RevisionNotFoundError
        ),
        f"neither a folder nor a file here, and the hub has no {kind} {repository!r} (or keeps it private: set "
        f"HF_TOKEN); check the name, or give {local}": _is(
            chain, errors.RepositoryNotFoundError, errors.HFValidationError
        )
        or (not offline and "DatasetNotFoundError" in {type(cause).__name__ for cause in chain}),
        f"neither a folder nor a file here, and not in the hub's cache {constants.HF_HOME!r}, with offline mode on "
        f"(HF_HUB_OFFLINE or HF_DATASETS_OFFLINE): unset it to download, or give {local}": offline
        or _is(chain, errors.OfflineModeIsEnabled),
        "the hub answers 'too many requests' (429): wait some minutes and run the same command again": status == 429,
        f"the hub refuses access to {repository!r} ({status}): set HF_TOKEN or run 'hf auth login'": status
        in (401, 403),
        f"the hub fails ({status}): wait some minutes and run the same command again": status >= 500,
        f"the hub at {constants.ENDPOINT} cannot be reached: check the network and run the same command again; "
        f"HF_HUB_OFFLINE=1 uses what was downloaded before, HF_ENDPOINT names a mirror; or give {local}": any(
            _is_network_error(cause) for cause in chain
        ),
        f"neither a folder nor a file here, and the hub did not give it ({first_line(error)}): check the name and the "
        f"network, or give {local}": True,
    }
    return next(reason for reason, holds in reasons.items() if holds)


def _is(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(cause, kinds) for cause in chain)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, followed by the errors that caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _is_network_error(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")
    library = type(error).__module__.split(".")[0]
    return library in libraries or isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError)
