"""One short training run with one fault in it, and everything that must hold afterwards.

A run ends in one of two ways. It survives: every hash is that of an undisturbed run. Or it is
refused: one StorageError says which chunk, file and offset, and the engine does nothing more. In
both nothing is left behind, and a parameter holds right weights or visibly none.
"""

import errno
import faulthandler
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import twins
from chaos import patched, small_units
from conftest import native_threads, open_files
from fault_plans import ERRORS, KINDS, Rule, at, fault_backend, faults, num_injected
from parity import Recipe, Record, assert_same, bits, make_policy, train
from torch import nn
from torch_rig import ADAFACTOR, Case
from zoo import ZOO

import offload
from offload.engine import Engine
from offload.slots import SlotPool

RUN_SECONDS_MAX = 30.0  # a run takes a tenth of a second
RECIPE = Recipe(steps=3)
MODEL = ZOO["shared_block"]
ONE_SLOT = {"tiers__cpu__weight_slots": 1, "tiers__cpu__grad_slots": 1}


@dataclass(frozen=True)
class Mode:
    """How a run trains; `case` is an optimizer of torch in the place of AdamW."""

    update: str
    changes: dict[str, Any] = field(default_factory=dict)  # to the policy
    format: str = "exact"
    case: Case | None = None


MODES = {  # few operations, and between them every way that a byte can take
    "eager": Mode("eager", ONE_SLOT),
    "deferred": Mode("deferred"),
}
TORCH_MODES = {
    "RMSprop": Mode("eager", ONE_SLOT, case=Case("RMSprop", {"momentum": 0.9})),
    "RMSprop int8": Mode("deferred", format="int8", case=Case("RMSprop", {"momentum": 0.9})),
    "Adafactor": Mode("deferred", case=ADAFACTOR),
    "Adafactor int8": Mode("eager", ONE_SLOT, format="int8", case=ADAFACTOR),
}
ALL_MODES = MODES | TORCH_MODES


