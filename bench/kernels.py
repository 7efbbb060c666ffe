#!/usr/bin/env python3
"""Seconds of one AdamW step in memory: this project's kernels, torch, DeepSpeed, and the limit.

    python bench/kernels.py --deepspeed-python ENV/bin/python

One process per number of threads holds one set of planes on huge pages, and every round runs every
case once on them, in an order of its own. The limit is `streams`: a loop that reads and writes
the very same planes, in place and in the same order, with almost no arithmetic. `memcpy` moves as
many bytes as fp32 AdamW (28 per parameter: 14 read, 14 written) and shows what the limit is worth.
Ratios are taken within a round, because the speed of a machine drifts.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
sys.path.append(str(Path(__file__).with_name("_peers")))

from launch import deepspeed_environment, default_extensions_dir

HYPER = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
NUM_TENSORS = 16  # of torch and DeepSpeed; the kernels here take ranges
# Bytes of memory that a case must read and write for one parameter.
TRAFFIC = {
    "memcpy": 28,
    "streams fp32": 28,
    "offload fp32": 28,
    "torch fp32": 28,
    "deepspeed fp32": 28,
    "streams exact": 26,
    "offload exact": 26,
    "offload bf16": 18,
    "offload int8": 12.25,
    "torch fp32 + bf16 copy": 34,
    "deepspeed fp32 + bf16 copy": 34,
}
GROUP_NUMEL = 32  # elements of int8 that share a scale
RATIOS = (  # (faster if above 1, than which)
    ("offload fp32", "streams fp32"),
    ("offload exact", "streams exact"),
    ("offload fp32", "torch fp32"),
    ("offload fp32", "deepspeed fp32"),
    ("offload exact", "torch fp32 + bf16 copy"),
    ("offload exact", "deepspeed fp32 + bf16 copy"),
    ("offload bf16", "offload exact"),
    ("offload int8", "offload exact"),
)
STREAMS_SOURCE = """
#include <cstddef>
#include <cstdint>
extern "C" void streams_fp32(float* __restrict p, float* __restrict m, float* __restrict v,
                             const float* __restrict g, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    p[i] = p[i] * 0.999f + g[i];
    m[i] = m[i] * 0.9f + g[i];
    v[i] = v[i] * 0.99f + g[i];
  }
}
extern "C" void streams_exact(uint16_t* __restrict w, uint16_t* __restrict r, float* __restrict m,
                              float* __restrict v, const uint16_t* __restrict g, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    w[i] += g[i];
    r[i] ^= g[i];
    m[i] = m[i] * 0.9f + 1e-4f;
    v[i] = v[i] * 0.99f + 1e-8f;
  }
}
"""

MOMENTS = ("exp_avg", "exp_avg_sq")
INTRODUCTION = """
In place, on the same planes for every case, which lie on huge pages. GB/s counts what a case must
read and write: fp32 reads 16 and writes 12 bytes per parameter, `exact` (bf16 weight and gradient,
16 low bits, fp32 moments) reads 14 and writes 12; `+ bf16 copy` reads the fp32 weights once more
and writes 2; `bf16` reads 10 and writes 8, `int8` reads 7.125 and writes 5.125, and computes more.
`streams` is the limit: the same planes, read and written in the same order by a loop with almost no
arithmetic. `memcpy` reads 14 and writes 14 bytes elsewhere; the processor may read what it
overwrites before it does so, which is not counted. Speeds are ratios within a round, and above 1
where the first is faster.
"""

Rounds = list[dict[str, float]]
Part = Callable[[int, int], None]  # works on the elements [begin, end)


def main() -> int:
    options = parse_options()
    if options.worker:
        print(json.dumps(work(options, options.worker)))
        return 0
    measured = {count: run_worker(options, count) for count in options.threads}
    text = render(options, measured)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--mparams", type=int, default=64, help="2**20 parameters; well beyond the caches")
    add("--rounds", type=int, default=7)
    add("--threads", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2])
    add("--isa", default="auto", help="auto, avx512, avx2 or portable")
    add("--deepspeed-python", type=Path, help="its interpreter; without it, it is left out")
    add("--deepspeed-extensions", type=Path, help="its compiled operators (default: in its venv)")
    add("--out", type=Path, help="write the result as Markdown too")
    add("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mparams < 1 or options.rounds < 1:
        parser.error("--mparams and --rounds are 1 or more")
    return options


# One process: all cases on the same planes


def work(options: argparse.Namespace, num_threads: int) -> dict[str, Any]:
    """Run every case once per round; return versions, and seconds by case and round."""
    import torch

    from offload import _native

    torch.set_num_threads(num_threads)
    planes = Planes(options.mparams << 20)
    cases = native_cases(planes, num_threads, options.isa)
    cases |= peer_cases(planes, with_deepspeed=options.deepspeed_python is not None)
    names = list(cases)
    for name in names:
        cases[name]()  # builds state, touches code
    rounds: Rounds = []
    for index in range(options.rounds):
        order = random.Random(index).sample(names, len(names))  # what ran before matters
        row = {}
        for name in order:
            start = time.perf_counter()
            cases[name]()
            row[name] = time.perf_counter() - start
        rounds.append({name: row[name] for name in names})
    isa = _native.isa() if options.isa == "auto" else options.isa
    about = {"torch": torch.__version__, "isa": isa}
    if options.deepspeed_python is not None:
        import deepspeed

        about["deepspeed"] = deepspeed.__version__
    return {"about": about, "rounds": rounds}


class Planes:
    """The planes of `numel` parameters on huge pages, shared by all cases."""

    def __init__(self, numel: int) -> None:
        import torch

        from offload.slots import Slab

        self.numel = numel
        self._slab = Slab(58 * numel)

        def carve(name: str, dtype: Any, times: int = 1) -> Any:
            nbytes = numel * times * dtype.itemsize
            return self._slab.carve(name, nbytes).view(dtype, numel * times)

        fp32, bf16 = torch.float32, torch.bfloat16
        torch.manual_seed(0)
        row = torch.randn(1 << 20)  # repeated: drawing all of them would take most of the time

        def fill(name: str, values: Any) -> Any:
            plane = carve(name, fp32)
            plane.view(-1, row.numel()).copy_(values)
            return plane

        self.master = fill("master", row * 0.02)
        self.exp_avg = fill("exp_avg", row * 1e-3)
        self.exp_avg_sq = fill("exp_avg_sq", row.square() * 1e-5)
        self.grad = fill("grad", row.flip(0) * 1e-3)
        self.weight = carve("weight", bf16).copy_(self.master)
        self.residue = carve("residue", torch.uint16).zero_()
        self.grad16 = carve("grad16", bf16).copy_(self.grad)
        self.exp_avg16 = carve("exp_avg16", bf16).zero_()  # bf16, and the bytes of int8
        self.exp_avg_sq16 = carve("exp_avg_sq16", bf16).zero_()
        self.scale = carve("scale", bf16).zero_()  # larger than need be
        self.scale_sq = carve("scale_sq", bf16).zero_()
        self.source = carve("source", torch.uint8, 14).zero_()
        self.target = carve("target", torch.uint8, 14).zero_()

    def addresses(self, *names: str) -> list[tuple[int, int]]:
        """(address, bytes per element) of some planes."""
        tensors = [getattr(self, name) for name in names]
        return [(tensor.data_ptr(), tensor.element_size()) for tensor in tensors]


def on_threads(numel: int, num_threads: int, part: Part) -> None:
    """Call part(begin, end) on that many Python threads; native code gives the GIL up."""
    cuts = [numel * i // num_threads // 4096 * 4096 for i in range(num_threads)] + [numel]
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))
    helpers = [threading.Thread(target=part, args=span) for span in spans[1:]]
    for helper in helpers:
        helper.start()
    part(*spans[0])
    for helper in helpers:
        helper.join()


def native_cases(planes: Planes, num_threads: int, isa: str) -> dict[str, Callable[[], None]]:
    """The kernels of this project, and the loops that show what memory allows."""
    fp32 = planes.addresses("master", "exp_avg", "exp_avg_sq", "grad")
    exact = planes.addresses("weight", "residue", "exp_avg", "exp_avg_sq", "grad16")
    source, target = planes.addresses("source")[0][0], planes.addresses("target")[0][0]
    streams = compile_streams()
    lossy = planes.addresses("exp_avg16", "exp_avg_sq16")
    int8 = [(base, 1) for base, _ in planes.addresses("residue", "exp_avg16", "exp_avg_sq16")]
    scales = [(base, 2 / GROUP_NUMEL) for base, _ in planes.addresses("scale", "scale_sq")]
    absent = (0, 0)
    no_scales = (absent, absent)

    def memcpy(begin: int, end: int) -> None:
        ctypes.memmove(target + 14 * begin, source + 14 * begin, 14 * (end - begin))

    parts = {
        "memcpy": memcpy,
        "streams fp32": stream_part(streams.streams_fp32, fp32),
        "streams exact": stream_part(streams.streams_exact, exact),
        "offload fp32": kernel_part(0, [fp32[0], absent, *fp32[1:3], *no_scales, fp32[3]], isa),
        "offload exact": kernel_part(1, [*exact[:4], *no_scales, exact[4]], isa),
        "offload bf16": kernel_part(2, [*exact[:2], *lossy, *no_scales, exact[4]], isa),
        "offload int8": kernel_part(3, [exact[0], *int8, *scales, exact[4]], isa),
    }

    def on_all_threads(part: Part) -> Callable[[], None]:
        return lambda: on_threads(planes.numel, num_threads, part)

    return {name: on_all_threads(part) for name, part in parts.items()}


def stream_part(function: Any, rows: Sequence[tuple[int, int]]) -> Part:
    def part(begin: int, end: int) -> None:
        pointers = [ctypes.c_void_p(base + begin * itemsize) for base, itemsize in rows]
        function(*pointers, ctypes.c_size_t(end - begin))

    return part


def kernel_part(code: int, rows: Sequence[tuple[int, float]], isa: str) -> Part:
    from offload import _native
    from offload.update import AdamWOp, pack_ops

    beta1, beta2 = HYPER["betas"]
    rest = {"lr": HYPER["lr"], "eps": HYPER["eps"], "weight_decay": HYPER["weight_decay"]}

    def part(begin: int, end: int) -> None:
        op = AdamWOp(begin=0, end=end - begin, step=10, beta1=beta1, beta2=beta2, **rest)
        addresses = (*(base + int(begin * itemsize) for base, itemsize in rows), 0)  # no grad_lo
        _native.apply_ops(code, end - begin, addresses, pack_ops([op]), isa)

    return part


def compile_streams() -> Any:
    """Compile the limit's loops for this very processor; they need g++, as the extension does."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "streams.cpp", Path(folder) / "streams.so"
        source.write_text(STREAMS_SOURCE)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


