"""Fetches files over HTTP(S) into a cache. A file is in the cache whole and checked, or not at all.

The cache is VIT_JAX_CACHE, or `vit_jax` in XDG_CACHE_HOME or in ~/.cache. A file's place in it is
its address: `storage.googleapis.com/vit_models/...`. It is fetched once; remove it to fetch it
again. With VIT_JAX_OFFLINE or HF_HUB_OFFLINE set (or --offline) nothing is fetched.
"""

import base64
import binascii
import hashlib
import http.client
import os
import queue
import re
import shutil
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import IO

from tqdm import tqdm

from vit_jax.config import InputError
from vit_jax.parallel.run_files import lock_file

TIMEOUT = 10.0  # seconds until the server answers, and between two pieces of what it sends
OFFLINE = ("VIT_JAX_OFFLINE", "HF_HUB_OFFLINE")
_CHUNK = 1 << 20


class NotPublicError(ConnectionError):
    """The server wants to know who asks. Some say so of files that don't exist, too."""


def cache_path(url: str) -> Path:
    """Where the file of an address is, or will be, in the cache."""
    folder = os.environ.get("VIT_JAX_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vit_jax"
    parts = urllib.parse.urlsplit(url)
    names = [parts.netloc, *parts.path.strip("/").split("/")]
    if not set(names).isdisjoint(("", ".", "..")):
        raise InputError(f"{url}: expected https://host/path/of/a/file")
    if parts.query:
        names[-1] += f"?{hashlib.sha256(parts.query.encode()).hexdigest()[:16]}"
    return Path(folder).expanduser().absolute().joinpath(*names)


def fetch(url: str) -> Path:
    """Returns the file of an address in the cache; downloads it if it isn't there.

    Several processes may call this at once: one downloads, the others wait. A transfer that breaks
    off is continued where it stopped, as long as each attempt brings something.

    Raises:
      FileNotFoundError: the server has no such file, or said so before when it can't be asked now.
      NotPublicError: the server wants to know who asks.
      ConnectionError: no answer, an incomplete or wrong one, or nothing may be fetched (offline).
      OSError: no space left, or the cache can't be written.
    """
    target = cache_path(url)
    if target.exists():
        return target
    missing, partial, lock = (Path(f"{target}.{end}") for end in ("missing", "partial", "lock"))
    try:
        if variable := next((name for name in OFFLINE if _is_set(name)), None):
            raise ConnectionError(f"offline, as --offline or {variable} says")
        with _opened_in_cache(lock) as locked:
            lock_file(locked, f"another process fetches {url}", wait=True)
            if not target.exists():
                _download(url, partial, target)
                missing.unlink(missing_ok=True)
    except FileNotFoundError:
        missing.touch()
        raise
    except ConnectionError as error:
        if missing.exists():
            raise FileNotFoundError(f"{url}: there was no such file when last asked") from error
        raise
    return target


def _opened_in_cache(file: Path) -> IO[str]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("a+")
    except OSError as error:
        raise OSError(
            f"{file.parent} can't be written ({error.strerror}): set VIT_JAX_CACHE to a folder "
            "that can"
        ) from error


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _download(url: str, partial: Path, target: Path) -> None:
    try:
        with partial.open("wb") as file:
            headers = _receive(url, file)
            file.flush()
            os.fsync(file.fileno())
        if known := _checksum(headers):
            algorithm, expected = known
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, algorithm).hexdigest()
            if found != expected:
                raise ConnectionError(f"its {algorithm} is {found}, the server says {expected}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _receive(url: str, file: IO[bytes]) -> Message:
    """Fills the file, with as many attempts as bring something. Returns the answer's headers."""
    tag, most = "", 0
    while True:
        try:
            return _transfer(url, file, tag)
        except _BrokenOff as error:
            if file.tell() <= most:
                raise
            tag, most = error.tag, file.tell()


class _BrokenOff(ConnectionError):
    """The transfer ended early; with the version's `tag` the rest of it can be asked for."""

    tag = ""


def _transfer(url: str, file: IO[bytes], tag: str) -> Message:
    """Writes what the server sends to the file, behind what is there if that is of version `tag`.

    Returns the answer's headers.
    """
    have = file.tell() if tag else 0
    with _opened(url, {"Range": f"bytes={have}-", "If-Range": tag} if have else {}) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise ConnectionError("the answer is a web page, such as a network's login")
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        length = answer.headers["Content-Length"]
        if length is None and not answer.chunked:
            raise ConnectionError("the server doesn't say how long the file is")
        total = have + int(length) if length else None
        free = shutil.disk_usage(Path(file.name).parent).free
        if total and total - have > free:
            raise OSError(
                f"{url} has {total / 1e6:,.0f} MB, its place {file.name} {free / 1e6:,.0f} MB "
                "free: set VIT_JAX_CACHE to a folder on another disk"
            )
        file.seek(have)
        file.truncate()
        try:
            for chunk in _shown(_pieces(answer), url, total, have):
                file.write(chunk)
            if total not in (None, file.tell()):
                raise _BrokenOff(f"it broke off after {file.tell():,} of {total:,} bytes")
        except _BrokenOff as error:
            etag = answer.headers["ETag"] or ""
            error.tag = "" if etag.startswith("W/") else etag
            raise
        return answer.headers


def _opened(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """The server's answer, within TIMEOUT in all: the system's resolver has no limit of its own."""
    request = urllib.request.Request(url, headers={"User-Agent": "vit_jax", **headers})
    answers = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT))
        except Exception as error:  # raised again below
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=TIMEOUT)
    except queue.Empty:
        raise ConnectionError(f"no answer in {TIMEOUT:g} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        kinds = {401: NotPublicError, 403: NotPublicError, 404: FileNotFoundError}
        kind = kinds.get(answer.code, ConnectionError)
        raise kind(f"{url}: the server answers {answer.code} {answer.reason}") from answer
    if isinstance(answer, OSError | http.client.HTTPException):
        raise ConnectionError(_problem(answer)) from answer
    if isinstance(answer, Exception):
        raise answer
    return answer


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the checksum that Hugging Face sends with the redirection to its storage."""

    def http_error_302(self, req, fp, code, msg, headers):
        answer = super().http_error_302(req, fp, code, msg, headers)
        if answer and (linked := headers["X-Linked-ETag"]) and not answer.headers["X-Linked-ETag"]:
            answer.headers["X-Linked-ETag"] = linked
        return answer

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _pieces(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := answer.read1(_CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOff(f"it broke off, {_problem(error)}") from error


def _problem(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return f"{type(reason).__name__}: {str(reason).strip()[:200]}"


def _shown(chunks: Iterator[bytes], url: str, total: int | None, have: int) -> Iterator[bytes]:
    """Passes the chunks on. Shows a bar in a terminal or notebook, elsewhere a line at each end."""
    name = url.rpartition("/")[2].partition("?")[0]
    bars = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not bars:
        size = f", {total / 1e6:,.1f} MB" if total else ""
        print(f"fetching {url}{size}", file=sys.stderr, flush=True)
    scale = {"unit": "B", "unit_scale": True, "unit_divisor": 1000, "dynamic_ncols": True}
    with tqdm(total=total, initial=have, desc=name, disable=not bars, **scale) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))
            have += len(chunk)
    if not bars and total in (None, have):
        print(f"fetched {name}", file=sys.stderr, flush=True)


def _checksum(headers: Message) -> tuple[str, str] | None:
    """(algorithm, hexadecimal digest) of the whole file, if the server says it.

    Google Cloud Storage has `x-goog-hash: crc32c=..., md5=BASE64`, Hugging Face the SHA-256 as the
    ETag of what it stores.
    """
    for etag in (headers["X-Linked-ETag"], headers["ETag"]):
        if etag and re.fullmatch("[0-9a-f]{64}", digest := etag.strip('"')):
            return "sha256", digest
    if match := re.search(r"\bmd5=([\w+/=]+)", ",".join(headers.get_all("x-goog-hash", ()))):
        try:
            return "md5", base64.b64decode(match[1], validate=True).hex()
        except binascii.Error as error:
            raise ConnectionError(f"x-goog-hash has the md5 {match[1]!r}") from error
    return None