class Hang(BaseException):
    """A run that does not end. Nothing that handles errors may swallow it."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise Hang in the main thread when the time is up; where even that does not help, end the
    process and show where it stood.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGUSR1, stop)
    main = threading.main_thread().ident
    timer = threading.Timer(seconds, lambda: signal.pthread_kill(main or 0, signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + RUN_SECONDS_MAX, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    record: Record
    initial: dict[str, set[str]]  # hashes that the model's parameters may have before
    final: dict[str, str]  # and after


@dataclass
class Row:
    """What a campaign has counted for one kind of fault."""

    kind: str
    injected: int = 0
    survived: int = 0
    refused: int = 0


REFERENCES: dict[tuple[str, bool | None], Reference] = {}  # by mode and checksum; they never differ


@dataclass
class Campaign:
    """Runs of one model in one mode on one folder, compared with the undisturbed one."""

    directory: Path
    mode: str
    checksum: bool | None = None  # None: as the policy does without being told
    moved_in: bool = False  # the present run got beyond construction

    @property
    def paths(self) -> list[Path]:
        return [self.directory / "a", self.directory / "b"]

    @property
    def how(self) -> Mode:
        return ALL_MODES[self.mode]

    def policy(self) -> dict[str, Any]:
        paths = [str(path) for path in self.paths]
        changes = {} if self.checksum is None else {"tiers__nvme__checksum": self.checksum}
        policy = make_policy(
            self.directory,
            format=self.how.format,
            tiers__nvme__paths=paths,
            optimizer__update=self.how.update,
            **self.how.changes,
            **changes,
        )
        return policy if self.how.case is None else self.how.case.policy(policy)

    @property
    def make(self) -> Callable[..., Any]:
        """Makes the optimizer."""
        return offload.AdamW if self.how.case is None else self.how.case.make

    @property
    def reference(self) -> Reference:
        """The undisturbed run, made once."""
        key = (self.mode, self.checksum)
        if key not in REFERENCES:
            model = MODEL.make_model()
            initial = untrained(model, self.how.format)
            with faults([]), small_units(1024), fault_backend(), audited():
                record = self._train(model)
            REFERENCES[key] = Reference(record, initial, hashes(model))
        return REFERENCES[key]

    def strike(self, rules: list[Rule], *, seed: int = 0) -> offload.StorageError | None:
        """Run under a plan, check all that must hold, and return the error it was refused with."""
        reference = self.reference
        model = MODEL.make_model()
        error: offload.StorageError | None = None
        record: Record | None = None
        with bounded(RUN_SECONDS_MAX):
            threads, files = native_threads(), open_files()
            with faults(rules, seed=seed), small_units(1024), fault_backend(), audited():
                try:
                    record = self._train(model)
                except offload.StorageError as caught:
                    error = caught
            self._check_nothing_left(threads, files)
        if error is None:
            assert record is not None
            assert_same(record, reference.record)
        else:
            self._check_clear(error)
        self._check_weights(model, error)
        return error

    def _train(self, model: nn.Module) -> Record:
        self.moved_in = False
        with offload.offload(model, self.policy()) as engine:
            self.moved_in = True
            try:
                grads = self.how.update == "deferred"
                return train(
                    engine, MODEL, RECIPE, self.how.format, grads=grads, make=self.make
                ).record
            except offload.StorageError as first:
                with pytest.raises(offload.StateError, match="earlier error") as later:
                    engine.flush()
                assert str(first) in str(later.value) and later.value.__cause__ is first
                raise

    def _check_clear(self, error: offload.StorageError) -> None:
        """It names the chunk, the file and the place; no second error of storage hides behind."""
        assert error.path in {str(path / "offload.swap") for path in self.paths}
        assert error.chunk and error.chunk in str(error)
        assert error.offset >= 0 and error.offset % 4096 == 0
        assert f"at offset {error.offset} " in str(error) and error.path in str(error)
        assert errno.errorcode[error.errno or 0] in str(error)
        seen: BaseException | None = error
        while (seen := seen.__context__) is not None:
            assert not isinstance(seen, offload.StorageError), f"a second error: {seen}"

    def _check_nothing_left(self, threads: set[int], files: set[str]) -> None:
        deadline = time.monotonic() + 3.0  # the kernel forgets a joined thread a little later
        while native_threads() - threads and time.monotonic() < deadline:
            time.sleep(1e-3)
        assert not native_threads() - threads, "a thread is left"
        assert not open_files() - files, f"files left open: {open_files() - files}"
        left = [file.name for path in self.paths for file in path.glob("*")]
        assert not left, f"files left behind: {left}"

    def _check_weights(self, model: nn.Module, error: offload.StorageError | None) -> None:
        """Every parameter holds what training made of it, or after an error NaN alone; but what it
        had before, where nothing has been trained yet and one fault was all.
        """
        for name, hashed in hashes(model).items():
            if hashed == self.reference.final[name]:
                continue
            assert error is not None, f"{name} is not back"
            may_be_absent = self.moved_in or num_injected() > 1
            if may_be_absent and model.get_parameter(name).isnan().all():
                continue
            assert not self.moved_in, f"{name} holds something else"
            assert hashed in self.reference.initial[name], f"{name} holds something else"


def untrained(model: nn.Module, format: str) -> dict[str, set[str]]:
    """Hashes of the parameters as they are, and as they come back from the tiers untrained."""
    found = {name: {hashed} for name, hashed in hashes(model).items()}
    if format == "int8":
        for name, param in model.named_parameters():
            flat = param.detach().numpy().reshape(-1)
            rounded = twins.join_fp24(*twins.split_fp24(flat))
            found[name].add(bits(torch.from_numpy(rounded)))
    return found


def hashes(model: nn.Module) -> dict[str, str]:
    return {name: bits(param) for name, param in model.named_parameters()}


# Slots


@contextmanager
def audited() -> Iterator[None]:
    """Check every engine just before it closes, when nothing is in flight any more."""
    close = Engine.close
    pools: list[SlotPool] = []
    make = SlotPool.__init__

    def known(pool: SlotPool, *args: Any, **kwargs: Any) -> None:
        make(pool, *args, **kwargs)
        pools.append(pool)

    def checked_close(engine: Engine, **how: Any) -> None:
        engine.drain()
        try:
            check_slots(engine, pools)
        finally:
            close(engine, **how)

    with patched(Engine, close=checked_close), patched(SlotPool, __init__=known):
        yield


def check_slots(engine: Engine, pools: list[SlotPool]) -> None:
    """Every slot is free, or in the hands of one chunk that knows of it."""
    held = [chunk.slot for chunk in engine.chunks if chunk.slot is not None]
    for chunk in engine.chunks:
        if chunk.gradient is not None:
            held += [s for s in (chunk.gradient.hi, chunk.gradient.lo) if s is not None]
    assert len({id(slot) for slot in held}) == len(held), "a slot has two owners"
    for pool in pools:
        num_held = sum(slot.pool is pool for slot in held)
        assert pool.num_free + num_held == len(pool.slots), f"{pool.name} has lost a slot"


# Campaigns

Judge = Callable[[offload.StorageError | None], None]


def survives(error: offload.StorageError | None) -> None:
    if error is not None:
        raise error


def is_refused(kind: str) -> Judge:
    def judge(error: offload.StorageError | None) -> None:
        assert error is not None, f"{kind} was swallowed"
        assert error.errno == getattr(errno, kind.upper())

    return judge


def judge_of(kind: str) -> Judge:
    return is_refused(kind) if kind in ERRORS else survives


def campaign(
    runs: Campaign,
    kind: str,
    *,
    stride: int,
    judge: Judge,
) -> Row:
    """Strike operation 1, 1 + stride, ... until a whole run passes untouched."""
    row, number = Row(kind), 1
    while True:
        error = runs.strike(at(kind, number))
        if num_injected() == 0:
            assert error is None
            return row
        judge(error)
        row.injected += num_injected()
        row.survived += error is None
        row.refused += error is not None
        number += stride


def table(rows: list[tuple[str, Row]]) -> str:
    """The counts as text."""
    lines = [f"{'mode':16}{'kind':12}{'injected':>9}{'survived':>9}{'refused':>9}"]
    for mode, row in sorted(rows, key=lambda pair: (pair[0], KINDS.index(pair[1].kind))):
        lines.append(f"{mode:16}{row.kind:12}{row.injected:9}{row.survived:9}{row.refused:9}")
    return "\n".join(lines)
