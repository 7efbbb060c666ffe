"""What fork() copies of an engine, and a child must not use.

[Note: forks] A forked child has a copy of the engine's memory, none of its threads, and the same
open files. To wait for a transfer there would hang, to close the engine would remove files that the
parent uses, and its descriptors would keep the parent's locks when the parent has died. So whoever
holds such things registers here, and in a child lets go of them: nothing that waits, nothing that
another process sees. What the native code holds is left alone there by its own care.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

REFUSAL = (
    "this is a forked child of the process that offloaded the model: threads do not survive a "
    "fork, so nothing can be fetched here. Use the model in the parent, or start the child before "
    "offload.offload()."
)


class Inherited(Protocol):
    """Something that a forked child has and must not use."""

    def let_go(self) -> None: ...


_owners: weakref.WeakSet[Inherited] = weakref.WeakSet()


def register(owner: Inherited) -> None:
    """Have `owner` let go in every child that Python forks from now on, as long as it lives."""
    _owners.add(owner)


def _in_child() -> None:
    for owner in list(_owners):
        owner.let_go()


os.register_at_fork(after_in_child=_in_child)
