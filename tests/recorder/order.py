"""Rules about the order of calls, for protocols that commit by renaming a file over another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from recorder.crash import CrashModel, Operation
from recorder.log import Call, Recording


def unsynced(recording: Recording, k: int) -> list[Operation]:
    """The operations that a crash after the first k events could undo."""
    return _undoable(CrashModel(recording), k)


def _undoable(model: CrashModel, k: int) -> list[Operation]:
    return [
        operation
        for operation in model.operations
        if operation.call.begin < k and (operation.durable_at is None or operation.durable_at >= k)
    ]


def check_order(
    recording: Recording,
    is_commit: Callable[[Call], bool],
    *,
    belongs: Callable[[Call, Call], bool] = lambda call, commit: True,
) -> Iterator[str]:
    """Yield what is wrong with the commits of a recording; nothing when

    - all that had begun before a commit was safe when the commit began, and
    - the commit itself was safe before the next one began, or at the end of the recording.

    `belongs(call, commit)` is False for calls that this commit says nothing about, such as writes
    of the next step that are already under way.
    """
    model = CrashModel(recording)
    commits = [call for call in recording.calls if is_commit(call)]
    if not commits:
        yield "no commit in the recording"
    for index, commit in enumerate(commits):
        for operation in _undoable(model, commit.begin):
            if not is_commit(operation.call) and belongs(operation.call, commit):
                yield f"{operation.call} is not safe when event {commit.begin}, {commit}, begins"
        is_last = index + 1 == len(commits)
        deadline = len(recording.events) if is_last else commits[index + 1].begin
        if any(operation.call is commit for operation in _undoable(model, deadline)):
            yield f"{commit} (event {commit.begin}) is not safe by event {deadline}"
