"""The other side of test_real_faults.py: a process that imports torch once, and forks for each
trial, so that nothing of one trial reaches the next and a hang costs one child.

A trial trains a tiny model twice in its child: on the drive under test, where a fault strikes, and
then on a healthy folder, beside whatever the fault has left. Training in RAM, before the first
fork, gave the hashes to compare with. Requests and answers are lines of JSON on stdin and stdout.
"""

import dataclasses
import errno
import faulthandler
import gc
import itertools
import json
import logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import seccomp
import torch
from drives import fill, num_hits, set_rules, shut_down
from leaks import native_threads, num_locks, open_files
from parity import Recipe, Record, bits, make_policy, small_units, train
from torch import nn
from zoo import ZOO, ZooModel

import offload
from offload.formats import Plane

ENTRY = ZOO["linear_list"]
RECIPE = Recipe(steps=3)
LIMIT_S = 60.0
NOBODY = 65534
Request = dict[str, Any]


class Log(logging.Handler):
    """Keeps what a user would see on the console."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


# What goes wrong, and when


def strike(request: Request, engine: Any) -> None:
    """Do to the drive what the request says."""
    fault = request["fault"]
    if fault.get("settled"):  # nothing in flight: the next transfer is the first to notice
        engine.flush()
    if fault["kind"] == "shut_down":
        shut_down(Path(fault["point"]))
    elif fault["kind"] == "truncate":
        os.truncate(fault["image"], fault["nbytes"])
    elif fault["kind"] == "fill":
        fill(Path(fault["folder"]))
    elif fault["kind"] == "rules":
        set_rules(Path(fault["path"]), [rule_of(engine, rule) for rule in fault["rules"]])
    else:
        raise ValueError(fault["kind"])


def rule_of(engine: Any, rule: dict[str, Any]) -> dict[str, Any]:
    """A rule of fuse_drive.py, with the bytes of the named plane of the named chunk filled in."""
    if "plane" not in rule:
        return {"begin": 0, "end": 1 << 62, "times": 1 << 30, "name": "offload.swap", **rule}
    chunk = next(c for c in engine._engine.chunks if c.name == rule["chunk"])
    ((_, begin, nbytes),) = chunk.extents[Plane(rule["plane"])].newest.pieces
    place = {"begin": begin, "end": begin + nbytes, "name": "offload.swap"}
    return {"times": 1 << 30, **place, **rule}


def struck(request: Request, entry: ZooModel, get_engine: Callable[[], Any]) -> ZooModel:
    """The model, whose loss lets the fault strike at (step, before forward or before backward)."""
    steps = itertools.count()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        step = next(steps)
        if request.get("when") == [step, "forward"]:
            strike(request, get_engine())
        value = entry.loss(model, batch)
        if request.get("when") == [step, "backward"]:
            strike(request, get_engine())
        return value

    return dataclasses.replace(entry, loss=loss)


def become(what: str) -> None:
    """Change what this process may do, for good."""
    if what == "without io_uring":
        seccomp.forbid(seccomp.IO_URING_SETUP, errno.EPERM)
    elif what == "a user with 64 KiB of locked memory":
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    elif what:
        raise ValueError(what)


# A trial


def policy_of(request: Request, paths: list[str]) -> dict[str, Any]:
    return make_policy(
        Path(),
        tiers__nvme__paths=paths,
        tiers__nvme__io=request["io"],
        optimizer__update=request["update"],
    )


def weights(model: nn.Module) -> Record:
    return {name: bits(p) for name, p in model.named_parameters()}


def train_in(policy: dict[str, Any], request: Request) -> tuple[Record, Record]:
    """The hashes of a training, and those of the weights that it gave back."""
    model, grads = ENTRY.make_model(), request["update"] != "eager"
    with offload.offload(model, policy) as engine:
        record = train(engine, ENTRY, RECIPE, "exact", grads=grads).record
    return record, weights(model)


def reference(update: str) -> tuple[Record, Record]:
    """The same training without a drive."""
    request = {"io": "threads", "update": update}
    policy = policy_of(request, [])
    policy["tiers"] |= {"nvme": None, "cpu": {"budget": "256MiB"}}
    return train_in(policy, request)


def describe(error: BaseException) -> dict[str, Any]:
    names = ("errno", "path", "offset", "chunk")
    facts = {name: getattr(error, name, None) for name in names}
    return {"type": type(error).__name__, "text": str(error), **facts}


def train_faulted(request: Request, answer: dict[str, Any], model: nn.Module) -> Record | None:
    """Train under the fault; None, and the error in `answer`, where that ends the run."""
    engine: Any = None
    entry = struck(request, ENTRY, lambda: engine)
    if request.get("when") == "start":
        strike(request, None)
    try:
        with offload.offload(model, policy_of(request, request["paths"])) as engine:
            try:
                grads = request["update"] != "eager"
                return train(engine, entry, RECIPE, "exact", grads=grads).record
            except offload.StorageError:
                answer["later"] = later_call(engine)
                raise
    except Exception as error:
        answer["error"] = describe(error)
        return None


def later_call(engine: Any) -> dict[str, Any] | None:
    """What a call after the error gives."""
    try:
        engine.flush()
    except Exception as error:
        return describe(error)
    return None


def what_model_holds(model: nn.Module, trained: Record) -> str:
    if weights(model) == weights(ENTRY.make_model()):
        return "its own weights"
    if weights(model) == trained:
        return "trained weights"
    if all(bool(p.isnan().all()) for p in model.parameters()):
        return "placeholders"
    return "something else"


def settle(threads: set[int]) -> None:
    """Give threads that were told to end a moment."""
    deadline = time.monotonic() + 3.0
    while native_threads() - threads and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)


def leftovers(paths: list[str]) -> list[str]:
    """Files in the run's folders; of a folder that cannot be read, its error."""
    found = []
    for path in map(Path, paths):
        try:
            found += [file.name for file in path.iterdir()]
        except OSError as error:
            found.append(errno.errorcode[error.errno or 0])
    return sorted(name for name in found if name != "lost+found")


