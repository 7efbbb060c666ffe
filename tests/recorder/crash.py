"""What a crash could leave of a directory, rebuilt from a recording.

The model: what a sync covered is there. A sync covers, for a file, its writes and sizes, and for a
folder, its names, as far as those calls had ended when the sync began; and the sync must have ended
well before the crash. Everything else that had begun may be there or not, each on its own: writes,
sizes, new names, renames, removals. Of a write that is not covered a prefix may be there. A rename
is whole or absent. A call that failed has changed nothing. The base is there from the start.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from recorder.log import Call, Recording, Tree

SYNCED_WRITES = os.O_DSYNC | os.O_SYNC  # these descriptors need no sync after a write


@dataclass(eq=False)
class Node:
    """A file or a folder, whatever its names."""

    is_folder: bool
    content: bytearray = field(default_factory=bytearray)
    names: dict[str, Node] = field(default_factory=dict)


@dataclass(eq=False)
class Operation:
    """One change, of one node's content or of the names in folders."""

    call: Call
    touched: tuple[Node, ...]  # all need a sync: a file, or the folders whose names change
    apply: Callable[[State, float], None]  # the second argument is the part of a write
    durable_at: int | None = None  # the event from which a crash cannot undo it

    @property
    def is_write(self) -> bool:
        return self.call.kind == "write"


class State:
    """Contents and names while they are rebuilt, apart from the nodes of the live view."""

    def __init__(self, base: dict[Node, tuple[bytes, dict[str, Node]]]) -> None:
        self.contents = {node: bytearray(content) for node, (content, _) in base.items()}
        self.names = {node: dict(names) for node, (_, names) in base.items()}

    def content(self, node: Node) -> bytearray:
        return self.contents.setdefault(node, bytearray())

    def folder(self, node: Node) -> dict[str, Node]:
        return self.names.setdefault(node, {})


Choose = Callable[[Operation], float]  # how much of an operation is there: 0, 1, of a write between


@dataclass
class Seeded:
    """Each operation there or not, each write whole, absent or cut; the same for the same seed."""

    seed: int
    unit_nbytes: int = 512  # what a drive writes whole

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)

    def __call__(self, operation: Operation) -> float:
        kind = self._dice.randrange(3 if operation.is_write else 2)
        if kind < 2 or not operation.call.data:
            return float(kind % 2)
        begin, nbytes = operation.call.offset, len(operation.call.data)
        first = begin // self.unit_nbytes + 1
        cuts = range(first * self.unit_nbytes, begin + nbytes, self.unit_nbytes)
        return (self._dice.choice(cuts) - begin) / nbytes if cuts else 0.0


def choose_none(operation: Operation) -> float:
    return 0.0


def choose_all(operation: Operation) -> float:
    return 1.0


NAMED: dict[str, Choose] = {"none": choose_none, "all": choose_all}


