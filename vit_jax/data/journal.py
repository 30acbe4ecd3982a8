"""The journal of an unfinished dataset: its plan, then its finished shards."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.config import InputError
from vit_jax.data.write_plan import differences
from vit_jax.parallel.run_files import lock_file


class Journal:
    """Keeps the plan and the finished shards in the folder, so that a killed run can resume."""

    NAME = "journal.jsonl"

    def __init__(self, folder: Path, plan: Mapping[str, Any]):
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}  # {file: entry of a finished shard}
        self._file = open(folder / self.NAME, "a+b")  # noqa: SIM115 (closed by __exit__)
        lock_file(self._file, f"another process is writing {folder}")
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # a write that was cut off
            self._file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        if not lines:
            self._append(plan)
        begun = self._parse(lines[0], 1) if lines else plan
        if begun != plan:
            raise InputError(
                f"{folder} was begun from another input or with other options "
                f"({differences(begun, plan)}): remove the folder to begin again"
            )
        for number, line in enumerate(lines[1:], 2):
            shard = self._parse(line, number, "file")
            self.done[shard.pop("file")] = shard

    def _parse(self, line: bytes, number: int, *keys: str) -> dict[str, Any]:
        try:
            found = json.loads(line)
            if not isinstance(found, dict) or any(key not in found for key in keys):
                raise InputError("not an entry of a journal")
        except ValueError as error:
            raise InputError(
                f"{self._file.name}, line {number} is damaged ({error}): remove {self.folder} to "
                "begin again"
            ) from error
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def add(self, file: str, shard: dict[str, Any]) -> None:
        """Records a shard that is finished and has its final name."""
        self._append({"file": file, **shard})
        self.done[file] = shard

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