def peer_cases(planes: Planes, *, with_deepspeed: bool) -> dict[str, Callable[[], None]]:
    """torch's fused AdamW, and DeepSpeed's, in place in fp32; and with a bf16 copy for compute."""
    import torch

    params = [torch.nn.Parameter(piece) for piece in planes.master.chunk(NUM_TENSORS)]
    moments = zip(*(getattr(planes, n).chunk(NUM_TENSORS) for n in MOMENTS), strict=True)
    state = [dict(zip(MOMENTS, pair, strict=True)) for pair in moments]
    for param, grad in zip(params, planes.grad.chunk(NUM_TENSORS), strict=True):
        param.grad = grad
    makers: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch.optim.AdamW(params, fused=True, **HYPER)
    }
    if with_deepspeed:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        makers["deepspeed"] = lambda: DeepSpeedCPUAdam(params, **HYPER)
    cases: dict[str, Callable[[], None]] = {}
    for name, make in makers.items():
        optimizer = make()
        for param, mine in zip(params, state, strict=True):
            step: Any = torch.tensor(9.0) if name == "torch" else 9
            optimizer.state[param] = {"step": step, **mine}

        def with_copy(step: Callable[[], Any] = optimizer.step) -> None:
            step()
            planes.weight.copy_(planes.master)

        cases[f"{name} fp32"] = optimizer.step
        cases[f"{name} fp32 + bf16 copy"] = with_copy
    return cases


