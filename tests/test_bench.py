"""What the benchmarks decide before they run anything."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def convergence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "convergence.py"
    monkeypatch.setattr(sys, "path", [*sys.path, str(path.parent)])
    spec = importlib.util.spec_from_file_location("convergence", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "convergence", module)
    spec.loader.exec_module(module)
    return module


def options_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    words = [word for name in names for word in ("--cases", name)]
    monkeypatch.setattr(sys, "argv", ["convergence.py", *words])
    return list(module.parse_options().cases or [])


def test_cases_are_compared_with_the_baseline_wherever_it_stands(
    convergence: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, lossy = convergence.BASELINE, "int8, AdamW"
    assert options_of(convergence, monkeypatch, lossy, base) == [lossy, base]
    for names, message in (((lossy,), "--cases needs"), (("other", base), "invalid choice")):
        with pytest.raises(SystemExit):
            options_of(convergence, monkeypatch, *names)
        assert message in capsys.readouterr().err
    exact, lion = (case for case in convergence.CASES if case.name in (base, "exact, Lion"))
    losses = {exact.name: [(4.0, 3.0)], lion.name: [(5.0, 3.5)]}
    monkeypatch.setattr(sys, "argv", ["convergence.py"])
    rates = {exact.name: 1e-4, lion.name: 1e-5}
    text = convergence.render([lion, exact], rates, losses, {}, convergence.parse_options())
    assert "Validation loss before training: 4.0000" in text
    assert "+0.5000 (+0.5000 to +0.5000)" in text and "against exact, AdamW" in text
