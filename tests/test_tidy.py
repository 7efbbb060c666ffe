"""Lint of the design: layers, sizes, bans, dead files. Each rule is shown to catch what it bans."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = {
    name: layer
    for layer, names in enumerate(
        [
            "errors tier timeline machine forks interrupts smart scale heap",
            "formats io slots stats openmp swapfile wear numa sizes torchstate",
            "config extents runfolder update factors",
            "policy store factored calibrate spec moments",
            "chunk schedule manifest transfer space",
            "plan inflight jobs runfiles torchstep",
            "residence updates routing homes stepreader",
            "engine checkpointfile",
            "landing planes materialise export report pretrained progress commit meter windows",
            "hooks recovery runs checkpoint optimstate clipping",
            "blocks opening runstate restore offline optim inspection",
            "partition torchoptim scaleoptim",
            "attach",
            "session",
            "__init__ data loss",
            "sources doctor",
            "jobconfig",
            "finetune",
            "cli",
            "__main__",
        ]
    )
    for name in names.split()
}
NATIVE_IMPORTERS = {"io", "update", "formats"}
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500
LINE_LENGTH_MAX = 100
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")
MACHINE_PATH = re.compile(r"(?<![A-Za-z0-9_.\-])/(?:work|root|home|farm)/")
CPP_NOISE = re.compile(  # comments, directives, strings, characters
    r"//[^\n]*|/\*.*?\*/|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'",
    re.DOTALL | re.MULTILINE,
)
CPP_NO_FUNCTION = re.compile(
    r"(?:if|for|while|switch|catch|else|do|try|return|namespace|class|struct|enum|union|extern)\b"
)


# What is checked


@functools.cache
def source_files() -> tuple[Path, ...]:
    """Files that are or would be in git; outside a checkout, those of the known folders."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
        names = [name.decode() for name in done.stdout.split(b"\0") if name]
        return tuple(sorted(ROOT / name for name in names if (ROOT / name).is_file()))
    folders = [ROOT / name for name in ("offload", "csrc", "tests", "bench", "examples", "docs")]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return tuple(sorted(path for path in found if "__pycache__" not in path.parts))


def files_of(*suffixes: str, under: tuple[str, ...] = ("",)) -> list[Path]:
    return [
        path
        for path in source_files()
        if path.suffix in suffixes and any(path.is_relative_to(ROOT / folder) for folder in under)
    ]


def python_files() -> list[Path]:
    return files_of(".py")


def package_files() -> list[Path]:
    return files_of(".py", under=("offload",))


def native_files() -> list[Path]:
    return files_of(".cpp", ".h", ".cu", under=("csrc", "tests/native"))


def modules() -> dict[str, str]:
    """Texts of the modules of the package, by name."""
    return {path.stem: path.read_text() for path in package_files()}


# Rules: each takes a text and yields what is wrong with it


