"""The documentation is true of the tree: code runs, YAML loads, names and tables agree."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from test_tidy import LAYERS

import offload
from offload.policy import load_policy
from offload.tier import TRANSITIONS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = (README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
LINE_LENGTH_MAX = 120
FILLED = ("finetune output", "test output", "bench results")  # blocks with the output of real runs
NOUNS = (
    "Tier", "Chunk", "ChunkSpec", "Plane", "StateFormat", "Residency", "Slab", "Slot", "SlotPool",
    "ChunkStore", "Extent", "IoQueue", "IoCompletion", "Link", "Transfer", "Update",
    "OffloadPolicy", "MemoryBudget", "Plan", "Step", "Engine", "Timeline",
)  # fmt: skip
NOUNS_WITHOUT_CLASS = {"MemoryBudget", "Step"}
FIGURE = re.compile(  # what only a measurement can say
    r"\d[\d.,]*\s*(?:tokens/s|[GM]i?B/s|s/step|seconds? (?:per|a) step|ms\b|%|x\b"
    r"|times (?:as|faster|slower))"
)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def filled(text: str, name: str) -> str:
    """What stands between the two marks of a block that real output fills."""
    found = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert len(found) == 1, f"README.md needs the block `{name}` once"
    return str(found[0])


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, without code marks."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip().replace("`", "") for c in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= set("-: ")]


def section(page: Path, heading: str) -> str:
    """The text below a heading of level two, up to the next."""
    return page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


# Code and YAML


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_load(page: Path) -> None:
    for block in blocks(page, "yaml"):
        load_policy(yaml.safe_load(block))


def test_readme_has_code_and_yaml() -> None:
    assert len(blocks(README, "python")) == 1 and len(blocks(README, "yaml")) == 1


class Line(torch.nn.Module):
    """A model with the calling convention of Hugging Face's: loss in, `.loss` out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.layers(x).square().mean())


def test_the_readme_loop_runs_with_the_readme_yaml(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = yaml.safe_load(blocks(README, "yaml")[0])
    policy["tiers"]["gpu"]["device"] = "cpu"
    policy["tiers"]["nvme"]["paths"] = [str(nvme_dir / "a"), str(nvme_dir / "b")]
    monkeypatch.chdir(nvme_dir)
    Path("tiers.yaml").write_text(yaml.safe_dump(policy))
    loader = [{"x": torch.ones(2, 4, dtype=torch.bfloat16)}] * 3
    names: dict[str, Any] = {"torch": torch, "model": Line(), "loader": loader}
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
    exec(blocks(README, "python")[0], names)
    assert all(not torch.equal(p, before[n]) for n, p in names["model"].named_parameters())
    assert list(Path("out").glob("*.safetensors"))


@pytest.mark.timeout(300)
def test_the_library_example_runs(nvme_dir: Path) -> None:
    pytest.importorskip("transformers")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / "library.py")]
    done = subprocess.run(
        command, cwd=nvme_dir, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^loss ([0-9.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 12 and losses[-1] < losses[0] - 1
    assert "swap files" in done.stdout  # the example shows NVMe, not a model that fits in RAM
    left = [path for path in nvme_dir.rglob("*") if path.suffix in (".swap", ".lock")]
    assert not left


def test_the_example_policy_loads() -> None:
    assert load_policy(ROOT / "examples" / "tiers.yaml").tiers.nvme is not None


def test_policy_page_is_current() -> None:
    render = runpy.run_path(str(ROOT / "docs" / "make_policy.py"))["render"]
    page = (ROOT / "docs" / "policy.md").read_text()
    assert render(page) == page, "run `python docs/make_policy.py`"


# Names


def test_glossary() -> None:
    table = rows(section(README, "Words"))[1:]
    nouns = [noun for row in table for noun in row[0].split(" / ")]
    assert tuple(nouns) == NOUNS
    text = "".join(path.read_text() for path in (ROOT / "offload").glob("*.py"))
    classes = set(re.findall(r"^class (\w+)", text, re.MULTILINE))
    assert set(NOUNS) - classes == NOUNS_WITHOUT_CLASS


def test_readme_names_what_exists() -> None:
    text = README.read_text()
    for name in re.findall(r"\boffload\.(\w+)\(", text):
        assert name in offload.__all__, name
    for name in re.findall(r"\bengine\.(\w+)", text):
        assert hasattr(offload.Session, name) or name in ("model", "plan"), name


def test_architecture_has_the_layers_of_the_tidy_test() -> None:
    table = rows(section(ARCHITECTURE, "Layers"))
    written = {row[1]: int(row[0]) for row in table if row[0].isdigit()}
    present = {path.stem for path in (ROOT / "offload").glob("*.py")}
    assert written.keys() == present
    assert not {name: layer for name, layer in written.items() if LAYERS.get(name, layer) != layer}


def test_architecture_has_every_native_file() -> None:
    text = section(ARCHITECTURE, "Layers")
    stems = {path.stem for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".h")}
    assert not [stem for stem in sorted(stems) if f"`{stem}`" not in text]


def test_state_diagram_is_the_table_of_transitions() -> None:
    (diagram,) = blocks(ARCHITECTURE, "mermaid")
    drawn = re.findall(r"(\w+) --> (\w+)", diagram)
    assert sorted(drawn) == sorted((a.name, b.name) for a, b in TRANSITIONS)


def test_cited_notes_exist() -> None:
    folders = (ROOT / "offload", ROOT / "csrc")
    files = [path for folder in folders for path in folder.glob("*") if path.suffix != ".so"]
    code = " ".join(" ".join(path.read_text().split()) for path in files if path.is_file())
    cited = re.findall(r"\[Note:\s([\w\s-]+)\]", ARCHITECTURE.read_text())
    names = {" ".join(name.split()) for name in cited} - {"name"}
    assert names and not [name for name in sorted(names) if f"[Note: {name}]" not in code]


# Pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for heading in re.findall(r"\]\(#([^)]+)\)", text):
        headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        assert heading in {re.sub(r"\s", "-", line.lower()) for line in headings}, heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_plain(page: Path) -> None:
    text = page.read_text()
    for name in FILLED if page == README else ():
        text = text.replace(filled(text, name), "")
    lines = enumerate(text.splitlines(), start=1)
    long = [number for number, line in lines if len(line) > LINE_LENGTH_MAX]
    assert not long, f"lines longer than {LINE_LENGTH_MAX}: {long}"
    assert "\N{EM DASH}" not in text


def unproven_figures(text: str, read: Any) -> list[str]:
    """Measured figures in a text without a result file that has them; `read(name)` gives a file."""
    links = re.findall(r"\]\((bench/results/[^)]+\.md)\)", filled(text, "bench results"))
    proof = "".join(read(name) for name in links)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [figure for figure in FIGURE.findall(prose) if figure not in proof]


def test_figures_in_the_readme_come_from_results() -> None:
    assert not unproven_figures(README.read_text(), lambda name: (ROOT / name).read_text())


def test_figures_without_a_result_are_caught() -> None:
    text = "It is {}.\n<!-- bench results -->\n{}\n<!-- /bench results -->\n"
    link = "[run](bench/results/a.md)"
    assert unproven_figures(text.format("2.5x as fast", ""), str) == ["2.5x"]
    assert unproven_figures(text.format("2.5x as fast", link), lambda name: "at 2.4x") == ["2.5x"]
    assert not unproven_figures(text.format("2.5x as fast", link), lambda name: "ratio 2.5x")
    assert not unproven_figures(text.format("small\n```\n31 tokens/s\n```", ""), str)
