"""Objects on stores: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, http(s)://host/path. The home of obstore.

store     a place with a URL; credentials and endpoint come from the usual variables (AWS_ENDPOINT_URL, AWS_REGION,
          AWS_ACCESS_KEY_ID, AWS_ALLOW_HTTP, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, ...)
path      name of an object below that URL
range     up to 8 MiB of an object, asked for at once; what came is kept, and the next request goes on behind it
patience  when a request is made again, and when the object is given up (patience.py)

Network faults pass (5xx, 429, resets, short bodies, silence, a trickle): they are met with further requests at growing
random intervals until the deadline, then TransientFault (exit 75). Answers do not pass (401, 403, 404, other 4xx, a body
longer than asked, an object that is no longer the one first seen): EnvironmentFault (exit 3) at once, with the URL.

obstore keeps threads of its own, which do not survive a fork: use a store in the process that opened it.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import from_url

from data_pipeline.patience import PATIENCE, Pace, Passing, Patience, Stopped, Trials, Watch, first_line
from vitscale.base.credentials import masked
from vitscale.base.errors import EnvironmentFault, UsageError, VitscaleError

SCHEMES = ("s3", "gs", "az", "http", "https")
RANGE_BYTES = 8 << 20
PART_BYTES = 16 << 20
"""Size of the parts in which larger objects are written; more where S3's limit of 10,000 parts asks for it."""

