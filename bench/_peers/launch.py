"""Run one engine for a few steps in a process of its own, with an environment equal for all."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


def default_extensions_dir(python: Path) -> Path:
    """Return where DeepSpeed's compiled operators live unless told otherwise: in its venv."""
    return python.parent.parent / "torch-extensions"


def run_worker(
    job: Mapping[str, Any],
    python: Path,
    *,
    timeout_s: float,
    wait_policy: str = "passive",
    extensions: Path | None = None,
    extra_env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `job` with the interpreter `python`; blocks until it is over.

    Returns what the worker measured, or {"error": one line} if it died, and never raises for that.
    """
    environment = worker_environment(job, python, wait_policy, extensions)
    environment.update(extra_env or {})
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        log = Path(scratch) / "log.txt"
        command = [str(python), str(WORKER), json.dumps(dict(job)), str(result)]
        with log.open("wb") as stream:
            try:
                done = subprocess.run(
                    command, env=environment, stdout=stream, stderr=stream, timeout=timeout_s
                )
            except subprocess.TimeoutExpired:
                return {"error": f"no result after {timeout_s:.0f} s"}
            except OSError as error:
                return {"error": f"{python} does not start: {error.strerror}"}
        if done.returncode == 0 and result.exists():
            measured: dict[str, Any] = json.loads(result.read_text())
            return measured
        text = log.read_text(errors="replace")
        print("\n".join(text.splitlines()[-25:]), file=sys.stderr, flush=True)
        return {"error": last_error(text, done.returncode)}


def worker_environment(
    job: Mapping[str, Any], python: Path, wait_policy: str, extensions: Path | None
) -> dict[str, str]:
    """Return this process's environment with everything set that could differ by accident."""
    environment = dict(os.environ)
    environment.update(
        OMP_NUM_THREADS=str(job["threads"]),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        PATH=f"{python.parent}{os.pathsep}{environment.get('PATH', '')}",  # DeepSpeed calls ninja
    )
    environment.pop("OMP_WAIT_POLICY", None)
    if wait_policy != "unset":
        environment["OMP_WAIT_POLICY"] = wait_policy
    if str(job["engine"]).startswith("deepspeed"):
        environment.update(deepspeed_environment(extensions or default_extensions_dir(python)))
    if job["engine"] == "deepspeed-hugepages":
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    return environment


def deepspeed_environment(extensions: Path) -> dict[str, str]:
    """Return what a single DeepSpeed process on the CPU accelerator wants to find."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def last_error(text: str, returncode: int) -> str:
    """Pick the line of a log that names the exception, or say how the process ended."""
    if returncode == -9:
        return "killed (signal 9), which is what running out of memory looks like"
    for line in reversed(text.replace("[rank0]: ", "").splitlines()):
        if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line):
            return line.strip()[:300]
    return f"exit status {returncode} without a message"