def trial(request: Request, want: tuple[Record, Record]) -> dict[str, Any]:
    answer: dict[str, Any] = {"error": None, "later": None}
    become(request.get("become", ""))
    log = Log()
    logging.getLogger("offload").addHandler(log)
    threads, files = native_threads(), open_files()
    model = ENTRY.make_model()
    start = time.perf_counter()
    got = train_faulted(request, answer, model)
    answer["seconds"] = time.perf_counter() - start
    answer["same"] = got == want[0]
    answer["model"] = what_model_holds(model, want[1])
    answer["log"] = list(log.lines)
    settle(threads)
    answer["threads"] = len(native_threads() - threads)
    answer["fds"] = sorted(open_files() - files)
    answer["locks"] = num_locks()
    answer["files"] = leftovers(request["paths"])
    answer["hits"] = num_hits(Path(request["fault"]["path"])) if "rules" in str(request) else 0
    healthy = policy_of(request, [request["healthy"]])
    answer["healthy"] = train_in(healthy, request) == want
    return answer


def answer_in_child(request: Request, want: tuple[Record, Record]) -> None:
    """Answer on stdout and end; a hang ends with the stacks of all threads on stderr."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    try:
        os.write(1, (json.dumps(trial(request, want)) + "\n").encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def serve() -> None:
    """The first training imports a good part of torch, so it happens here, once."""
    torch.set_num_threads(1)
    wanted = {update: reference(update) for update in ("deferred", "eager")}
    if len(native_threads()) != 1:
        raise RuntimeError("a process with threads cannot be forked")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            answer_in_child(request, wanted[request["update"]])
        _, status = os.waitpid(child, 0)
        if status != 0:
            os.write(1, (json.dumps({"died": status}) + "\n").encode())


if __name__ == "__main__":
    with small_units(1024):
        serve()
