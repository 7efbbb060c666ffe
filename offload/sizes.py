"""Values as people write and read them: sizes, options, what messages show."""

from __future__ import annotations

import re
import reprlib
from fractions import Fraction
from typing import Any

from offload.errors import PolicyError

NBYTES_MAX = 2**63 - 1  # a file offset is a signed 64-bit number

# The classes of torch.optim that run here, and why others do not.
TORCH_NAMES = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD"),
)
TORCH_REFUSED = {
    "LBFGS": "it calls the loss several times a step, and needs all parameters at once",
    "Muon": "it takes matrices only, and a model has one optimizer here",
    "SparseAdam": "it takes sparse gradients, which have no place in the tiers",
}

_DECIMAL = {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", start=1)}
_BINARY = {f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", start=1)}
_UNITS = {"": 1, "b": 1, **_DECIMAL, **_BINARY}
_SIZE = re.compile(r"\s*([0-9]{1,20}(\.[0-9]{1,20})?([eE]\+?[0-9]{1,2})?)\s*([A-Za-z]*)\s*")
_REPR = reprlib.Repr()  # values in messages, cut at a readable length
_REPR.maxstring = _REPR.maxother = 120


class FrozenOptions(dict[str, Any]):
    """A mapping of plain values that may be part of something hashable; nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


def show(value: object) -> str:
    """A value for a message."""
    return _REPR.repr(value)


def parse_nbytes(value: float | str) -> int:
    """Return the bytes of 4096, "24GiB", "512 MiB", "1.5GB" or "100e6"; a fraction rounds down.

    Raises PolicyError for anything that is not a size from 0 to NBYTES_MAX.
    """
    nbytes: Fraction | None = None
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match and match[4].lower() in _UNITS:
            nbytes = Fraction(match[1]) * _UNITS[match[4].lower()]
    elif not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    ):  # YAML reads 1.0e+9 as a float
        nbytes = Fraction(value)
    if nbytes is None or not 0 <= nbytes <= NBYTES_MAX:
        raise PolicyError(
            f"{show(value)} is not a size: give bytes as an integer, or a number with a unit, "
            "such as 24GiB, 512MiB or 1.5GB"
        )
    return int(nbytes)


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
