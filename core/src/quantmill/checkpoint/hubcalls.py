"""Calls to a Hub through ``huggingface_hub``: streamed answers, further attempts, typed errors."""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from quantmill.checkpoint import codes
from quantmill.findings import QuantmillError

__all__ = ["PAUSES", "HubError", "attempt", "stream", "take"]

T = TypeVar("T")

PAUSES: tuple[float, ...] = (0.5, 2.0)
"""Seconds before each further attempt, where an error may pass."""
_CHUNK: Final = 64 << 10
_PASSING_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
# By name: huggingface_hub spoke through requests, then httpx, then httpx2, and none of the three
# is a dependency of ours.
_PASSING: Final = frozenset(
    {"TransportError", "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError"}
)
_TOKEN: Final = "a private or gated repository needs a token: set HF_TOKEN or log in"


class HubError(QuantmillError):
    """The Hub, the network or the cache is at fault, not the checkpoint."""


@contextlib.contextmanager
def stream(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterable[bytes]]]:
    """A response whose body is not read yet; leaving closes it, read or not."""
    from huggingface_hub import constants, get_session

    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):  # httpx
        with session.stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=True
        ) as response:
            yield response, response.iter_bytes()
    else:  # requests, in huggingface_hub before 1.0
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(_CHUNK)


def take(chunks: Iterable[bytes], skip: int, count: int) -> bytes:
    """``count`` bytes after the first ``skip``; no more of the stream is consumed."""
    kept = bytearray()
    for chunk in chunks:
        kept += chunk[skip:]
        skip = max(0, skip - len(chunk))
        if len(kept) >= count:
            break
    return bytes(kept[:count])


def attempt(call: Callable[[], T], where: str, pauses: tuple[float, ...] | None = None) -> T:
    """What a call to the Hub gives, after further attempts where an error may pass.

    Raises:
        HubError: the last error, typed.
    """
    for pause in PAUSES if pauses is None else pauses:
        try:
            return call()
        except HubError:
            raise
        except Exception as error:
            if not _may_pass(error):
                raise _typed(error, where) from error
        time.sleep(pause)
    try:
        return call()
    except HubError:
        raise
    except Exception as error:
        raise _typed(error, where) from error


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if status is not None:
        return status in _PASSING_STATUS
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & _PASSING) and not isinstance(error, OfflineModeIsEnabled)


def _typed(error: BaseException, where: str) -> HubError:
    """The finding for whatever huggingface_hub or its HTTP client raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _typed(error.__cause__, where)  # It only says that the cache is no way out.
    status = _status(error)
    # Queries of redirected addresses hold signatures.
    text = re.sub(r"\?\S+", "?...", " ".join(str(error).split()))[:300]
    said = f"{type(error).__name__}: {text}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        cause = "the network is switched off (HF_HUB_OFFLINE) and the local cache lacks it"
        fix = "unset HF_HUB_OFFLINE, or download it where there is a network"
        return HubError(codes.HUB_OFFLINE(where, cause, fix))
    if isinstance(error, errors.HFValidationError):
        return HubError(codes.BAD_SPEC(where, text, "a Hub id has the form org/name@revision"))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause = "the disk of the Hub's cache is full"
        return HubError(codes.DISK_FULL(where, cause, "free space, or set HF_HOME to another disk"))
    missing = isinstance(error, errors.RepositoryNotFoundError | errors.EntryNotFoundError)
    if isinstance(error, errors.GatedRepoError | errors.DisabledRepoError) or status == 403:
        return HubError(codes.HUB_DENIED(where, said, f"ask for access at the Hub; {_TOKEN}"))
    if isinstance(error, errors.RevisionNotFoundError):
        cause = "the repository has no such branch, tag or commit"
        return HubError(codes.HUB_NOT_FOUND(where, cause, "check what follows the @"))
    if missing or status == 404:
        cause = "the Hub has no such repository or file, or hides it"
        fix = f"check the name (there is no local folder of this name either); {_TOKEN}"
        return HubError(codes.HUB_NOT_FOUND(where, cause, fix))
    if status == 401:
        return HubError(codes.HUB_DENIED(where, said, f"check the token; {_TOKEN}"))
    if status == 416:
        fix = "try again; the file and its listing are of different versions"
        return HubError(codes.HUB_RANGE(where, said, fix))
    if any("Timeout" in kind.__name__ for kind in type(error).__mro__):
        said = f"it did not answer in time ({said})"
    return HubError(
        codes.HUB_FAILED(
            where,
            f"the Hub cannot be reached: {said}",
            "check the name, where a local folder is meant: there is none of it; else the network,"
            " HF_ENDPOINT and the proxy; HF_HUB_OFFLINE=1 uses the local cache",
        )
    )
