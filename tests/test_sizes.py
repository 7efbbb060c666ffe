"""Sizes as people write and read them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import PolicyError
from offload.sizes import NBYTES_MAX, format_nbytes, parse_nbytes

# Tests share their cores, so no example is too slow.
UNHURRIED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KIB, MIB, GIB, TIB = (1024**power for power in range(1, 5))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (4096, 4096),
        (1e9, 10**9),
        ("4096", 4096),
        ("24GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        (" 512 MiB ", 512 * MIB),
        ("1.5GB", 1_500_000_000),
        ("1.5GiB", 1536 * MIB),
        ("100e6", 100_000_000),
        ("1e3KiB", 1000 * KIB),
        ("7B", 7),
        ("1kB", 1000),
        ("2TB", 2 * 10**12),
        ("1PiB", 1024 * TIB),
        ("0.7KiB", 716),  # rounds down: a limit never grows
        ("0.1GiB", 107374182),
        ("9223372036854775807", NBYTES_MAX),
        ("4.000000000000000001KiB", 4096),
    ],
)
def test_sizes(text: int | float | str, nbytes: int) -> None:
    got = parse_nbytes(text)
    assert got == nbytes and type(got) is int


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "1G",
        "1 GiB 2",
        "-1",
        "+1",
        "1.5.2GiB",
        "1,5GiB",
        "0x10",
        "nan",
        "inf",
        "1e",
        "1e-3",
    ]
    + ["9223372036854775808", "1e99PiB", "1e999999999", "9" * 5000, "١GiB", -1, 1.5]
    + [float("nan"), float("inf"), True, None, [], b"1GiB", NBYTES_MAX + 1],
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(PolicyError, match="is not a size: give bytes as an integer, or a number"):
        parse_nbytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0B"),
        (1, "1B"),
        (1000, "1000B"),
        (1023, "1023B"),
        (KIB, "1KiB"),
        (KIB + 1, "1025B"),
        (1536, "1.5KiB"),
        (100 * KIB, "100KiB"),
        (48 * GIB, "48GiB"),
        (GIB + GIB // 8, "1.125GiB"),
        (GIB + GIB // 16, "1088MiB"),  # 1.0625 GiB has four decimals
        (GIB + 4096, "1048580KiB"),
        (1000 * TIB, "1000TiB"),
        (3 * 1024 * TIB, "3PiB"),
        (-1536 * MIB, "-1.5GiB"),
    ],
)
def test_sizes_are_shown_exactly(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


@UNHURRIED
@given(st.integers(0, NBYTES_MAX) | st.integers(0, 2**33).map(lambda pages: pages * 4096))
def test_a_shown_size_reads_back(nbytes: int) -> None:
    assert parse_nbytes(format_nbytes(nbytes)) == nbytes


@UNHURRIED
@given(st.text() | st.floats() | st.integers() | st.none())
def test_any_size_is_read_or_refused(value: Any) -> None:
    try:
        assert 0 <= parse_nbytes(value) <= NBYTES_MAX
    except PolicyError as error:
        assert "is not a size" in str(error)
