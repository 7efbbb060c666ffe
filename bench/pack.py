#!/usr/bin/env python3
"""Does packing pay: how many bytes it saves on what training makes, and how fast beside memcpy.

    python bench/pack.py

A small random Llama takes a few AdamW steps on text that comes with Python; its weights (bf16) and
moments (fp32) are the planes. Each is packed and unpacked block by block on one thread, by every
instruction set, in turns with memcpy of the same blocks and with zlib's fastest level. The entropy
of the exponents says what an ideal code for them would come to.
"""

from __future__ import annotations

import argparse
import ctypes
import shlex
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
sys.path.append(str(Path(__file__).with_name("_peers")))

import _train_report
import numpy as np
import torch

from offload import _native
from offload.extents import PACK_BLOCK_NBYTES_MAX as BLOCK_NBYTES

SLACK_NBYTES = 512
GB = 1e9
Turn = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="of training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the result as Markdown too")
    options = parser.parse_args()
    facts = _train_report.collect_facts(Path.cwd(), "")
    facts["command"] = f"`python bench/pack.py {shlex.join(sys.argv[1:])}`"
    rows = [
        row
        for name, items in planes(options.steps).items()
        for row in measure(name, items, options.rounds)
    ]
    text = render(facts, rows, options)
    print(text)
    if options.out:
        options.out.write_text(text)


def planes(num_steps: int) -> dict[str, np.ndarray]:
    """What lies on the drive after some steps, in whole blocks."""
    from pydoc_data.topics import topics

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    text = torch.tensor(list(" ".join(topics.values()).encode()))
    for step in range(num_steps):
        ids = text[step * 256 :][None, :256]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    blocks = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    embedding = model.get_input_embeddings().weight
    state = [optimizer.state[p] for p in blocks]
    return {
        "weight, bf16": flat([p.bfloat16().view(torch.int16) for p in blocks]),
        "exp_avg, fp32": flat([s["exp_avg"] for s in state]),
        "exp_avg_sq, fp32": flat([s["exp_avg_sq"] for s in state]),
        "exp_avg_sq of the embedding": flat([optimizer.state[embedding]["exp_avg_sq"]]),
    }


def flat(tensors: list[torch.Tensor]) -> np.ndarray:
    items = torch.cat([t.detach().flatten() for t in tensors]).numpy()
    items = items.view(np.uint32 if items.itemsize == 4 else np.uint16)
    return items[: len(items) // BLOCK_NBYTES * BLOCK_NBYTES]


def measure(name: str, items: np.ndarray, num_rounds: int) -> list[tuple[str, ...]]:
    """A row for each way: size, entropy's size, speed of packing and unpacking, and of memcpy."""
    raw = items.view(np.uint8)
    num_blocks, n = len(raw) // BLOCK_NBYTES, items.itemsize
    out = np.zeros((num_blocks, BLOCK_NBYTES + SLACK_NBYTES), np.uint8)
    back = np.zeros(num_blocks * BLOCK_NBYTES, np.uint8)
    lengths = np.zeros(num_blocks, np.int64)

    def pack(isa: str) -> None:
        for i in range(num_blocks):
            at = raw.ctypes.data + i * BLOCK_NBYTES
            lengths[i] = _native.pack_block(
                n, at, BLOCK_NBYTES, out[i].ctypes.data, out.shape[1], isa
            )

    def unpack(isa: str) -> None:
        for i in range(num_blocks):
            to = back.ctypes.data + i * BLOCK_NBYTES
            if not _native.unpack_block(
                n, out[i].ctypes.data, int(lengths[i]), to, BLOCK_NBYTES, isa
            ):
                raise SystemExit(f"{name} does not come back")

    def copy() -> None:
        for i in range(num_blocks):
            ctypes.memmove(out[i].ctypes.data, raw.ctypes.data + i * BLOCK_NBYTES, BLOCK_NBYTES)

    turns: dict[str, tuple[Turn, Turn]] = {"memcpy": (copy, copy)}
    for isa in _native.pack_isas():
        turns[isa] = (lambda isa=isa: pack(isa), lambda isa=isa: unpack(isa))
    seconds: dict[str, tuple[list[float], list[float]]] = {key: ([], []) for key in turns}
    for _ in range(num_rounds):
        for key, pair in turns.items():
            for turn, taken in zip(pair, seconds[key], strict=True):
                begin = time.perf_counter()
                turn()
                taken.append(time.perf_counter() - begin)
    if not (back == raw[: len(back)]).all():
        raise SystemExit(f"{name} comes back changed")
    begin = time.perf_counter()
    zipped = sum(
        len(zlib.compress(raw[i * BLOCK_NBYTES : (i + 1) * BLOCK_NBYTES], 1))
        for i in range(min(num_blocks, 64))
    ) / min(num_blocks, 64)  # fmt: skip
    zip_seconds = (time.perf_counter() - begin) / min(num_blocks, 64) * num_blocks
    size = lengths.sum() / len(back)

    def speed(taken: list[float]) -> str:
        return f"{len(back) / statistics.median(taken) / GB:.1f}"

    rows = [(name, "ideal code of exponents", f"{ideal(items):.3f}", "", "")]
    for key, taken in seconds.items():
        rows.append((name, key, "1" if key == "memcpy" else f"{size:.3f}", *map(speed, taken)))
    zip_speed = f"{len(back) / zip_seconds / GB:.2f}"
    rows.append((name, "zlib, level 1", f"{zipped / BLOCK_NBYTES:.3f}", zip_speed, ""))
    return rows


def ideal(items: np.ndarray) -> float:
    """The size with the exponents at their entropy over the whole plane, and all else as it is."""
    exponents = (items >> (23 if items.itemsize == 4 else 7)).astype(np.uint8)
    shares = np.bincount(exponents) / len(exponents)
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    return float((8 * items.itemsize - 8 + entropy) / (8 * items.itemsize))


def render(facts: dict[str, str], rows: list[tuple[str, ...]], options: argparse.Namespace) -> str:
    header = ("plane", "by", "size", "packing GB/s", "unpacking GB/s")
    return "\n".join(
        [
            "# Packing: bytes saved, and its speed\n",
            _train_report.table(("fact", "value"), list(facts.items())),
            "\nGB/s of plain bytes, on one thread, called from Python block by block; median of "
            f"{options.rounds} rounds in turns.\n",
            _train_report.table(header, rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