_FAULTS = (BaseError, OSError, NotImplementedError)
_CREDENTIALS = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
    ),
    "gs": (
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_PATH",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_SKIP_SIGNATURE",
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The object as the store first described it."""

    size: int
    etag: str | None


def is_url(text: str) -> bool:
    """Whether the text names a place on a store rather than a local path."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def open_store(url: str, *, patience: Patience = PATIENCE) -> "Store":
    """A store, without a request. Raises UsageError for a URL that names none."""
    parts = urlsplit(url)
    if not is_url(url) or not parts.hostname:
        raise UsageError(f"expected a URL such as s3://bucket/prefix or https://host/path, got {masked(url)!r}")
    # A secret with a slash ends the host: KEY:SEC/RET@bucket.
    _, colon, port = parts.netloc.rpartition("@")[2].rpartition("]")[2].rpartition(":")
    has_odd_port = bool(colon) and not port.isdecimal()
    if parts.username or parts.password or parts.query or parts.fragment or has_odd_port:
        place = "" if has_odd_port else f" at {parts.hostname}{parts.path}"
        raise UsageError(
            f"expected a URL without user, query and fragment, got one{place}; "
            "credentials belong into the environment (AWS_ACCESS_KEY_ID and the like)"
        )
    return Store(url.rstrip("/"), patience=patience)


class Store:
    """The objects below one URL. Use from any thread, but only in the process that made it.

    An object is expected to stay as this store first saw it: its size and ETag are pinned until `write` or `delete`.
    """

    def __init__(self, url: str, *, patience: Patience) -> None:
        self.url = url
        self._scheme = url.partition("://")[0]
        self._patience = patience
        self._reader = self._connect(retries=0, request_s=patience.request_s)
        # Parts of a large object are retried one by one, which only obstore can do.
        self._writer = self._connect(retries=8, request_s=4 * patience.request_s)
        self._seen: dict[str, _Seen] = {}
        self._pace = Pace()

    def url_of(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def size(self, path: str) -> int:
        """Bytes of an object."""
        return self._look(path, stop=threading.Event()).size

    def read(self, path: str) -> bytes:
        """A whole object, as it is now."""
        self._seen.pop(path, None)
        return b"".join(self.chunks(path))

    def read_range(self, path: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer only where the object ends."""
        return b"".join(self.chunks(path, start=start, end=start + size))

    def chunks(
        self, path: str, *, start: int = 0, end: int | None = None, stop: threading.Event | None = None
    ) -> Iterator[bytes]:
        """The bytes [start, end) in pieces as they come; `end` None, or behind the end: to the end of the object.

        Raises Stopped soon after `stop` is set; else what the module says.
        """
        stop = stop or threading.Event()
        seen = self._look(path, stop=stop)
        end = seen.size if end is None else min(end, seen.size)
        trials = self._trials("read", path, size=max(0, end - start), stop=stop)
        at = start
        while at < end:
            until = min(at + RANGE_BYTES, end)
            with trials.next():
                for piece in self._range(path, seen, at, until, trickles=trials.trickles):
                    at += len(piece)
                    if at > until:
                        raise EnvironmentFault(
                            f"{self.url_of(path)} sent more bytes than the range asked for; check the store and its proxies"
                        )
                    trials.is_better()
                    yield piece
                    if stop.is_set():
                        raise Stopped
                if at < until:
                    raise Passing(f"a body ended {until - at} bytes early")

    def list(self, prefix: str) -> list[str]:
        """Sorted paths of all objects in the folder `prefix` ("": the whole store) and below. Not over http(s)."""
        trials = self._trials("read", prefix)
        while True:
            with trials.next():
                pages = obstore.list(self._reader, prefix or None)
                return sorted(entry["path"] for page in pages for entry in page)

    def write(self, path: str, content: bytes | Path) -> None:
        """Write an object: nobody ever sees a part of it. Large ones go up in parts (over http(s): in one request)."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        in_parts = size > PART_BYTES and not self._scheme.startswith("http")
        part = max(PART_BYTES, -(-size // 9_000))
        self._seen.pop(path, None)
        trials = self._trials("write", path, size=size)
        is_done = False
        while not is_done:
            with trials.next():
                obstore.put(self._writer, path, content, use_multipart=in_parts, chunk_size=part, max_concurrency=4)
                is_done = True

    def delete(self, path: str) -> None:
        """Delete an object; one that is not there is deleted already, where the store says so."""
        self._seen.pop(path, None)
        trials = self._trials("delete", path)
        is_done = False
        while not is_done:
            with trials.next():
                obstore.delete(self._writer, path)
                is_done = True

    # ---- one request --------------------------------------------------------------------------------------------

    def _connect(self, *, retries: int, request_s: float) -> Any:
        patience = self._patience
        options: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=patience.connect_s),
            "read_timeout": timedelta(seconds=patience.stall_s),
            "timeout": timedelta(seconds=request_s),
        }
        if self._scheme == "http" or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
            options["allow_http"] = True
        config: dict[str, Any] = {}
        if not _has_credentials(self._scheme):
            config["skip_signature"] = True
        try:
            return from_url(self.url, client_options=cast(Any, options), retry_config={"max_retries": retries}, **config)
        except (*_FAULTS, ValueError) as error:
            raise UsageError(f"{self.url} cannot be opened: {first_line(error)}; check the URL and the environment") from None

    def _look(self, path: str, *, stop: threading.Event) -> _Seen:
        """Size and ETag, asked once for each path."""
        trials = self._trials("read", path, stop=stop)
        while path not in self._seen:
            with trials.next():
                found = obstore.head(self._reader, path)
                self._seen[path] = _Seen(size=found["size"], etag=found["e_tag"])
        return self._seen[path]

    def _range(self, path: str, seen: _Seen, start: int, end: int, *, trickles: int) -> Iterator[bytes]:
        """One request. Raises Slow when the body trickles."""
        options: dict[str, Any] = {"range": (start, end)}
        if seen.etag and not seen.etag.startswith("W/"):  # a weak tag never matches (RFC 9110, 13.1.1)
            options["if_match"] = seen.etag
        answer = obstore.get(self._reader, path, options=cast(Any, options))
        found = _Seen(size=answer.meta["size"], etag=answer.meta["e_tag"])
        if found != seen:
            raise self._changed(path)
        watch = Watch(self._patience, self._pace, trickles=trickles)
        pieces = iter(answer.stream(min_chunk_size=1))
        while True:
            asked_at_s = time.monotonic()
            piece = next(pieces, None)
            if piece is None:
                watch.end()
                return
            waited_s = time.monotonic() - asked_at_s
            yield bytes(piece)
            watch.add(len(piece), waited_s)

    def _trials(self, verb: str, path: str, *, size: int = 0, stop: threading.Event | None = None) -> Trials:
        return Trials(
            f"{verb} {self.url_of(path)}",
            patience=self._patience,
            size=size,
            stop=stop or threading.Event(),
            faults=_FAULTS,
            verdict=lambda error: self._verdict(error, path, verb),
        )

    def _changed(self, path: str) -> EnvironmentFault:
        return EnvironmentFault(
            f"{self.url_of(path)} changed while it was read; expected the same object throughout, "
            "so let its writer finish, then start again"
        )

    def _verdict(self, error: BaseException, path: str, verb: str) -> VitscaleError | None:
        """What an error means; None: it may pass."""
        url = self.url_of(path)
        if isinstance(error, VitscaleError):
            return error
        if isinstance(error, PreconditionError):
            return self._changed(path)
        if isinstance(error, UnauthenticatedError | PermissionDeniedError):
            status = "401" if isinstance(error, UnauthenticatedError) else "403"
            unsigned = "" if _has_credentials(self._scheme) else f" (asked without credentials: {_hint(self._scheme)})"
            return EnvironmentFault(
                f"expected to {verb} {url}, but the store refuses access with {status}{unsigned}; "
                "check its credentials and permissions"
            )
        if isinstance(error, FileNotFoundError):
            return EnvironmentFault(f"expected an object at {url}, but the store has none (404); check the URL")
        if isinstance(error, NotImplementedError):
            return EnvironmentFault(f"expected to {verb} {url}, but {self._scheme}:// offers no way to do it")
        line = first_line(error)
        status_found = re.search(r"status code: (\d{3})", line)
        code = int(status_found[1]) if status_found else 0
        is_final = code == 501 or (300 <= code < 500 and code not in (408, 429))
        # Answers that no further request will change: another region's bucket, a server without ranges or lengths.
        if is_final or "redirect" in line or "Header missing" in line or "non-partial" in line.lower():
            return EnvironmentFault(f"expected to {verb} {url}, got: {line}; check the URL, its region and the store")
        return None


def _has_credentials(scheme: str) -> bool:
    return any(os.environ.get(name) for name in _CREDENTIALS.get(scheme, ())) if scheme in _CREDENTIALS else True


def _hint(scheme: str) -> str:
    names = _CREDENTIALS[scheme]
    return f"set {names[0]}, or {names[-1]}=false to use those of the machine"
