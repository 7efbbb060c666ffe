"""The native module where the system refuses or interrupts it, each time in its own process."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from seccomp import CLONE, CLONE3, IO_URING_REGISTER, IO_URING_SETUP

from offload import _native
from offload._native import uring_probe

PAGE = 4096
BLOCK = 1 << 16
DEADLINE_S = 60.0

needs_uring = pytest.mark.skipif(uring_probe() != 0, reason="io_uring is refused here")
BACKENDS = [pytest.param("uring", marks=needs_uring), "threads"]


def script(code: str) -> list[str]:
    """The command for a fresh interpreter that has the native module alone, without torch."""
    folders = [str(Path(_native.__file__).parent), str(Path(__file__).resolve().parent)]
    prelude = f"import sys; sys.path.extend({folders!r})\n"
    return [sys.executable, "-c", prelude + textwrap.dedent(code)]


def run_python(code: str, prelude: str = "") -> str:
    """Run a script in a fresh interpreter and return what it prints."""
    command = script(prelude + textwrap.dedent(code))
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_injected(folder: Path, inject: list[str], backend: str) -> str:
    """Read a file in 16 blocks while strace makes system calls fail; return what came of it."""
    path = folder / "swap"
    path.write_bytes(b"x" * BLOCK)
    code = f"""
        import ctypes, os
        from _native import IoQueue
        buffer = ctypes.create_string_buffer({BLOCK})
        queue = IoQueue({backend!r}, 1, {PAGE}, 1)
        fd = os.open({str(path)!r}, os.O_RDONLY)
        queue.submit(0, 0, 0, [(fd, 0, ctypes.addressof(buffer), {BLOCK})])
        print(queue.wait(30.0)[0][1], queue.stats()["num_retries"], set(buffer.raw))
    """
    command = ["strace", "-f", "-qq", "-o", str(folder / "log"), "-e", *inject]
    command += script(code)
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    if "ptrace" in done.stderr:
        pytest.skip("ptrace is refused here")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@needs_strace
@pytest.mark.parametrize("name", ["EINTR", "EAGAIN"])
def test_interrupted_calls_are_retried(tmp_path: Path, name: str) -> None:
    inject = [f"inject=pread64:error={name}:when=1+2", "-P", str(tmp_path / "swap")]
    assert run_injected(tmp_path, inject, "threads") == f"{BLOCK} {BLOCK // PAGE} {{120}}"


@needs_strace
def test_retries_end(tmp_path: Path) -> None:
    inject = ["inject=pread64:error=EAGAIN", "-P", str(tmp_path / "swap")]
    result, num_retries, values = run_injected(tmp_path, inject, "threads").split()
    assert (int(result), values) == (-errno.EAGAIN, "{0}")
    assert 1 < int(num_retries) < 1000


@needs_strace
@needs_uring
@pytest.mark.parametrize("num_refused", [1, 2])
def test_older_kernels_get_a_plainer_ring(tmp_path: Path, num_refused: int) -> None:
    inject = [f"inject=io_uring_setup:error=EINVAL:when=1..{num_refused}"]
    assert run_injected(tmp_path, inject, "uring") == f"{BLOCK} 0 {{120}}"
    assert (tmp_path / "log").read_text().count("io_uring_setup(") == num_refused + 1


@needs_strace
@needs_uring
def test_pump_survives_a_busy_kernel(tmp_path: Path) -> None:
    inject = ["inject=io_uring_enter:error=EBUSY:when=1+3"]
    assert run_injected(tmp_path, inject, "uring") == f"{BLOCK} 0 {{120}}"


FORBID = """
import errno
from _native import IoQueue, uring_probe
from seccomp import forbid

def refusal(backend):
    try:
        IoQueue(backend, 4, 4096, 3).close()
    except OSError as refused:
        return refused.errno
    return 0
"""
linux_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 call numbers")


@linux_x86
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.ENOMEM])
@pytest.mark.parametrize("call", [IO_URING_SETUP, IO_URING_REGISTER], ids=["setup", "register"])
def test_refused_io_uring_is_an_oserror(call: int, error: int) -> None:
    code = f"""
        forbid({call}, {error})
        print(uring_probe(), refusal("uring"), refusal("threads"))
    """
    assert run_python(code, FORBID) == f"{-error} {error} 0"


@linux_x86
@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_threads_are_an_oserror(backend: str) -> None:
    code = f"""
        forbid({CLONE3}, errno.ENOSYS)
        forbid({CLONE}, errno.EAGAIN)
        print(refusal("{backend}"))
    """
    assert run_python(code, FORBID) == str(errno.EAGAIN)
