"""Bytes are the currency: what the kernel counts for one step is what the plan predicts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# A deep stack of equal blocks, all on NVMe. Prints the bytes of one step, as the kernel counts them
# in /proc/self/io.
SCRIPT = """
import json, sys, time
import torch
import offload
from offload import machine
from torch import nn

width, depth, update, fmt, folder, io, steps = json.loads(sys.argv[1])
torch.manual_seed(0)
layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
model = nn.ModuleDict({"layers": layers})
policy = {
    "tiers": {"gpu": {"device": "cpu"},
              "cpu": {"budget": "96MiB", "pin": False, "weight_slots": 2, "grad_slots": 2},
              "nvme": {"paths": [folder], "io": io}},
    "state": {"format": fmt}, "optimizer": {"update": update, "tile_numel": 65536},
}
dtype = torch.float32 if fmt == "fp32" else torch.bfloat16

def step():
    x = torch.ones(1, width, dtype=dtype)
    for layer in layers:
        x = torch.tanh(layer(x))
    x.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

def quiet_counters():
    # What a step has started by itself is done. A flush instead would move more than training does.
    now, before = machine.io_counters(), None
    while now != before:
        time.sleep(0.2)
        now, before = machine.io_counters(), now
    return now

with offload.offload(model, policy) as engine:
    optimizer = offload.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        step()
    before = quiet_counters()
    for _ in range(steps):
        step()
    after = quiet_counters()
    read = (after.read_bytes - before.read_bytes) / steps
    written = (after.write_bytes - before.write_bytes) / steps
    plan = engine.plan
    print(json.dumps({"read": read, "written": written, "traffic": plan.traffic(),
                      "params": width * width * depth}))
"""


def measure(folder: Path, *, update: str, format: str = "exact", io: str = "auto") -> dict:
    width, depth, steps = 512, 24, 8
    arguments = json.dumps([width, depth, update, format, str(folder), io, steps])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def on_a_drive(folder: Path) -> None:
    from offload import machine

    if machine.is_tmpfs(folder):
        pytest.skip("the kernel counts no bytes for tmpfs")


@pytest.mark.parametrize("io", ["auto", pytest.param("threads", marks=pytest.mark.slow)])
def test_eager_step_moves_what_the_plan_says(io: str, nvme_dir: Path) -> None:
    """All on NVMe, exact: 14 bytes read and 12 written per parameter, less what the slots keep."""
    on_a_drive(nvme_dir)
    got = measure(nvme_dir, update="eager", io=io)
    assert got["read"] == pytest.approx(got["traffic"][0], rel=0.01)
    assert got["written"] == pytest.approx(got["traffic"][1], rel=0.01)
    assert 12.9 <= got["read"] / got["params"] <= 14.0
    assert 11.9 <= got["written"] / got["params"] <= 12.1


@pytest.mark.parametrize(
    "format",
    ["exact", *(pytest.param(f, marks=pytest.mark.slow) for f in ("fp32", "bf16", "int8"))],
)
def test_deferred_step_moves_what_the_plan_says(format: str, nvme_dir: Path) -> None:
    """Deferred updates spill gradients that do not fit their slots; the plan counts them."""
    on_a_drive(nvme_dir)
    got = measure(nvme_dir, update="deferred", format=format)
    assert got["read"] == pytest.approx(got["traffic"][0], rel=0.01)
    assert got["written"] == pytest.approx(got["traffic"][1], rel=0.01)
