#!/usr/bin/env python3
"""Train one engine for a few steps and write what it took as JSON: worker.py JOB_JSON RESULT_PATH.

Started by launch.py, in the interpreter of the engine. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

ENGINE_MODULES = {
    "torch": "engine_torch",
    "torch-keep": "engine_torch",
    "offload": "engine_offload",
    "offload-plain": "engine_offload",
    "offload-pinned": "engine_offload",
    "deepspeed": "engine_deepspeed",
    "deepspeed-hugepages": "engine_deepspeed",
}


class Trainer(Protocol):
    """What an engine module's `start(job)` returns."""

    num_params: int

    def forward(self, tokens: Any) -> Any:
        """Return the loss of int64 tokens [batch, seq] as a scalar that backward accepts."""

    def backward(self, loss: Any) -> None:
        """Compute the gradients."""

    def update(self) -> None:
        """Step the optimizer and clear the gradients."""

    def finish(self) -> None:
        """Block until no work of earlier steps is pending."""

    def close(self) -> dict[str, str]:
        """Release everything; return versions and remarks for the result."""


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["engine"] == "disk":
        from disk_probe import probe_disk

        outcome = probe_disk(Path(job["dir"]), job["num_bytes"])
    else:
        outcome = train(job)
    Path(sys.argv[2]).write_text(json.dumps(outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DeepSpeed's threads can hang an ordinary exit


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine, run one step that is dropped, then job["steps"] timed ones."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    started = time.perf_counter()
    trainer: Trainer = importlib.import_module(ENGINE_MODULES[job["engine"]]).start(job)
    if trainer.num_params != job["num_params"]:
        raise ValueError(f"{trainer.num_params} parameters, {job['num_params']} expected")
    outcome: dict[str, Any] = {"init_s": time.perf_counter() - started, "init_peak_rss": peak_rss()}
    outcome["init_write"] = disk_bytes()["write"]
    reset_peak_rss()
    outcome["steps"] = run_steps(trainer, job)
    outcome["train_peak_rss"] = peak_rss()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    outcome["about"] = trainer.close() | versions
    return outcome


def run_steps(trainer: Trainer, job: dict[str, Any]) -> list[dict[str, float]]:
    """Time job["steps"] steps after one untimed; the last waits for what is pending."""
    import torch
    from models import VOCAB

    generator = torch.Generator().manual_seed(1)
    shape = (job["batch"], job["seq"])
    last = job["steps"]
    rows = []
    for index in range(last + 1):
        tokens = torch.randint(0, VOCAB, shape, generator=generator)
        before = disk_bytes()
        times = [time.perf_counter()]
        loss = trainer.forward(tokens)
        times.append(time.perf_counter())
        trainer.backward(loss)
        times.append(time.perf_counter())
        trainer.update()
        if index in (
            0,
            last,
        ):  # so that the timed steps hold their own work, all of it, and no other
            trainer.finish()
        times.append(time.perf_counter())
        after = disk_bytes()
        row = {
            "forward": times[1] - times[0],
            "backward": times[2] - times[1],
            "update": times[3] - times[2],
            "total": times[3] - times[0],
            "read": after["read"] - before["read"],
            "write": after["write"] - before["write"],
            "loss": float(loss.detach()),
        }
        del loss
        rows.append(row)
        print(index, {key: round(value, 3) for key, value in row.items()}, flush=True)
    return rows


def disk_bytes() -> dict[str, int]:
    """Return the bytes that this process has caused to be read from and written to disks."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(fields["read_bytes"]), "write": int(fields["write_bytes"])}


def peak_rss() -> int:
    """Return the largest resident set so far (VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status; this bench needs Linux")


def reset_peak_rss() -> None:
    """Let VmHWM start again from the current size, so that building and training tell apart."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
