"""Fuzz target: whatever a manifest's bytes are, they are refused in words, or pass every check.

python tests/fuzz/fuzz_manifest.py [SECONDS]   # atheris where it is installed, else a plain loop
"""

import contextlib
import json
import random
import sys
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    if __name__ != "__main__":  # tests run the plain loop
        raise ImportError
    import atheris  # type: ignore[import-not-found]

    covered = atheris.instrument_imports(include=["offload.manifest"])
except ImportError:
    atheris, covered = None, contextlib.nullcontext()
with covered:
    from offload.manifest import decode, encode, unpack_tensor  # noqa: E402
from offload.errors import StateError, StorageError  # noqa: E402

BLOCK = 65536
VALUES: list[Any] = [
    0, -1, 1, 4096, 4097, 2**31, 2**53, 2**63, 10**30, -(10**30), 1.5, 1e308, float("nan"),
    float("inf"), None, True, False, "", "weight", "/etc/passwd", "../../x", "x" * 5000, "\x00",
    [], {}, [[]], [0, 4096, 4096], {"weight": None}, "\ud83d\ude00", "run", "checkpoint",
]  # fmt: skip


def valid_tree(num_chunks: int = 2, num_files: int = 2) -> dict[str, Any]:
    """The JSON of a valid manifest, with two versions of every plane over all files."""
    ends = [4096] * num_files
    blocks = 0

    def extent(nbytes: int) -> list[list[int]]:
        share = -(-nbytes // num_files // BLOCK) * BLOCK
        pieces = []
        for file in range(num_files):
            piece = min(share, nbytes - sum(p[2] for p in pieces))
            if piece:
                pieces.append([file, ends[file], piece])
                ends[file] += piece
        return pieces

    chunks = []
    for index in range(num_chunks):
        numel = 65536 * (index + 1)
        planes = {}
        for name, itemsize in (("weight", 2), ("residue", 2), ("exp_avg", 4), ("exp_avg_sq", 4)):
            extents = [extent(numel * itemsize) for _ in range(2)]
            planes[name] = {"extents": extents, "committed": index % 2}
            blocks += sum(-(-piece[2] // BLOCK) for piece in extents[index % 2])
        param = {
            "name": f"layers.{index}.weight", "shape": [256, numel // 512], "offset": 0,
            "numel": numel // 2, "trainable": True,
        }  # fmt: skip
        chunks.append(
            {"name": f"layers.{index}", "numel": numel, "params": [param], "num_steps": [3],
             "planes": planes}
        )  # fmt: skip
    return {
        "run": "0123456789abcdef" * 2, "step": 3, "state_format": "exact", "file_nbytes": ends,
        "checksums": {"slot": 1, "block_nbytes": BLOCK, "nbytes": 4 * blocks, "crc32": 12345},
        "chunks": chunks, "rng": {"cpu": "AAAA"}, "progress": {"next": 4, "losses": [1.5, 2]},
        "buffers": {"mean": {"dtype": "float32", "shape": [1], "data": "AACAPw=="}}, "kind": "run",
    }  # fmt: skip


def sealed(body: bytes) -> bytes:
    """A body below a head that is right for it."""
    return b"offload-manifest 1 %08x %d\n" % (zlib.crc32(body), len(body)) + body


def seal(tree: Any) -> bytes:
    return sealed(json.dumps(tree).encode("utf-8", "surrogatepass"))


def places_of(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        found.append((tree, key))
        if isinstance(value, dict | list):
            found += places_of(value)
    return found


def mutate_tree(tree: dict[str, Any], dice: random.Random) -> None:
    """One hostile edit: a value replaced, nudged, removed, doubled, or swapped with another."""
    places = places_of(tree)
    (owner, key), (other, name) = dice.choice(places), dice.choice(places)
    kind = dice.randrange(6)
    if kind == 0:
        owner[key] = dice.choice(VALUES)
    elif kind == 1 and isinstance(owner[key], int):
        owner[key] += dice.choice([-1, 1, -4096, 4096, 65536, 2**40])
    elif kind == 2:
        del owner[key]
    elif kind == 3 and isinstance(owner, list):
        owner.insert(key, json.loads(json.dumps(owner[key])))
    elif kind == 4:
        first, second = json.dumps(owner[key]), json.dumps(other[name])
        owner[key] = json.loads(second)
        if isinstance(other, dict) or name < len(other):
            other[name] = json.loads(first)
    elif isinstance(owner, dict):
        owner[str(dice.choice(VALUES))] = dice.choice(VALUES)


def mutate_bytes(content: bytes, dice: random.Random) -> bytes:
    """One edit of the bytes: flipped, cut, inserted, or spliced from elsewhere in them."""
    at, to = sorted(dice.randrange(len(content) + 1) for _ in range(2))
    kind = dice.randrange(4)
    if kind == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ (1 << dice.randrange(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + content[to:]
    if kind == 2:
        return content[:at] + dice.randbytes(dice.randrange(1, 20)) + content[at:]
    return content[:at] + content[to:] + content[at:to]


def check(content: bytes) -> bool:
    """Decode; whether it was accepted. Raises what is no refusal, and where a check has let
    something through.
    """
    try:
        manifest = decode(content, "here")
    except (StorageError, StateError):
        return False
    again = decode(encode(manifest), "here")
    if encode(again) != encode(manifest):
        raise AssertionError("encode and decode do not agree")
    ranges = [
        piece
        for _, _, record in manifest.planes()
        for extent in record.restored().extents
        for piece in extent.pieces
    ]
    last = (-1, 0)
    for file, offset, nbytes in sorted(ranges):
        if not 4096 <= offset < offset + nbytes <= manifest.file_nbytes[file]:
            raise AssertionError(f"piece {(file, offset, nbytes)} lies outside")
        if file == last[0] and offset < last[1]:
            raise AssertionError(f"piece {(file, offset, nbytes)} overlaps")
        last = (file, offset + nbytes)
    for name, record in manifest.buffers.items():
        with contextlib.suppress(StateError):
            unpack_tensor(record, name)
    return True


def hostile(dice: random.Random) -> bytes:
    """A manifest that was valid."""
    tree = valid_tree()
    kind = dice.randrange(3)
    if kind == 0:
        return mutate_bytes(seal(tree), dice)
    if kind == 1:
        return sealed(mutate_bytes(json.dumps(tree).encode(), dice))
    for _ in range(dice.randrange(1, 4)):
        if places_of(tree):
            mutate_tree(tree, dice)
    return seal(tree)


def plain_loop(seconds: float, seed: int = 0) -> tuple[int, int]:
    """Mutate for so long; how many were tried, and accepted."""
    dice, end = random.Random(seed), time.monotonic() + seconds
    tried = accepted = 0
    while time.monotonic() < end:
        accepted += check(hostile(dice))
        tried += 1
    return tried, accepted


def one_input(data: bytes) -> None:
    """For atheris: the first byte says what the others are."""
    if not data:
        return
    if data[0] % 3 == 0:
        check(data[1:])
    elif data[0] % 3 == 1:
        check(sealed(data[1:]))
    else:
        check(hostile(random.Random(data[1:])))


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    if atheris is None:
        tried, accepted = plain_loop(seconds, seed=time.time_ns())
        print(f"{tried} executions, {accepted} accepted")
        return
    limits = [f"-max_total_time={int(seconds)}", "-max_len=65536", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
