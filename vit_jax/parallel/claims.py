"""Distributes runs over processes with claim files on a shared file system or in a bucket.

Claim n of a run is the file `NAME.n`, created with O_EXCL, in a bucket on the condition that it
isn't there, so only one process succeeds. The highest number is valid. Its owner touches the file
while it lives. A claim that hasn't been touched for `lease` seconds has expired, and the first
process to create NAME.n+1 takes over. The claim of a process of this machine that has ended expires
at once. Files are never renamed or removed, so two processes can't both win. Times are those of the
file system. In a bucket a touch writes the object again, and a claim that is given back is empty.
"""

import dataclasses
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

LEASE = 300.0  # seconds; the heartbeat is a sixth of it


@dataclasses.dataclass(frozen=True)
class Claim:
    """The newest claim of a run."""

    number: int
    age: float  # seconds since the last heartbeat
    released: bool  # given back after saving
    owner: str  # host:pid
    kernel: str  # tells where the pid is known, see `_kernel`
    progress: str  # step of the run when this owner claimed it

    @property
    def is_here(self) -> bool:
        """Whether the owner is known to be a process of this machine."""
        return bool(self.kernel) and self.kernel == _kernel()


class Claims:
    """The claims in one folder."""

    def __init__(self, folder: Path, lease: float = LEASE):
        self.folder, self.lease = folder, lease
        folder.mkdir(parents=True, exist_ok=True)
        self._clock = folder / ".clock"
        self._compared = self._ahead = 0.0  # with a bucket's time: when, and how far it was ahead

    def newest(self, name: str) -> Claim | None:
        """Returns the newest claim, valid or expired; None without one."""
        number = self._last(name)
        return self._read(name, number) if number else None

    def is_held(self, name: str) -> bool:
        """Whether a live process has claimed the run."""
        claim = self.newest(name)
        return claim is not None and self._is_alive(claim)

    def deaths(self, name: str) -> int:
        """Counts consecutive owners that died without progress."""
        last = self._last(name)
        claims = [self._read(name, number) for number in range(last, 0, -1)]
        count = 0
        for claim in claims[1:] if self.is_held(name) else claims:
            if claim.released or claim.progress != claims[0].progress:
                break
            count += 1
        return count

    def take(self, name: str, progress: str = "") -> "Held | None":
        """Claims the run; returns None if another process holds it."""
        number = self._last(name)
        if number and self._is_alive(self._read(name, number)):
            return None
        path = self._path(name, number + 1)
        try:
            process = f"{socket.gethostname()}:{os.getpid()}@{_kernel()}@{uuid.uuid4().hex}"
            _create(path, f"{process} {progress}")
        except FileExistsError:
            return None
        return Held(self, name, path)

    def _is_alive(self, claim: Claim) -> bool:
        return not claim.released and claim.age < self.lease and not _has_ended(claim)

    def _last(self, name: str) -> int:
        return max((int(p.suffix[1:]) for p in self.folder.glob(f"{name}.[0-9]*")), default=0)

    def _read(self, name: str, number: int) -> Claim:
        path = self._path(name, number)
        found = path.stat()
        touched = found.st_mtime if isinstance(path, Path) or found.st_size else 0
        process, _, progress = path.read_text().partition(" ")
        owner, kernel, *_ = (*process.split("@"), "")
        return Claim(number, self._now() - touched, touched == 0, owner or "?", kernel, progress)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _now(self) -> float:
        """Returns the file system's time, which all machines share."""
        if isinstance(self._clock, Path):
            self._clock.touch()
            return self._clock.stat().st_mtime
        now = time.time()
        if now - self._compared > self.lease / 12:  # a bucket lets nobody write one object often
            self._clock.write_bytes(b"")
            self._ahead, self._compared = self._clock.stat().st_mtime - now, now
        return now + self._ahead


def _create(path: Path, text: str) -> None:
    """Writes a file that isn't there; FileExistsError if it is."""
    if not isinstance(path, Path):
        path.create(text.encode())
        return
    with path.open("x") as file:
        file.write(text)


def _touch(path: Path) -> None:
    os.utime(path) if isinstance(path, Path) else path.write_bytes(path.read_bytes())


def _release(path: Path) -> None:
    os.utime(path, (0, 0)) if isinstance(path, Path) else path.write_bytes(b"")


def _kernel() -> str:
    """Identifies this boot of this machine and the namespace of its pids; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _has_ended(claim: Claim) -> bool:
    """Whether the owner is known to be gone: only this machine's pids tell."""
    if not claim.is_here:
        return False
    try:
        os.kill(int(claim.owner.rpartition(":")[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is another user's
        return False
    return False


class Held:
    """A claim of this process, as a context manager with a background heartbeat."""

    def __init__(self, claims: Claims, name: str, path: Path):
        self._claims, self._name, self._path = claims, name, path
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Held":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        _release(self._path)

    def _beat(self) -> None:
        number = int(self._path.suffix[1:])
        renewed = time.monotonic()
        while not self._over.wait(self._claims.lease / 6):
            try:
                newest = self._claims.newest(self._name).number
                if newest == number and not self._is_over(renewed):
                    _touch(self._path)
                    renewed = time.monotonic()
            except OSError as error:  # a network file system's; the next may succeed
                print(f"no heartbeat for {self._name}: {error}", file=sys.stderr)
                newest = number
            if newest != number or self._is_over(renewed):
                # This process was suspended, or cut off, for longer than the lease. Another process
                # now writes to the run's workdir, so this one must end at once without writing.
                print(f"lost the claim on {self._name}: process was suspended", file=sys.stderr)
                os._exit(1)

    def _is_over(self, renewed: float) -> bool:
        """Whether others in a bucket may take over; mounted file systems make writers wait."""
        over = time.monotonic() - renewed > self._claims.lease
        return over and not isinstance(self._path, Path)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file as a whole; unlike `run_files.write_whole`, several processes may at once."""
    if not isinstance(path, Path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(text)
    partial.replace(path)