class CrashModel:
    """A recording as operations, each with the event that makes it safe."""

    def __init__(self, recording: Recording) -> None:
        self.root = Node(is_folder=True)
        self._plant(recording.base)
        self._base = {n: (bytes(n.content), dict(n.names)) for n in _walk(self.root)}
        self._open: dict[int, tuple[Node, int]] = {}  # node and flags by descriptor
        self._syncs: dict[Call, Node] = {}
        self.operations: list[Operation] = []
        for event in recording.events:
            step = self._on_end if event.is_end else self._on_begin
            step(event.call)
        for event in recording.events:  # died inside the call: it may have happened
            if not event.is_end and event.call.end is None:
                self._on_end(event.call)
        self.operations.sort(key=lambda operation: operation.call.begin)

    def replay(self, num_events: int, target: Path, choose: str | Choose) -> None:
        """Make `target` what a crash after `num_events` events could leave. It is emptied first."""
        part = NAMED[choose] if isinstance(choose, str) else choose
        state = State(self._base)
        for operation in self.operations:
            if operation.call.begin >= num_events:
                break
            is_safe = operation.durable_at is not None and operation.durable_at < num_events
            fraction = 1.0 if is_safe else part(operation)
            if fraction > 0:
                operation.apply(state, fraction)
        if target.exists():
            shutil.rmtree(target)
        _write_out(state, self.root, target)

    # ---- the live view ----

    def _plant(self, base: Tree) -> None:
        for path, content in sorted(base.items()):
            folder, name = self._parent(path)
            folder.names[name] = Node(content is None, bytearray(content or b""))

    def _find(self, path: str) -> Node | None:
        node: Node | None = self.root
        for name in path.split("/") if path else ():
            node = None if node is None else node.names.get(name)
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        before, _, name = path.rpartition("/")
        folder = self._find(before)
        if folder is None:
            raise ValueError(f"the folder of {path} is not in the recording")
        return folder, name

    def _on_begin(self, call: Call) -> None:
        """Writes and sizes belong to the node that the descriptor means now."""
        if call.kind in ("write", "truncate", "fallocate", "sync"):
            node, flags = self._open[call.fd]
            if call.kind == "sync":
                self._syncs[call] = node
            elif call.end is None or call.succeeded:
                self._add_content(call, node, is_synced=bool(flags & SYNCED_WRITES))
        elif call.kind == "close":
            del self._open[call.fd]

    def _on_end(self, call: Call) -> None:
        """Names change when the call has succeeded."""
        if call.kind == "sync":
            self._cover(call)
        if call.end is not None and not call.succeeded:
            return
        if call.kind == "open":
            self._add_open(call)
        elif call.kind == "mkdir":
            self._add_name(call, call.path, Node(is_folder=True))
        elif call.kind in ("rename", "link"):
            node = self._find(call.path)
            if node is None:
                raise ValueError(f"{call}: nothing is there in the recording")
            self._add_name(call, call.path2, node, old=call.path if call.kind == "rename" else "")
        elif call.kind == "unlink":
            self._add_name(call, call.path, None)

    def _cover(self, sync: Call) -> None:
        """What had ended when this sync began is safe when the sync has ended well."""
        if not sync.succeeded:
            return
        node = self._syncs[sync]
        for operation in self.operations:
            ended = operation.call.end
            if operation.durable_at is None and ended is not None and ended < sync.begin:
                left = tuple(other for other in operation.touched if other is not node)
                operation.touched = left
                operation.durable_at = None if left else sync.end

    def _add_open(self, call: Call) -> None:
        node = self._find(call.path)
        if node is None:
            node = Node(is_folder=False)
            self._add_name(call, call.path, node)
        elif call.flags & os.O_TRUNC:
            self._add_content(call, node, is_synced=False)
        if call.end is not None:
            self._open[call.result] = (node, call.flags)

    # ---- operations ----

    def _add_content(self, call: Call, node: Node, *, is_synced: bool) -> None:
        def apply(state: State, fraction: float) -> None:
            content = state.content(node)
            if call.kind == "write":
                nbytes = round(fraction * len(call.data))
                is_counted = call.end is not None and not call.name.startswith("ficlone")
                data = call.data[: min(nbytes, call.result) if is_counted else nbytes]
                _extend(content, call.offset)
                content[call.offset : call.offset + len(data)] = data
            elif call.kind == "fallocate":
                _extend(content, call.offset)
            else:
                nbytes = 0 if call.kind == "open" else call.offset
                del content[nbytes:]
                _extend(content, nbytes)

        operation = Operation(call, (node,), apply)
        if is_synced and call.end is not None:
            operation.durable_at = call.end
        self.operations.append(operation)

    def _add_name(self, call: Call, path: str, node: Node | None, *, old: str = "") -> None:
        """Let `path` mean `node` (None: nothing), and `old` nothing, in one step."""
        places = [(*self._parent(path), node)]
        if old and old != path:
            places.insert(0, (*self._parent(old), None))

        def change(names_of: Callable[[Node], dict[str, Node]]) -> None:
            for folder, name, target in places:
                if target is None:
                    names_of(folder).pop(name, None)
                else:
                    names_of(folder)[name] = target

        def apply(state: State, fraction: float) -> None:
            change(state.folder)

        change(lambda folder: folder.names)
        folders = tuple(dict.fromkeys(folder for folder, _, _ in places))
        self.operations.append(Operation(call, folders, apply))


def _extend(content: bytearray, nbytes: int) -> None:
    content.extend(bytes(max(0, nbytes - len(content))))


def _walk(node: Node) -> list[Node]:
    found = [node]
    for below in node.names.values():
        found += _walk(below)
    return found


def _write_out(state: State, node: Node, path: Path) -> None:
    if not node.is_folder:
        path.write_bytes(state.content(node))
        return
    path.mkdir()
    for name, below in state.folder(node).items():
        _write_out(state, below, path / name)


def replay(recording: Recording, k: int, target: Path, choose: str | Choose) -> None:
    """Make `target` what a crash after the first k events could leave. `choose` says what becomes
    of each operation that is not safe: "none", "all", a Seeded, or a function of the Operation.

    For many states of one recording keep a CrashModel: it is the expensive part.
    """
    CrashModel(recording).replay(k, target, choose)
