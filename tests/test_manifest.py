"""The manifest as a file of unknown origin: any bytes are refused in words, nothing is written."""

import json
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import small_units
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import hashes
from test_durability import policy_of, start, train
from zoo import ZOO

import offload
from offload import manifest as manifest_module
from offload.errors import StateError, StorageError
from offload.manifest import decode, encode, pack_progress, pack_tensor, unpack_tensor
from offload.swapfile import MANIFEST_NAME

sys.path.insert(0, str(Path(__file__).with_name("fuzz")))
from fuzz_manifest import (  # noqa: E402
    check,
    hostile,
    mutate_tree,
    plain_loop,
    seal,
    sealed,
    valid_tree,
)

ENTRY = ZOO["llama"]
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(LEAF, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
Edit = Callable[[dict[str, Any]], object]


@given(st.integers(1, 4), st.integers(1, 4), st.dictionaries(st.text(), JSON, max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_is_encoded_is_decoded(num_chunks: int, num_files: int, progress: Any) -> None:
    tree = valid_tree(num_chunks, num_files)
    tree["progress"] = pack_progress(progress)
    first = decode(seal(tree), "here")
    assert encode(decode(encode(first), "here")) == encode(first)
    assert repr(decode(encode(first), "here").progress) == repr(tree["progress"])


def test_mutations_are_refused_or_pass_every_check() -> None:
    tried, accepted = plain_loop(2.0)
    assert tried > 200 and 0 < accepted < tried


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused(content: bytes, has_head: bool) -> None:
    assert not check(sealed(content) if has_head else content)


def first_plane(tree: dict[str, Any]) -> dict[str, Any]:
    plane: dict[str, Any] = tree["chunks"][0]["planes"]["weight"]
    return plane


EDITS: dict[str, Edit] = {
    "a negative offset": lambda t: first_plane(t)["extents"][0][0].__setitem__(1, -4096),
    "an offset in the header": lambda t: first_plane(t)["extents"][0][0].__setitem__(1, 0),
    "an offset behind the end": lambda t: first_plane(t)["extents"][0][0].__setitem__(1, 2**50),
    "an odd offset": lambda t: first_plane(t)["extents"][0][0].__setitem__(1, 4097),
    "a file that is not there": lambda t: first_plane(t)["extents"][0][0].__setitem__(0, 63),
    "a file behind all": lambda t: first_plane(t)["extents"][0][0].__setitem__(0, 2**70),
    "an overlap": lambda t: first_plane(t)["extents"].__setitem__(1, first_plane(t)["extents"][0]),
    "a version that is not there": lambda t: first_plane(t).update(committed=2),
    "no version": lambda t: first_plane(t).update(extents=[]),
    "no weights": lambda t: t["chunks"][0]["planes"].pop("weight"),
    "a plane of another name": lambda t: t["chunks"][0]["planes"].update(grad=first_plane(t)),
    "a chunk twice": lambda t: t["chunks"].append(t["chunks"][0]),
    "an absolute path for a file": lambda t: t.update(file_nbytes=["/etc/passwd"]),
    "a path": lambda t: t.update(paths=["/etc"]),
    "a run that is a path": lambda t: t.update(run="../../../../../../../../../etc/x"),
    "a size of another shape": lambda t: t["chunks"][0]["params"][0].update(shape=[2**53, 2**53]),
    "fewer checksums": lambda t: t["checksums"].update(nbytes=4),
    "checksums without end": lambda t: t["checksums"].update(nbytes=2**53),
    "an odd block": lambda t: t["checksums"].update(block_nbytes=12288),
    "NaN steps": lambda t: t.update(step=float("nan")),
    "huge steps": lambda t: t.update(step=10**400),
    "a string of steps": lambda t: t.update(step="3" * 10**6),
    "an unknown format": lambda t: t.update(state_format="int3"),
    "another kind": lambda t: t.update(kind="live"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_hostile_edit_is_refused(name: str) -> None:
    tree = valid_tree()
    decode(seal(tree), "here")
    EDITS[name](tree)
    with pytest.raises(StorageError, match="EBADMSG"):
        decode(seal(tree), "here")


def test_size_and_depth_have_a_limit() -> None:
    """A million chunks, a deep nest, long strings: refused in bounded memory."""
    chunk = json.dumps(valid_tree()["chunks"][0]).encode()
    bombs = [
        b'{"chunks":[' + b",".join([b"{}"] * 10**6) + b"]}",
        b'{"chunks":[' + b",".join([chunk] * 5_000) + b"]}",
        b"[" * 10**6,
        b'{"progress":' * 10**5 + b"1" + b"}" * 10**5,
        b'{"progress":{"x":' + b"[" * 10**5 + b"]" * 10**5 + b"}}",
        b'{"run":"' + b"a" * (32 << 20) + b'"}',
        b'{"step":' + b"9" * 10**6 + b"}",
        b'{"progress":[' + b",".join([b"[]"] * (manifest_module._NUM_LISTS_MAX + 1)) + b"]}",
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in bombs:
        with pytest.raises(StorageError, match="EBADMSG"):
            decode(sealed(bomb), "here")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2 << 20  # KiB: 2 GiB


def test_duplicate_keys_cannot_smuggle() -> None:
    """Whichever of two equal keys counts, it is what was checked."""
    body = json.dumps(valid_tree()).encode()
    for extra in (b'"step":-1,', b'"kind":"live",', b'"file_nbytes":[0],'):
        check(sealed(b"{" + extra + body[1:]))
        check(sealed(body[:-1] + b"," + extra[:-1] + b"}"))


def test_a_manifest_that_could_not_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    step = decode(seal(valid_tree()), "here")
    monkeypatch.setattr(manifest_module, "MANIFEST_NBYTES_MAX", 1000)
    with pytest.raises(StateError, match="persistent=False"):
        encode(step)


def deep(levels: int) -> dict[str, Any]:
    return {"x": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    "progress",
    [[1], None, "text", {"x": object()}, {"x": b"1"}, {"x": "\ud800"}, deep(300), {(1, 2): 3}],
    ids=lambda value: type(value).__name__,
)
def test_progress_that_would_not_come_back_is_refused(progress: Any) -> None:
    with pytest.raises(StateError, match="what JSON can hold"):
        pack_progress(progress)


def test_progress_comes_back_as_it_was() -> None:
    tree = valid_tree()
    tree["progress"] = pack_progress({"loss": float("nan"), "best": float("-inf"), "n": 10**30})
    got = decode(encode(decode(seal(tree), "here")), "here").progress
    assert repr(got) == repr({"loss": float("nan"), "best": float("-inf"), "n": 10**30})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    assert torch.equal(unpack_tensor(pack_tensor(tensor), "x"), tensor)


@pytest.mark.parametrize(
    "change",
    [{"shape": (2**40,)}, {"data": ""}, {"data": "!"}, {"dtype": "float"}, {"dtype": "nn"},
     {"shape": (2**53, 2**53)}, {"dtype": "__name__"}],
)  # fmt: skip
def test_a_tensor_that_does_not_add_up_is_refused(change: dict[str, Any]) -> None:
    record = pack_tensor(torch.ones(2, dtype=torch.float64)).model_copy(update=change)
    with pytest.raises(StateError, match="does not add up"):
        unpack_tensor(record, "x")


def test_a_hostile_manifest_of_a_real_run_writes_nothing(nvme_dir: Path) -> None:
    """Each is refused, or is the run's own in all that counts; the files keep every byte."""
    policy = policy_of(nvme_dir, ENTRY, "nvme")
    path, dice = nvme_dir / MANIFEST_NAME, random.Random(1)
    with small_units(1024):
        with start(ENTRY, policy) as engine:
            train(engine, ENTRY, until=1)
        whole = path.read_bytes()
        body = json.loads(whole.split(b"\n", 1)[1])
        model = ENTRY.make_model().bfloat16()
        num_refused = 0
        for _ in range(40):
            tree = json.loads(json.dumps(body))
            mutate_tree(tree, dice)
            path.write_bytes(seal(tree) if dice.random() < 0.9 else hostile(dice))
            before = hashes(nvme_dir)
            try:
                engine = offload.offload(model, policy, weights="resume")
            except (StorageError, StateError, offload.PolicyError):
                num_refused += 1
                assert hashes(nvme_dir) == before
                continue
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(engine), "flush", lambda self: None)
                engine._shut()
            assert (nvme_dir / "offload.swap").read_bytes() == before[
                str(nvme_dir / "offload.swap")
            ]
        assert num_refused > 20
        path.write_bytes(whole)
        with start(ENTRY, policy, "resume") as engine:
            train(engine, ENTRY, until=2)
