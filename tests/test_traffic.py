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

width, depth, update, fmt, folder, io, pack, steps = json.loads(sys.argv[1])
torch.manual_seed(0)
layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
model = nn.ModuleDict({"layers": layers})
policy = {
    "tiers": {"gpu": {"device": "cpu"},
              "cpu": {"budget": "96MiB", "pin": False, "weight_slots": 2, "grad_slots": 2},
              "nvme": {"paths": [folder], "io": io, "pack": pack}},
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


def measure(
    folder: Path, *, update: str, format: str = "exact", io: str = "auto", pack: bool = False
) -> dict:
    width, depth, steps = 512, 24, 8
    arguments = json.dumps([width, depth, update, format, str(folder), io, pack, steps])
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
    [pytest.param(f, marks=pytest.mark.slow) for f in ("exact", "fp32", "bf16", "int8")],
)
def test_deferred_step_moves_what_the_plan_says(format: str, nvme_dir: Path) -> None:
    """Deferred updates spill gradients that do not fit their slots; the plan counts them."""
    on_a_drive(nvme_dir)
    got = measure(nvme_dir, update="deferred", format=format)
    assert got["read"] == pytest.approx(got["traffic"][0], rel=0.01)
    assert got["written"] == pytest.approx(got["traffic"][1], rel=0.01)


# Eight equal blocks: the first two frozen, the next two without a gradient in every other step, and
# an evaluation between steps. Prints the bytes that /proc/self/io and the engine count.
CLEAN_SCRIPT = """
import json, sys
import torch
import offload
from offload import machine
from torch import nn

folder, update, durability, budget, steps = json.loads(sys.argv[1])
torch.manual_seed(0)
layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8))
for layer in layers[:2]:
    layer.weight.requires_grad_(False)
model = nn.ModuleDict({"layers": layers})
policy = {
    "tiers": {"gpu": {"device": "cpu"},
              "cpu": {"budget": budget, "pin": "auto" if budget == "32MiB" else False},
              "nvme": {"paths": [folder], "pack": False}},
    "optimizer": {"update": update, "tile_numel": 65536}, "durability": durability,
}

def forward(skips):
    x = torch.ones(1, 512, dtype=torch.bfloat16)
    for layer in layers[:2] if skips else layers[:4]:
        x = torch.tanh(layer(x))
    for layer in layers[4:]:
        x = torch.tanh(layer(x))
    return x.float().square().mean()

with offload.offload(model, policy) as engine:
    optimizer = offload.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(skips):
        forward(skips).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # what is evaluated is read, not written
            model.eval()
            forward(False)
            model.train()

    for i in range(2):
        step(False)
    rows = []
    for i in range(steps):
        engine.flush()
        engine._engine.stats.roll()
        before = machine.io_counters()
        step(i % 2 == 1)
        booked = sum(engine.stats().written_by_drive)
        engine.flush()
        booked += sum(engine._engine.stats.roll().written_by_drive)
        rows.append([machine.io_counters().write_bytes - before.write_bytes, booked])
    pinned = sum(s.nbytes(p, engine.plan.fmt) for s in engine.plan.specs
                 for i, p in engine.plan.pinned if i == s.index and s.trainable)
    print(json.dumps({"rows": rows, "pinned": pinned}))
"""
LAYER_NBYTES = 512 * 512 * 12  # of all state planes of a block, in `exact`


@pytest.mark.parametrize(
    ("update", "durability"),
    [
        ("eager", "off"),
        ("deferred", "step"),
        pytest.param("eager", "step", marks=pytest.mark.slow),
        pytest.param("deferred", "off", marks=pytest.mark.slow),
    ],
)
def test_clean_planes_are_never_rewritten(nvme_dir: Path, update: str, durability: str) -> None:
    """Six or four of eight blocks have gradients: what is written is their state, where updates are
    deferred their gradients, and no more.
    """
    on_a_drive(nvme_dir)
    rows, _ = clean_rows(nvme_dir, update, durability, "64MiB")
    each = LAYER_NBYTES + (512 * 512 * 2 if update == "deferred" else 0)
    for index, (real, booked) in enumerate(rows):
        check_written(real, booked, each * (4 if index % 2 else 6), durability)


def test_clean_planes_in_ram_are_not_committed(nvme_dir: Path) -> None:
    """A commit writes the pinned planes that the step has changed, and no others."""
    on_a_drive(nvme_dir)
    rows, pinned = clean_rows(nvme_dir, "eager", "step", "32MiB")
    assert pinned > 5 * LAYER_NBYTES  # so the two blocks that are skipped rest there
    for index, (real, booked) in enumerate(rows):
        check_written(real, booked, LAYER_NBYTES * (4 if index % 2 else 6), "step")


def clean_rows(folder: Path, *arguments: str) -> tuple[list[list[int]], int]:
    """(bytes as the kernel counts, bytes as the engine counts) of each step, and what is pinned."""
    done = subprocess.run(
        [sys.executable, "-c", CLEAN_SCRIPT, json.dumps([str(folder), *arguments, 4])],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    return got["rows"], got["pinned"]


def check_written(real: int, booked: int, must: int, durability: str) -> None:
    if durability == "off":
        assert real == booked == must
    else:  # checksums and manifest; these go through the page cache, whole pages
        assert must < booked <= must + 64 * 1024
        assert booked <= real <= booked + 32 * 1024
