"""Sizes in bytes, written for people."""

from __future__ import annotations


def format_nbytes(nbytes: int) -> str:
    """Return the size in the largest binary unit that shows it exactly in at most three decimals.

    Exact, so that a size from a message can be pasted into the YAML: parse_nbytes reads it back.
    """
    for letter, power in zip("PTGMK", range(5, 0, -1), strict=True):
        milli, rest = divmod(abs(nbytes) * 1000, 1024**power)
        if milli >= 1000 and rest == 0:
            whole = f"{milli // 1000}.{milli % 1000:03d}".rstrip("0").rstrip(".")
            return f"{'-' * (nbytes < 0)}{whole}{letter}iB"
    return f"{nbytes}B"


def short_nbytes(nbytes: int) -> str:
    """A size for reading, not for pasting: three or four digits."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << power:
            digits = 2 if power == 30 else 0
            return f"{nbytes / (1 << power):.{digits}f} {unit}"
    return f"{nbytes} B"
