"""Who does what: one file a claim, on a file system that all machines share.

Claim number n of a run is the file `NAME.n`, made with O_EXCL, so by one process alone; the highest
number holds. Its owner touches it as long as it lives. When it has not been touched for `lease`
seconds its owner is dead or cut off, and whoever first makes NAME.n+1 has the run. Nothing is ever
renamed or removed, so there is no moment at which two can win. Times are the file system's own.
"""

import dataclasses
import os
import socket
import sys
import threading
import uuid
from pathlib import Path

LEASE = 300.0  # seconds; a beat is due every sixth of it


@dataclasses.dataclass(frozen=True)
class Claim:
    """The newest claim of a run."""

    number: int
    age: float  # seconds since its owner last gave a sign of life
    released: bool  # given back, with what was done so far saved
    owner: str  # host:pid
    progress: str  # how far the run was when this owner took it


class Claims:
    """The claims in one folder, as one process sees them."""

    def __init__(self, folder: Path, lease: float = LEASE):
        self.folder, self.lease = folder, lease
        folder.mkdir(parents=True, exist_ok=True)
        self._clock = folder / ".clock"

    def newest(self, name: str) -> Claim | None:
        """The claim that holds, or the last one that did."""
        number = self._last(name)
        return self._read(name, number) if number else None

    def is_held(self, name: str) -> bool:
        """Whether somebody living has the run."""
        claim = self.newest(name)
        return claim is not None and self._is_alive(claim)

    def deaths(self, name: str) -> int:
        """How many owners of the run died in a row without getting any further."""
        last = self._last(name)
        claims = [self._read(name, number) for number in range(last, 0, -1)]
        count = 0
        for claim in claims[1:] if self.is_held(name) else claims:
            if claim.released or claim.progress != claims[0].progress:
                break
            count += 1
        return count

    def take(self, name: str, progress: str = "") -> "Held | None":
        """The run, unless another has it."""
        number = self._last(name)
        if number and self._is_alive(self._read(name, number)):
            return None
        path = self._path(name, number + 1)
        try:
            with path.open("x") as file:
                file.write(f"{socket.gethostname()}:{os.getpid()} {progress}")
        except FileExistsError:
            return None
        return Held(self, name, path)

    def _is_alive(self, claim: Claim) -> bool:
        return not claim.released and claim.age < self.lease

    def _last(self, name: str) -> int:
        return max((int(p.suffix[1:]) for p in self.folder.glob(f"{name}.[0-9]*")), default=0)

    def _read(self, name: str, number: int) -> Claim:
        path = self._path(name, number)
        touched = path.stat().st_mtime
        owner, _, progress = path.read_text().partition(" ")
        return Claim(number, self._now() - touched, touched == 0, owner or "?", progress)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _now(self) -> float:
        """The time by the file system's clock, which alone all machines share."""
        self._clock.touch()
        return self._clock.stat().st_mtime


class Held:
    """A claim that this process holds; beats in the background until it is left."""

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
        os.utime(self._path, (0, 0))  # released

    def _beat(self) -> None:
        number = int(self._path.suffix[1:])
        while not self._over.wait(self._claims.lease / 6):
            try:
                newest = self._claims.newest(self._name).number
                if newest == number:
                    os.utime(self._path)
            except OSError as error:  # of a network's file system; the next beat may come through
                print(f"no sign of life for {self._name}: {error}", file=sys.stderr)
                continue
            if newest != number:
                # This process stood still for longer than the lease. Another now writes into the
                # run's workdir, so it must not write one byte more: as if it had been killed.
                print(f"lost the claim on {self._name}: this process slept", file=sys.stderr)
                os._exit(1)


def write_atomically(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(text)
    partial.replace(path)
