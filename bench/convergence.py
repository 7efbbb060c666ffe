#!/usr/bin/env python3
"""What do lossy formats and other optimizers cost a fine-tune? Final validation losses.

    python bench/convergence.py --dir /mnt/nvme/bench --out bench/results/convergence_NAME_202601.md

SmolLM2-135M-Instruct is fine-tuned on the plays of Shakespeare with every format and optimizer,
each seed once; a seed decides the order of the text, the same for all. The learning rate of each
optimizer is chosen first, by runs of seed 0, and the table says among which; the lossy
formats of AdamW take the rate that `exact` chose. Everything rests in RAM, which changes no bit.
Losses do not depend on the machine's speed, so this may run beside other work; what was finished
is kept in DIR and not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("_peers")))
sys.path.append(str(Path(__file__).parents[1]))

import _train_report
from _train_report import table

from offload.formats import state_format

REPO = Path(__file__).resolve().parents[1]
TBW = 600e12  # what a consumer drive of 1 TB is rated for
MODEL_PARAMS = 8e9


@dataclass(frozen=True)
class Case:
    """A format with an optimizer. The rates are tried with seed 0; none: BASELINE's."""

    name: str
    format: str
    kind: str
    rates: tuple[float, ...] = ()

    @property
    def state_itemsize(self) -> float:
        return state_format(self.format, self.kind).state_itemsize


BASELINE = "exact, AdamW"  # lossy formats take its rate, and all are compared with it
CASES = (
    Case(BASELINE, "exact", "adamw", (3e-5, 1e-4, 3e-4)),
    Case("bf16, AdamW", "bf16", "adamw"),
    Case("int8, AdamW", "int8", "adamw"),
    Case("exact, Lion", "exact", "lion", (1e-5, 3e-5, 1e-4)),
    Case("exact, Adafactor", "exact", "adafactor", (3e-5, 1e-4, 3e-4)),
    Case("exact, SCALE", "exact", "scale", (1e-5, 3e-5, 1e-4)),
)


def main() -> int:
    options = parse_options()
    options.dir.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if not options.cases or case.name in options.cases]
    rates: dict[str, float] = {}
    for case in cases:
        tried = {rate: run(case, rate, 0, options.search_steps, options) for rate in case.rates}
        chosen = min(tried, key=lambda rate: tried[rate][1], default=None)
        rates[case.name] = rates[BASELINE] if chosen is None else chosen
    losses: dict[str, list[tuple[float, float]]] = {case.name: [] for case in cases}
    for seed in range(options.seeds):
        for case in cases:
            losses[case.name].append(run(case, rates[case.name], seed, options.steps, options))
    facts = _train_report.collect_facts(
        options.dir, shlex.join(sys.argv[1:]), script="convergence.py"
    )
    text = render(cases, rates, losses, facts, options)
    text = _train_report.hide_paths(text, options)
    print("\n" + text)
    if options.out:
        options.out.write_text(text)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dir", type=Path, default=Path("build/bench/convergence"), help="folder for the runs")
    add("--config", type=Path, default=REPO / "examples" / "smollm2.yaml")
    add("--steps", type=int, default=200)
    add("--search-steps", type=int, help="of the runs that choose a rate (default: all steps)")
    add("--seeds", type=int, default=3)
    add("--batch", type=int, default=1, help="sequences of 256 tokens in a step")
    add("--eval-batches", type=int, default=64)
    add("--cases", action="append", choices=[c.name for c in CASES], help="only these, by name")
    add("--out", type=Path, help="write the result as Markdown too")
    options = parser.parse_args()
    if options.cases and BASELINE not in options.cases:
        parser.error(f"--cases needs {BASELINE!r} too, with which the others are compared")
    options.dir = options.dir.expanduser().absolute()
    options.search_steps = options.search_steps or options.steps
    return options


def run(
    case: Case, rate: float, seed: int, steps: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Validation loss before and after one fine-tune."""
    name = f"{case.format}-{case.kind}-{rate:g}-{seed}-{steps}x{options.batch}"
    done = options.dir / f"{name}.json"
    if not done.exists():
        folder = options.dir / name
        pairs = {
            "train.steps": steps, "train.batch_size": options.batch, "train.seed": seed,
            "train.lr": rate, "train.warmup": max(steps // 20, 1),
            "train.eval_batches": options.eval_batches,
            "output.folder": folder, "output.sample_tokens": 0, "tiers.cpu.budget": "4GiB",
            "tiers.nvme": "null", "durability": "off", "state.format": case.format,
            "optimizer.kind": case.kind,
        }  # fmt: skip
        if case.kind == "scale":  # the head is tied; rates are by element, as those of AdamW are
            pairs["optimizer.options"] = "{last: model.embed_tokens.weight, rms: true}"
        sets = [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "offload", "finetune", str(options.config), *sets]
        subprocess.run(command, check=True, cwd=REPO, stdout=subprocess.DEVNULL)
        rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        found = {row["when"]: row["loss"] for row in rows if row["event"] == "validation"}
        done.write_text(json.dumps([found["before"], found["after"]]))
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    before, after = json.loads(done.read_text())
    print(f"{name}: {before:.4f} -> {after:.4f}", file=sys.stderr, flush=True)
    return before, after


def render(
    cases: list[Case],
    rates: dict[str, float],
    losses: dict[str, list[tuple[float, float]]],
    facts: dict[str, str],
    options: argparse.Namespace,
) -> str:
    """Return the whole result file."""
    rows = []
    reference = [after for _, after in losses[BASELINE]]
    for case in cases:
        after = [value[1] for value in losses[case.name]]
        apart = [one - other for one, other in zip(after, reference, strict=True)]
        written = case.state_itemsize
        rows.append(
            [
                case.name,
                f"{rates[case.name]:g}"
                + (f" of {', '.join(f'{r:g}' for r in case.rates)}" if case.rates[1:] else ""),
                " ".join(f"{value:.4f}" for value in after),
                f"{statistics.fmean(after):.4f}",
                f"{statistics.fmean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})",
                f"{written + 2:g} + {written:g}",
                f"{TBW / (written * MODEL_PARAMS):,.0f}",
            ]
        )
    before = losses[BASELINE][0][0]
    return "\n".join(
        [
            "# What lossy formats and other optimizers cost a fine-tune",
            "",
            "SmolLM2-135M-Instruct (dequantised from 4-bit) on the plays of Shakespeare: "
            f"{options.steps} steps of {options.batch} x 256 tokens, cosine schedule, no clipping,",
            f"{options.seeds} seeds. Validation loss before training: {before:.4f}, over "
            f"{options.eval_batches} batches of held-out text.",
            "",
            table(["fact", "value"], [[key, value] for key, value in facts.items()]),
            "",
            table(
                [
                    "format, optimizer",
                    "learning rate",
                    "final validation loss by seed",
                    "mean",
                    f"against {BASELINE}, paired: mean (range)",
                    "B/param read + written a step",
                    f"steps of {MODEL_PARAMS / 1e9:g} B parameters to {TBW / 1e12:g} TB written",
                ],
                rows,
            ),
            "",
            "Adafactor keeps two numbers more for a row and a column of a matrix, SCALE a momentum",
            "of 4 bytes for every parameter of the last layer, here the tied embedding, which is"
            " normalised by",
            "rows as a last layer is; the authors' program takes it as an embedding, by columns.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
