"""Start and talk to io_worker.py processes, each in the interpreter of its engine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from launch import last_error, worker_environment

WORKER = Path(__file__).with_name("io_worker.py")


class IoWorker:
    """One contender's process. Raises RuntimeError with its last error where it has died."""

    def __init__(
        self, job: dict[str, Any], python: Path, extensions: Path | None, num_threads: int
    ) -> None:
        environment = worker_environment(
            {"engine": job["engine"], "threads": num_threads}, python, "passive", extensions
        )
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  lives as long
        self._process = subprocess.Popen(
            [str(python), str(WORKER), json.dumps(job)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.about = self._answer()

    def run(self, test: str, nbytes: int, settings: dict[str, Any]) -> dict[str, float]:
        """Move `nbytes`; blocks until it is done."""
        if self._process.stdin is None:
            raise RuntimeError("the worker has no stdin")
        request = {"test": test, "nbytes": nbytes, **settings}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: _answer says of what
        return self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            answer: dict[str, float] = json.loads(line)
            return answer
        status = self._process.wait()
        self._log.seek(0)
        text = self._log.read()
        print("\n".join(text.splitlines()[-25:]), file=sys.stderr, flush=True)
        raise RuntimeError(last_error(text, status))

    def __enter__(self) -> IoWorker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()  # ends its loop
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
