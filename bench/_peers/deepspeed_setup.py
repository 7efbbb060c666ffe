#!/usr/bin/env python3
"""Give DeepSpeed a virtual environment of its own, and build its operators for NVMe offload.

    python bench/_peers/deepspeed_setup.py --venv ~/peers/deepspeed

DeepSpeed compiles its operators at first use, in silence and for about eight minutes on two cores;
this does it beforehand by training a tiny model. Running it again only does what is missing.
It needs g++ and the headers of libaio (Debian: libaio-dev).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from launch import default_extensions_dir, run_worker
from models import MODELS

PACKAGES = ("torch==2.13.0", "numpy", "setuptools", "wheel", "ninja", "packaging",
            "transformers==5.23.0", "accelerate==1.15.0")  # fmt: skip
DEEPSPEED = "deepspeed==0.19.8"


def main() -> int:
    options = parse_options()
    missing = missing_build_tools()
    if missing:
        print(f"DeepSpeed cannot be built here: {missing}", file=sys.stderr)
        return 1
    python = options.venv / "bin" / "python"
    if not python.exists():
        say(f"making a virtual environment at {options.venv}")
        venv.create(options.venv, with_pip=True)
    pip_install(python, *PACKAGES)
    pip_install(python, DEEPSPEED)  # after torch, which its build asks for
    extensions = options.extensions or default_extensions_dir(python)
    return build_operators(python, extensions, options.max_jobs)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--venv", type=Path, required=True, help="folder of the environment")
    parser.add_argument("--extensions", type=Path, help="folder of the operators (default: in it)")
    parser.add_argument("--max-jobs", type=int, default=1, help="compilers at a time (default 1)")
    options = parser.parse_args()
    options.venv = options.venv.expanduser().absolute()
    return options


def missing_build_tools() -> str:
    """Name what the compile would miss, or return an empty string."""
    if shutil.which("g++") is None:
        return "there is no g++; install a C++ compiler."
    probe = subprocess.run(["g++", "-E", "-include", "libaio.h", "-x", "c++", "/dev/null"],
                           capture_output=True)  # fmt: skip
    return "" if probe.returncode == 0 else "libaio.h is not found; install libaio-dev."


def pip_install(python: Path, *packages: str) -> None:
    say("installing " + ", ".join(packages))
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)


def build_operators(python: Path, extensions: Path, max_jobs: int) -> int:
    """Train a tiny model once, which makes DeepSpeed compile everything that the bench uses."""
    say(f"building DeepSpeed's operators in {extensions}, {max_jobs} at a time (minutes)")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=extensions.parent) as scratch:
        job = {"engine": "deepspeed", "model": "tiny", "seq": 32, "batch": 1, "steps": 1,
               "threads": 1, "dir": scratch, "num_params": MODELS["tiny"].num_params()}  # fmt: skip
        outcome = run_worker(job, python, timeout_s=7200, extensions=extensions,
                             extra_env={"MAX_JOBS": str(max_jobs)})  # fmt: skip
    if "error" in outcome:
        print(f"DeepSpeed did not run: {outcome['error']}", file=sys.stderr)
        return 1
    say(f"DeepSpeed is ready after {time.perf_counter() - started:.0f} s; the bench finds it with")
    say(f"  --deepspeed-python {python} --deepspeed-extensions {extensions}")
    return 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
