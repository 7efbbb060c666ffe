"""The slow twin of packing: one group after the other, in numpy and plain Python."""

import numpy as np

GROUP_NUMEL = 64
ESCAPE = 7


def pack_twin(items: np.ndarray) -> bytes:
    """What [Note: packed runs] in csrc/pack.h says, even where it takes more bytes than `items`."""
    return b"".join(_pack_group(items[i : i + GROUP_NUMEL]) for i in range(0, len(items), 64))


def _pack_group(items: np.ndarray) -> bytes:
    if not items.any():
        return b"\0"
    mantissa_bits = 23 if items.itemsize == 4 else 7
    bits = [int(item) for item in items]
    exponents = [bit >> mantissa_bits & 0xFF for bit in bits]
    base = max(1, *exponents)
    codes = [min(base - exponent, ESCAPE) for exponent in exponents]
    words = [sum((code >> k & 1) << i for i, code in enumerate(codes)) for k in range(3)]
    sign_shift = 8 * items.itemsize - 1
    rests = [
        bit & ((1 << mantissa_bits) - 1) | (bit >> sign_shift) << mantissa_bits for bit in bits
    ]
    escapes = bytes(e for e, code in zip(exponents, codes, strict=True) if code == ESCAPE)
    return (
        bytes([base])
        + b"".join(word.to_bytes(8, "little") for word in words)
        + b"".join(rest.to_bytes(items.itemsize - 1, "little") for rest in rests)
        + escapes
    )
