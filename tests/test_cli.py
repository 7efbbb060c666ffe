"""The command line: fast to start, one message per error, honest exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from offload.cli import app

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "examples" / "tiny.yaml")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def in_a_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_help_and_errors_in_the_file_need_no_torch(tmp_path: Path) -> None:
    """torch takes seconds to import, and reads OMP_WAIT_POLICY when it is."""
    assert in_a_process("import sys, offload.cli; print('torch' in sys.modules)") == "False"


def test_openmp_threads_are_told_to_sleep_unless_the_user_says_otherwise() -> None:
    code = (
        "import os, sys, offload.cli; sys.argv = ['offload', '--version']\n"
        "try: offload.cli.main()\nexcept SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    )
    assert in_a_process(code).endswith("passive")
    chosen = f"import os; os.environ['OMP_WAIT_POLICY'] = 'active'\n{code}"
    assert in_a_process(chosen).endswith("active")


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("finetune", "plan", "doctor", "clean", "checkpoint", "export"):
        assert command in result.output


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0 and result.output.startswith("offload ")


def test_plan_shows_the_plan_and_trains_nothing(tmp_path: Path) -> None:
    tiers = tmp_path / "tiers"
    result = invoke("plan", TINY, "--set", f"tiers.nvme.paths=[{tiers}]")
    assert result.exit_code == 0, result.output
    assert "CPU slab" in result.output and "NVMe" in result.output
    assert not tiers.exists()


def test_plan_shows_the_wear(tmp_path: Path) -> None:
    changes = [f"tiers.nvme.paths=[{tmp_path}/a]", "tiers.nvme.endurance=600TB",
               "tiers.nvme.max_writes_per_day=2TB"]  # fmt: skip
    result = invoke("plan", TINY, *[word for change in changes for word in ("--set", change)])
    assert result.exit_code == 0, result.output
    assert "endurance: 600 TB last " in result.output and " steps of " in result.output
    assert "steps in 24 hours, by max_writes_per_day" in result.output


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["train.steps=none"], 2, "train.steps: 'none' is not accepted"),
        (["nonsense"], 2, "write key.path=value"),
        (["train.step=1"], 2, "did you mean train.steps?"),
        (["tiers.cpu.budget=64KiB"], 2, "tiers.cpu.budget"),
        (
            ["tiers.nvme.max_writes_per_day=1MB"],
            2,
            "tiers.nvme.max_writes_per_day of 1000000 bytes is less than one step writes",
        ),
        (["model.random.family=lama"], 2, "model.random.family"),
    ],
)
def test_config_errors_are_one_message_and_exit_2(
    changes: list[str], code: int, message: str
) -> None:
    pairs = [word for change in changes for word in ("--set", change)]
    result = invoke("plan", TINY, *pairs)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_a_missing_config_file_is_named() -> None:
    result = invoke("finetune", "no/such.yaml")
    assert result.exit_code == 2 and "no/such.yaml" in result.stderr


def test_operating_errors_exit_1(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    config = yaml.safe_load(Path(TINY).read_text())
    config["output"]["folder"] = str(tmp_path / "out")
    config["tiers"]["nvme"]["paths"] = [str(blocked / "below")]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    result = invoke("finetune", str(path))
    assert result.exit_code == 1, result.output
    assert str(blocked) in result.stderr and "Traceback" not in result.stderr


def test_debug_shows_where_an_error_arose() -> None:
    result = invoke("plan", TINY, "--set", "train.steps=none", "--debug")
    assert type(result.exception).__name__ == "PolicyError"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that no drive is known yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_doctor_measures_a_folder_once_and_leaves_it_empty(nvme_dir: Path, own_cache: Path) -> None:
    drives = own_cache / "offload" / "drives.json"
    written = []
    for options in ([], [], ["--calibrate"]):
        result = invoke("doctor", *options, str(nvme_dir), str(nvme_dir / "missing"))
        assert result.exit_code == 0, result.output
        for fact in ("cores", "memory", "io", "GB/s", "is no folder"):
            assert fact in result.output
        assert list(nvme_dir.iterdir()) == []
        written.append(drives.stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]


@pytest.mark.usefixtures("own_cache")
def test_doctor_warns_of_memory_posing_as_a_drive(tmpfs_dir: Path) -> None:
    result = invoke("doctor", str(tmpfs_dir))
    assert "WARNING: files here live in memory" in result.output


def test_doctor_says_why_a_folder_cannot_be_used(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    result = invoke("doctor", str(tmp_path))
    assert result.exit_code == 0 and "cannot be used" in result.output
