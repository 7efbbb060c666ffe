"""Builds offload._native: one binary for every CPython from 3.11 on (limited API, abi3)."""

from glob import glob

from setuptools import Extension, setup

native = Extension(
    "offload._native",
    sources=sorted(glob("csrc/*.cpp")),
    depends=[*sorted(glob("csrc/*.h")), "setup.py"],
    language="c++",
    py_limited_api=True,
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",  # many interpreters are built with -g, which makes the wheel ten times larger
        "-fno-math-errno",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fvisibility=hidden",
        "-pthread",
    ],
    extra_link_args=["-pthread"],
)

setup(
    ext_modules=[native],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
