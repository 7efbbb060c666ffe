#!/usr/bin/env python3
"""Seconds per training step and peak memory of a Llama: this project, plain PyTorch, DeepSpeed.

    python bench/train.py --model 1b --dir /mnt/nvme/bench --deepspeed-python ENV/bin/python

All engines train the same bf16 model with AdamW on an fp32 master, on the CPU, in one run: each
round starts every engine once, in a process of its own, runs one step that is dropped and then
--steps timed ones. Ratios are taken within a round, because the speed of a machine drifts.
An engine that cannot run is skipped, and the result says why.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).with_name("_peers")))

import _train_report
import psutil
from _train_report import Run
from launch import run_worker
from models import MODELS

ENGINES = (
    "torch",
    "torch-keep",
    "offload",
    "offload-plain",
    "offload-pinned",
    "deepspeed",
    "deepspeed-hugepages",
)
DEFAULT_ENGINES = "torch,torch-keep,offload,offload-pinned,deepspeed"
CPU_BUDGETS = {"tiny": "128MiB", "350m": "1GiB", "1b": "2GiB"}
PINNED_BUDGETS = {"tiny": "256MiB", "350m": "3584MiB", "1b": "7GiB"}  # near DeepSpeed's peak
PROBE_NBYTES = 2 << 30


def main() -> int:
    options = parse_options()
    options.dir.mkdir(parents=True, exist_ok=True)
    skipped: dict[str, str] = {}
    runs: list[Run] = []
    for index in range(options.rounds):
        shift = index % len(options.engines)  # nobody always runs right after the same neighbour
        for engine in ("disk", *options.engines[shift:], *options.engines[:shift]):
            if engine not in skipped:
                run_once(engine, index, options, runs, skipped)
    facts = _train_report.collect_facts(options.dir, shlex.join(sys.argv[1:]))
    text = _train_report.hide_paths(_train_report.render(options, facts, runs, skipped), options)
    print("\n" + text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0 if any(run.engine != "disk" for run in runs) else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=MODELS, default="tiny")
    add("--seq", type=int, default=256, help="tokens in a sequence")
    add("--batch", type=int, default=1, help="sequences in a step")
    add("--steps", type=int, default=3, help="timed steps of an engine in a round")
    add("--rounds", type=int, default=3)
    add("--engines", default=DEFAULT_ENGINES, help=f"comma separated, of {', '.join(ENGINES)}")
    add("--dir", type=Path, default=Path("build/bench"), help="folder on the NVMe to test")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--wait-policy", default="passive", choices=("passive", "active", "unset"))
    add("--cpu-budget", help="RAM budget of offload (default: by model)")
    add("--pinned-budget", help="RAM budget of offload-pinned (default: by model)")
    add("--pin", choices=("false", "auto", "true"), default="false", help="planes of offload")
    add("--set", action="append", default=[], metavar="A.B=C", help="one more key of the policy")
    add("--deepspeed-python", type=Path, default=Path(sys.executable), help="its interpreter")
    add("--deepspeed-extensions", type=Path, help="its compiled operators (default: in its venv)")
    add("--timeout", type=float, default=1800, help="seconds that one process may take")
    add("--out", type=Path, help="write the result as Markdown too")
    options = parser.parse_args()
    options.engines = tuple(options.engines.split(","))
    unknown = set(options.engines) - set(ENGINES)
    if unknown:
        parser.error(
            f"unknown engines {', '.join(sorted(unknown))}; choose of {', '.join(ENGINES)}"
        )
    options.dir = options.dir.expanduser().absolute()
    options.cpu_budget = options.cpu_budget or CPU_BUDGETS[options.model]
    options.pinned_budget = options.pinned_budget or PINNED_BUDGETS[options.model]
    return options


def run_once(
    engine: str,
    index: int,
    options: argparse.Namespace,
    runs: list[Run],
    skipped: dict[str, str],
) -> None:
    """Run one engine in round `index`; adds to `runs`, or to `skipped` with the reason."""
    is_deepspeed = engine.startswith("deepspeed")
    python = options.deepspeed_python if is_deepspeed else Path(sys.executable)
    reason = reason_to_skip(engine, options)
    if not reason:
        scratch = Path(tempfile.mkdtemp(prefix=f"{engine}-", dir=options.dir))
        try:
            outcome = run_worker(
                make_job(engine, scratch, options),
                python,
                timeout_s=options.timeout,
                wait_policy=options.wait_policy,
                extensions=options.deepspeed_extensions,
            )
        finally:
            shutil.rmtree(scratch)
            os.sync()  # what the file system still owes is not for the next engine to pay
        reason = outcome.get("error", "")
    if reason:
        skipped[engine] = reason
        say(f"round {index + 1}: {engine} skipped: {reason}")
        return
    runs.append(Run(engine=engine, round=index, outcome=outcome))
    say(f"round {index + 1}: {_train_report.one_line(runs[-1])}")


def reason_to_skip(engine: str, options: argparse.Namespace) -> str:
    """Say why `engine` cannot run here before it is tried, or return an empty string."""
    num_params = MODELS[options.model].num_params()
    if engine.startswith("torch"):
        # 16 bytes per parameter and the process itself; unchecked activations come on top
        need = 16 * num_params + (3 << 30 if engine == "torch-keep" else 1 << 30)
        free = psutil.virtual_memory().available
        return too_little("memory", need, free)
    need = 24 * num_params if engine != "disk" else PROBE_NBYTES
    lack = too_little(f"space in {options.dir}", need, shutil.disk_usage(options.dir).free)
    if lack or not engine.startswith("deepspeed"):
        return lack
    command = [options.deepspeed_python, "-c", "import importlib.util as u, sys;"
               "sys.exit(u.find_spec('deepspeed') is None)"]  # fmt: skip
    try:
        found = subprocess.run(command, capture_output=True).returncode == 0
    except OSError as error:
        return f"{options.deepspeed_python} does not start: {error.strerror}"
    return "" if found else "DeepSpeed is not installed; see bench/README.md"


def too_little(what: str, need: int, free: int) -> str:
    if free >= need:
        return ""
    return f"needs {need / 2**30:.1f} GiB of {what}, {free / 2**30:.1f} GiB are free"


def make_job(engine: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what worker.py gets to know."""
    job: dict[str, Any] = {"engine": engine, "dir": str(scratch), "threads": options.threads}
    if engine == "disk":
        return job | {"num_bytes": PROBE_NBYTES}
    job |= {"model": options.model, "num_params": MODELS[options.model].num_params()}
    job |= {"seq": options.seq, "batch": options.batch, "steps": options.steps}
    if engine in ("offload", "offload-plain"):
        overrides = options.set + (["tiers.nvme.pack=false"] if engine == "offload-plain" else [])
        job |= {"policy": make_policy(options.cpu_budget, options.pin), "overrides": overrides}
    if engine == "offload-pinned":
        job |= {"policy": make_policy(options.pinned_budget, "auto"), "overrides": options.set}
    return job


def make_policy(budget: str, pin: str) -> dict[str, Any]:
    """Return an offload policy less its NVMe path."""
    return {
        "tiers": {
            "gpu": {"device": "cpu"},
            "cpu": {"budget": budget, "pin": {"false": False, "true": True}.get(pin, pin)},
            "nvme": {},
        },
        "state": {"format": "exact"},
        "optimizer": {"update": "eager"},
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