def python_asserts(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: bare assert; raise an error that says what to do"


def native_asserts(text: str) -> Iterator[str]:
    includes = re.finditer(r"^[ \t]*#[ \t]*include *<(?:cassert|assert\.h)>", text, re.MULTILINE)
    calls = re.finditer(r"\bassert\s*\(", strip_cpp(text))
    for match in (*includes, *calls):
        yield f"line {line_of(text, match.start())}: assert; use CHECK, which release builds keep"


def long_python_functions(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            if num_lines > FUNCTION_LINES_MAX:
                yield f"line {node.lineno}: {node.name} has {num_lines} lines"


def long_native_functions(text: str) -> Iterator[str]:
    """Match braces; a function is a block after a parenthesis that no keyword of control opens."""
    text = strip_cpp(text)
    open_blocks: list[int | None] = []  # where the function starts, or None for any other block
    head_at = 0
    for match in re.finditer(r"[{};]", text):
        head = text[head_at : match.start()]
        if match[0] == "{":
            is_function = "(" in head and not CPP_NO_FUNCTION.match(head.strip())
            start = match.start() - len(head.lstrip())
            open_blocks.append(line_of(text, start) if is_function else None)
        elif match[0] == "}" and open_blocks:
            first = open_blocks.pop()
            last = line_of(text, match.start())
            if first is not None and last - first + 1 > FUNCTION_LINES_MAX:
                yield f"line {first}: a function of {last - first + 1} lines"
        head_at = match.end()


def long_file(text: str) -> Iterator[str]:
    num_lines = text.count("\n")
    if num_lines > FILE_LINES_MAX:
        yield f"{num_lines} lines; split it by what it owns"


def long_lines(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if len(line) > LINE_LENGTH_MAX:
            yield f"line {number}: {len(line)} characters"


def unfinished_marks(text: str) -> Iterator[str]:
    for match in UNFINISHED.finditer(text):
        yield f"line {line_of(text, match.start())}: {match[0]}; finish it or open an issue"


def machine_paths(text: str) -> Iterator[str]:
    for match in MACHINE_PATH.finditer(text):
        yield f"line {line_of(text, match.start())}: a path of one machine, {match[0]}"


def missing_tests(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            return
    yield "no test in it"


def strip_cpp(text: str) -> str:
    """Blank out comments, directives and literals, keeping every line where it was."""
    return CPP_NOISE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


# Rules about the package as a whole


def imported_modules(text: str, names: set[str]) -> set[str]:
    """The modules of the package that a module's text imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"offload.{node.module or ''}".rstrip(".") if node.level else str(node.module)
            # What comes from the package itself is a module of it, or a name of its __init__.
            own = [alias.name for alias in node.names if alias.name in {*names, "_native"}]
            whole = base != "offload" or len(own) < len(node.names)
            dotted = [base] * whole + [f"offload.{name}" for name in own if base == "offload"]
        else:
            continue
        for name in dotted:
            package, *rest = name.split(".")
            if package == "offload":
                found.add(rest[0] if rest else "__init__")
    return found


def layer_problems(texts: dict[str, str]) -> Iterator[str]:
    for name, text in texts.items():
        if name not in LAYERS:
            yield f"offload/{name}.py has no layer; add it to LAYERS"
            continue
        for other in sorted(imported_modules(text, set(texts))):
            if other == "_native":
                if name not in NATIVE_IMPORTERS:
                    yield f"offload/{name}.py imports _native; only {NATIVE_IMPORTERS} may"
            elif LAYERS.get(other, 99) >= LAYERS[name]:
                yield (
                    f"offload/{name}.py (layer {LAYERS[name]}) imports offload/{other}.py "
                    f"(layer {LAYERS.get(other, 'unknown')}); only lower layers are in its sight"
                )


def dead_modules(texts: dict[str, str], entry_points: set[str]) -> Iterator[str]:
    alive = set(entry_points)
    for name, text in texts.items():
        alive |= imported_modules(text, set(texts)) - {name}
    for name in texts.keys() - alive:
        yield f"offload/{name}.py is imported by nothing"


def entry_points() -> set[str]:
    """The package itself, and the modules that pyproject.toml installs as commands."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("scripts", {})
    commands = {target.partition(":")[0].rpartition(".")[2] for target in scripts.values()}
    return {"__init__", "__main__"} | commands


# The tree obeys

Rule = Callable[[str], Iterator[str]]
TREE_RULES: list[tuple[Rule, Callable[[], list[Path]]]] = [
    (python_asserts, package_files),
    (native_asserts, native_files),
    (long_python_functions, python_files),
    (long_native_functions, native_files),
    (long_file, lambda: python_files() + native_files()),
    (long_lines, lambda: python_files() + native_files()),
    (unfinished_marks, lambda: list(source_files())),
    (machine_paths, lambda: list(source_files())),
    (missing_tests, lambda: [f for f in python_files() if f.name.startswith("test_")]),
]


@pytest.mark.parametrize(
    ("rule", "files"), TREE_RULES, ids=[rule.__name__ for rule, _ in TREE_RULES]
)
def test_tree_obeys(rule: Rule, files: Callable[[], list[Path]]) -> None:
    problems = []
    for path in files():
        data = path.read_bytes()
        name = path.relative_to(ROOT)
        try:
            found = [] if b"\0" in data else list(rule(data.decode()))  # NUL: not a text
        except SyntaxError as error:
            found = [f"not Python: {error}"]
        problems += [f"{name}: {problem}" for problem in found]
    assert not problems, "\n".join(problems)


def test_files_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in source_files()}
    assert {"offload/errors.py", "tests/test_tidy.py"} <= names
    assert package_files() and native_files()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_layers() -> None:
    problems = list(layer_problems(modules()))
    assert not problems, "\n".join(problems)


def test_no_dead_modules() -> None:
    problems = list(dead_modules(modules(), entry_points()))
    assert not problems, "\n".join(problems)


# The rules catch what they ban

LINE = "    x = 1;\n"
LONG_BODY = LINE * FUNCTION_LINES_MAX
CAUGHT: list[tuple[Rule, str, int]] = [
    (python_asserts, "def f(x):\n    assert x\n", 1),
    (python_asserts, "def f(x):\n    self.assert_open(x)  # no assert here\n", 0),
    (native_asserts, "#include <cassert>\nvoid f() { assert(true); }\n", 2),
    (native_asserts, '// assert(x)\nstatic_assert(true); puts("assert(x)");\n', 0),
    (long_python_functions, f"def f():\n{LONG_BODY}", 1),
    (long_python_functions, f"def f():\n{LONG_BODY.removesuffix(LINE)}", 0),
    (
        long_native_functions,
        f"class A {{\n  int f(int a,\n        int b) {{\n{LONG_BODY}  }}\n}};",
        1,
    ),
    (
        long_native_functions,
        f"namespace a {{\nint f() {{\n{LONG_BODY.removesuffix(2 * LINE)}}}\n}}",
        0,
    ),
    (long_native_functions, f"struct A {{\n{LONG_BODY}\n}};", 0),
    (long_native_functions, f"void f() {{\n  g(\"}}\"); // }}\n  h('}}');\n{LONG_BODY}}}\n", 1),
    (long_native_functions, f"#define F(x) \\\n  (x)\nnamespace a {{\n{LONG_BODY}}}\n", 0),
    (long_file, "\n" * (FILE_LINES_MAX + 1), 1),
    (long_file, "\n" * FILE_LINES_MAX, 0),
    (long_lines, f"{'x' * 101}\n{'x' * 100}\n", 1),
    (unfinished_marks, f"# {'TO' + 'DO'}: more\n// {'FIX' + 'ME'}\n# {'X' * 3}\n# mastodon\n", 3),
    (machine_paths, "open('/" + "root/x')\ncd /" + "work/y\n--out=/" + "home/z/\n", 3),
    (machine_paths, "https://example.org/" + "home/ and bench/" + "work/ and ./" + "root/x", 0),
    (missing_tests, "def helper(): ...\n", 1),
    (missing_tests, "class TestIt:\n    def test_it(self): ...\n", 0),
]


@pytest.mark.parametrize(("rule", "text", "num_problems"), CAUGHT)
def test_rule_catches(rule: Rule, text: str, num_problems: int) -> None:
    assert len(list(rule(text))) == num_problems


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("errors", "import offload.policy", "layer 0"),
        ("policy", "def f():\n    from offload.engine import Engine", f"layer {LAYERS['engine']}"),
        ("config", "from offload import runfolder", "layer 2"),
        ("store", "from .chunk import Chunk", "layer 3"),
        ("store", "from . import chunk", "layer 3"),
        ("engine", "import offload", f"layer {LAYERS['__init__']}"),
        ("engine", "from offload import AdamW", f"layer {LAYERS['__init__']}"),
        ("engine", "from offload import _native", "imports _native"),
        ("novel", "", "has no layer"),
        ("engine", "from offload.novel import thing", "offload/novel.py (layer unknown)"),
        ("plan", "from offload.schedule import Order", ""),
        ("io", "from offload import _native, errors", ""),
        ("cli", "import offload, torch\nfrom offload.finetune import run", ""),
    ],
)
def test_layer_rule_catches(name: str, text: str, problem: str) -> None:
    texts = dict.fromkeys(LAYERS, "") | {name: text}
    problems = list(layer_problems(texts))
    assert len(problems) == bool(problem)
    assert all(problem in found for found in problems)


def test_dead_module_rule_catches() -> None:
    texts = {
        "__init__": "from offload.engine import E",
        "engine": "",
        "relic": "import offload.relic",
    }
    assert list(dead_modules(texts, {"__init__"})) == ["offload/relic.py is imported by nothing"]
    assert "cli" in entry_points()
