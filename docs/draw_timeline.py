"""Draw one training step of a trace (engine.trace) as SVG: docs/draw_timeline.py TRACE OUT.svg

One row per link and worker, time from left to right, of the last whole step of the trace.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROWS = ("nvme read", "update", "nvme write", "stall")
COLOURS = {
    "nvme read": "#4477aa",
    "update": "#228833",
    "nvme write": "#ee6677",
    "stall": "#bbbbbb",
}
NOTES = {
    "nvme read": "weights, prefetched",
    "update": "AdamW worker: reads, computes and writes state tile by tile",
    "nvme write": "spilled gradients",
    "stall": "compute waits",
}
WIDTH, ROW_HEIGHT, LEFT, TOP = 960, 44, 110, 30


def spans(trace: Path) -> tuple[list[tuple[str, str, float, float]], list[float]]:
    """((row, chunk, start, end) of the events to draw, ends of the steps), in seconds."""
    rows, ends = [], []
    for event in json.loads(trace.read_text())["traceEvents"]:
        kind, start = event.get("cat"), event.get("ts", 0.0) / 1e6
        if kind == "step":
            ends.append(start)
        elif event.get("ph") == "X" and kind in ROWS:
            rows.append((kind, event["name"], start, start + event["dur"] / 1e6))
    return rows, sorted(ends)


def draw(rows: list[tuple[str, str, float, float]], since: float, until: float) -> str:
    """The SVG text of everything between two times."""
    scale = (WIDTH - LEFT - 10) / (until - since)
    height = TOP + ROW_HEIGHT * len(ROWS) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, row in enumerate(ROWS):
        y = TOP + number * ROW_HEIGHT
        parts.append(f'<text x="8" y="{y + 20}">{row}</text>')
        parts.append(f'<text x="{LEFT}" y="{y - 2}" fill="#777" font-size="10">{NOTES[row]}</text>')
        parts.append(
            f'<rect x="{LEFT}" y="{y + 2}" width="{WIDTH - LEFT - 10}" height="26" fill="#f4f4f4"/>'
        )
        for kind, name, start, end in rows:
            if kind == row and end > since and start < until:
                x = LEFT + (max(start, since) - since) * scale
                width = max((min(end, until) - max(start, since)) * scale, 0.6)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="26" '
                    f'fill="{COLOURS[row]}" fill-opacity="0.75"><title>{name}</title></rect>'
                )
    base = TOP + ROW_HEIGHT * len(ROWS) + 12
    for tick in range(int(until - since) + 1):
        x = LEFT + tick * scale
        parts.append(f'<text x="{x:.0f}" y="{base}" fill="#555" font-size="10">{tick} s</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    trace, out = Path(sys.argv[1]), Path(sys.argv[2])
    rows, ends = spans(trace)
    if len(ends) < 2:
        sys.exit(f"{trace} holds fewer than two finished steps; train a little longer.")
    out.write_text(draw(rows, ends[-2], ends[-1]))


if __name__ == "__main__":
    main()