# All processes


def run_worker(options: argparse.Namespace, num_threads: int) -> dict[str, Any]:
    """Run this script as a worker, in DeepSpeed's interpreter where there is one."""
    python = options.deepspeed_python or Path(sys.executable)
    environment = dict(os.environ)
    environment |= {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "passive"}
    if options.deepspeed_python:
        extensions = options.deepspeed_extensions or default_extensions_dir(python)
        environment |= deepspeed_environment(extensions)
        environment["PATH"] = f"{python.parent}{os.pathsep}{environment.get('PATH', '')}"
    command = [str(python), __file__, *sys.argv[1:], "--worker", str(num_threads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def render(options: argparse.Namespace, measured: Mapping[int, dict[str, Any]]) -> str:
    """The whole result: medians over rounds, and ratios within rounds: median (least-most)."""
    from _train_report import processor_name, source_revision, table

    about = next(iter(measured.values()))["about"]
    command = shlex.join(sys.argv[1:])
    for path, name in ((options.deepspeed_python, "PYTHON"), (options.out, "RESULT"),
                       (options.deepspeed_extensions, "EXTENSIONS")):  # fmt: skip
        command = command.replace(str(path), name) if path else command
    facts = {
        "month": datetime.date.today().strftime("%Y-%m"),
        "command": f"`python bench/kernels.py {command}`",
        "source": source_revision(),
        "processor": f"{processor_name()}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{key} {value}" for key, value in about.items()),
    }
    lines = [
        f"# One AdamW step of {options.mparams} x 2**20 parameters in memory",
        "",
        *INTRODUCTION.strip().splitlines(),
        "",
        table(["fact", "value"], facts.items()),
    ]
    for num_threads, result in measured.items():
        lines += ["", f"## {num_threads} thread{'s' * (num_threads > 1)}", ""]
        lines += [seconds_table(options, result["rounds"]), "", ratios_table(result["rounds"])]
    return "\n".join(lines) + "\n"


def seconds_table(options: argparse.Namespace, rounds: Rounds) -> str:
    from _train_report import table

    rows = []
    for name in rounds[0]:
        seconds = [row[name] for row in rounds]
        median = statistics.median(seconds)
        rate = TRAFFIC[name] * (options.mparams << 20) / median / 1e9
        span = f"{min(seconds) * 1e3:.0f}-{max(seconds) * 1e3:.0f}"
        cells = [f"{median * 1e3:.0f} ({span})", str(TRAFFIC[name]), f"{rate:.1f}"]
        rows.append([name, *cells])
    return table(["case", "ms: median (least-most)", "B/param", "GB/s"], rows)


def ratios_table(rounds: Rounds) -> str:
    """How many times as fast; of the limit, the share that is reached."""
    from _train_report import spread, table

    rows = []
    for fast, slow in RATIOS:
        if slow in rounds[0]:
            ratios = [row[slow] / row[fast] for row in rounds]
            rows.append([f"{fast} beside {slow}", spread(ratios)])
    return table(["speed", "times: median (least-most)"], rows)


if __name__ == "__main__":
    sys.exit(main())
