"""Files from the network: several addresses, resumed after interruptions, checked, never half there."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3

from memvir.errors import UserError
from memvir.files import extendable, file_hash, write_json
from memvir.progress import Counter, size

log = logging.getLogger("memvir")

WAITS: Sequence[float] = (1, 4, 15, 60)
"""Seconds before each further try of an address that broke off or was busy; any new byte starts the count again."""
TIMEOUT = (15.0, 60.0)
"""Seconds to connect, and to wait for the next byte."""
CHUNK = 2**16
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be different a moment later."""


class DownloadError(UserError):
    """No address gave the file; `answers` says what each one did."""

    def __init__(self, what: str, answers: list[tuple[str, str]]) -> None:
        self.answers = answers
        tried = "; ".join(f"{address}: {answer}" for address, answer in answers) or "there is no address to try"
        super().__init__(f"{what} could not be downloaded. Tried: {tried}")


class _Refused(Exception):
    """This address will not give the file."""


class _BrokeOff(Exception):
    """This address may give the rest of the file at another try."""


class _Stale(_BrokeOff):
    """What is there so far does not fit the server's file any more."""


def fetch(addresses: Sequence[str], target: Path, *, algorithm: str, digest: str | None, what: str) -> str:
    """Download a file from the first address that gives it.

    An interrupted download goes on where it stopped, in this call or a later one, if the server can do that and still
    has the same file. `target` appears only when it is complete and its checksum is right.

    Args:
        addresses: http or https, tried in order.
        algorithm: name of the checksum for hashlib, such as "md5".
        digest: the expected checksum in hexadecimal or the start of it; None: unknown, the caller checks.
        what: the file as messages name it.

    Returns:
        The address used; str(target) if the file was there already and its checksum is right.

    Raises:
        DownloadError: no address gave it; names each and its answer.
    """
    digest = digest.lower() if digest else None
    if digest and target.is_file() and file_hash(target, algorithm).startswith(digest):
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    answers = []
    for address in addresses:
        try:
            _fetch(address, target, algorithm, digest, what)
        except _Refused as refusal:
            answers.append((address, str(refusal)))
            log.info("%s: %s: %s", what, address, refusal)
        else:
            return address
    raise DownloadError(what, answers)


def _fetch(address: str, target: Path, algorithm: str, digest: str | None, what: str) -> None:
    if urlsplit(address).scheme not in ("http", "https"):
        raise _Refused("is not an http or https address")
    # each address has a part of its own: another server's file need not be the same
    name = extendable(target.name)
    part = target.with_name(f"{name}.{hashlib.sha256(address.encode()).hexdigest()[:8]}.part")
    note = part.with_name(part.name + ".json")
    resumed = _get(address, part, note, what)
    if digest and not (found := file_hash(part, algorithm)).startswith(digest):
        _remove(part, note)
        if resumed:  # perhaps the file changed between the two halves; the whole is worth one more try
            log.info("%s: %s: the resumed file has the wrong %s, starting again", what, address, algorithm)
            _get(address, part, note, what)
            found = file_hash(part, algorithm)
        if not found.startswith(digest):
            _remove(part, note)
            raise _Refused(f"gave a file with {algorithm} {found[: max(len(digest), 8)]}, expected {digest}")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    for left in target.parent.glob(f"{glob.escape(name)}.*.part*"):
        left.unlink(missing_ok=True)


def _get(address: str, part: Path, note: Path, what: str) -> bool:
    """Fill `part` completely, over as many connections as it takes; returns whether more than one took part."""
    resumed = part.exists()
    furthest, tries = _length(part), 0
    while True:
        try:
            _get_rest(address, part, note, what)
            return resumed
        except _BrokeOff as broken:
            if isinstance(broken, _Stale):
                _remove(part, note)
            if _length(part) > furthest:
                furthest, tries = _length(part), 0
            if tries == len(WAITS):
                raise _Refused(f"{broken} ({tries + 1} tries)") from None
            log.info("%s: %s: %s, trying again in %g s", what, address, broken, WAITS[tries])
            time.sleep(WAITS[tries])
            tries += 1
            resumed = True


def _get_rest(address: str, part: Path, note: Path, what: str) -> None:
    start, known = _length(part), _read_note(note)
    if start and known is None:
        _remove(part, note)
        start = 0
    if start and known and start == known["length"]:
        return
    headers = {"User-Agent": "memvir", "Accept-Encoding": "identity"}  # compressed on the way, lengths would not match
    if start and known:
        headers["Range"] = f"bytes={start}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    try:
        with requests.get(address, headers=headers, stream=True, timeout=TIMEOUT) as response:
            total = _check(response, start, known)
            if response.status_code != 206:
                start = 0  # a new file, a changed one, or a server that cannot resume
                _remove(part, note)
                write_json(note, {"address": address, "validator": _validator(response), "length": total})
            _check_room(part, total, start)
            _save(response, part, start, total, what)
    except requests.Timeout:
        raise _BrokeOff("did not answer in time") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.TooManyRedirects) as error:
        raise _Refused(_reason(error)) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _BrokeOff(_reason(error)) from None


def _check(response: requests.Response, start: int, known: dict | None) -> int | None:
    """Whether this is the answer asked for; returns the length of the complete file if the server says it."""
    status = f"answered {response.status_code} {response.reason}".rstrip()
    if response.status_code in BUSY:
        raise _BrokeOff(status)
    if response.status_code == 416 or (response.status_code == 206 and not _continues(response, start, known)):
        raise _Stale(status)
    if response.status_code not in (200, 206):
        raise _Refused(status)
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise _Refused("answered with a web page instead of a file (it may want a login or a click)")
    length = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        length = response.headers["Content-Range"].rpartition("/")[2]
    return int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None


def _continues(response: requests.Response, start: int, known: dict | None) -> bool:
    found = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
    if not found or int(found[1]) != start or known is None:
        return False
    same_length = found[2] == "*" or known["length"] in (None, int(found[2]))
    return same_length and known["validator"] == _validator(response)


def _save(response: requests.Response, part: Path, start: int, total: int | None, what: str) -> None:
    done = start
    try:
        with part.open("ab") as file, Counter(f"downloading {what}", total, "B", start) as counter:
            # raw: a .tgz that the server calls "Content-Encoding: gzip" must stay as it is
            while chunk := response.raw.read1(CHUNK, decode_content=False):
                file.write(chunk)
                done += len(chunk)
                counter.add(len(chunk))
    except OSError as error:  # the file's; urllib3 wraps those of the network
        needed = f"; {what} needs {size(total)}" if total else ""
        raise UserError(f"{part}: {error.strerror}{needed}") from None
    if total is not None and done != total:
        raise _BrokeOff(f"broke off after {done:,} of {total:,} bytes")


def _check_room(part: Path, total: int | None, start: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        raise UserError(f"{part}: needs {size(total - start)} and the disk has {size(free)} free; free some space")


def _validator(response: requests.Response) -> str | None:
    """What tells this version of the file from another: a strong ETag, else the date."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _read_note(note: Path) -> dict | None:
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        return {"validator": content["validator"], "length": content["length"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _reason(error: Exception) -> str:
    """The innermost cause: requests and urllib3 wrap it three deep, with object addresses in the text."""
    cause: BaseException = error
    while True:
        inner = getattr(cause, "reason", None) or next((a for a in cause.args if isinstance(a, BaseException)), None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    text = re.sub(r"<[^>]*>:? ?", "", " ".join(str(cause).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
