"""Who does what: one file a claim, on a file system that all machines share.

Claim number n of a run is the file `NAME.n`, made with O_EXCL, so by one process alone; the highest
number holds. Its owner touches it as long as it lives. When it has not been touched for `lease`
seconds its owner is dead or cut off, and whoever first makes NAME.n+1 has the run. Nothing is ever
renamed or removed, so there is no moment at which two can win. Times are the file system's own.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
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


class Claims:
    """The claims in one folder, as one process sees them."""

    def __init__(self, folder: Path, lease: float = LEASE):
        self.folder, self.lease = folder, lease
        folder.mkdir(parents=True, exist_ok=True)
        self._clock = folder / f".clock-{socket.gethostname()}-{os.getpid()}"

    def newest(self, name: str) -> Claim | None:
        """The claim that holds, or the last one that did."""
        numbers = [int(p.suffix[1:]) for p in self.folder.glob(f"{_escaped(name)}.[0-9]*")]
        if not numbers:
            return None
        path = self._path(name, max(numbers))
        touched = path.stat().st_mtime
        owner = path.read_text() or "?"
        return Claim(max(numbers), self._now() - touched, touched == 0, owner)

    def is_held(self, name: str) -> bool:
        """Whether somebody living has the run."""
        claim = self.newest(name)
        return claim is not None and not claim.released and claim.age < self.lease

    def deaths(self, name: str) -> int:
        """How many owners of the run died over it."""
        paths = [p for p in self.folder.glob(f"{_escaped(name)}.[0-9]*") if p.stat().st_mtime]
        return len(paths) - self.is_held(name)

    def take(self, name: str) -> "Held | None":
        """The run, unless another has it."""
        if self.is_held(name):
            return None
        newest = self.newest(name)
        path = self._path(name, newest.number + 1 if newest else 1)
        try:
            with path.open("x") as file:
                file.write(f"{socket.gethostname()}:{os.getpid()}")
        except FileExistsError:
            return None
        return Held(self, name, path)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _now(self) -> float:
        """The time by the file system's clock, which alone all machines share."""
        self._clock.touch()
        return self._clock.stat().st_mtime

    def close(self) -> None:
        self._clock.unlink(missing_ok=True)


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
            if self._claims.newest(self._name).number != number:
                # This process stood still for longer than the lease. Another now writes into the
                # run's workdir, so it must not write one byte more: as if it had been killed.
                print(f"lost the claim on {self._name}: this process slept", file=sys.stderr)
                os._exit(1)
            os.utime(self._path)


def write_atomically(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(text)
    partial.replace(path)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def wait(seconds: float) -> None:
    """A seam for tests."""
    time.sleep(seconds)
