"""The command `offload`. Imports torch only where a command needs it, so that --help is instant.

Exit codes: 0, 2 for a configuration that is wrong or cannot fit, 1 for anything else.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from offload.errors import BudgetError, OffloadError, PolicyError, StateError

EXIT_FAILURE = 1
EXIT_CONFIG = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune models larger than the GPU, and larger than RAM, on one machine.",
)

Config = Annotated[Path, typer.Argument(help="The YAML file of the job, see examples/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.steps=10."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Run the command line of this process and exit."""
    # Spinning OpenMP threads beside our I/O threads slow small machines down 4-6 times; libgomp
    # reads this when torch is imported, which is why nothing above imports it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders only: nothing is downloaded unasked
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    app(prog_name="offload")


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through every `finally`, so that swap files and locks go."""
    sys.exit(EXIT_FAILURE)


@contextlib.contextmanager
def _errors_as_messages(debug: bool) -> Iterator[None]:
    """Turn an exception into one message and an exit code; with `debug`, let it through."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; what had been saved is still there, the training state is not", 1)
    except (PolicyError, BudgetError) as error:
        if debug:
            raise
        _fail(str(error), EXIT_CONFIG)
    except OffloadError as error:
        if debug:
            raise
        _fail(str(error), EXIT_FAILURE)
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {error}\nThis is unexpected; --debug shows where it arose."
        _fail(text, EXIT_FAILURE)


def _fail(text: str, code: int) -> None:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"offload {importlib.metadata.version('offload')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def finetune(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Fine-tune a model as CONFIG says."""
    with _errors_as_messages(debug):
        from offload.finetune import run
        from offload.jobconfig import load_finetune
        from offload.progress import Reporter

        result = run(load_finetune(config, overrides or ()), Reporter())
    if result.loss_after is None:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def plan(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Show where everything of a job would lie, without training."""
    with _errors_as_messages(debug):
        from offload.finetune import plan_job
        from offload.jobconfig import load_finetune
        from offload.progress import Reporter

        typer.echo(str(plan_job(load_finetune(config, overrides or ()), Reporter())))


@app.command()
def clean(
    folders: Annotated[list[Path], typer.Argument(help="Folders to look through, such as runs/.")],
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove runs that died without a commit.")
    ] = False,
    committed: Annotated[
        bool, typer.Option("--committed", help="With --remove: committed runs, too.")
    ] = False,
    debug: Debug = False,
) -> None:
    """List the runs that lie in FOLDERS, and remove those that nobody needs.

    Never a live one, and never a checkpoint: remove its folder yourself.
    """
    with _errors_as_messages(debug):
        from offload import runs
        from offload.policy import short_nbytes

        goes = {runs.RunKind.ORPHAN}
        if committed:
            goes |= {runs.RunKind.COMMITTED, runs.RunKind.MEMBER}
        found = [info for folder in folders for info in runs.find_runs(folder)]
        for info in found:
            what = "removed" if remove and info.kind in goes else "kept"
            if what == "removed":
                try:
                    runs.remove([info.folder], committed=committed)
                except StateError as error:  # it came to life, or was committed, since
                    typer.echo(f"{error}", err=True)
                    what = "kept"
            typer.echo(f"{what:<8} {short_nbytes(info.nbytes):>9}  {info}")
        if not found:
            typer.echo("no runs here")


StepPaths = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN... OUT",
        help="The folders of a run, all of tiers.nvme.paths in their order, or a checkpoint; then "
        "the folder to write.",
    ),
]


@app.command()
def checkpoint(
    paths: StepPaths,
    rate: Annotated[
        str | None, typer.Option(help="Copy at most this much in a second, such as 200MiB.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Copy the committed step of a run that is not live to OUT, every block verified.

    OUT starts a run anywhere: pass it as weights=OUT. Where the file system can, it shares the
    run's bytes instead of copying them.
    """
    with _errors_as_messages(debug):
        from offload.offline import copy_run
        from offload.policy import parse_nbytes, short_nbytes
        from offload.progress import Reporter

        folders, out = _run_and_out(paths)
        rate_nbytes = parse_nbytes(rate) if rate is not None else None
        reporter = Reporter()
        with reporter.bar("copying", 100) as bar:
            num_cloned = copy_run(
                folders, out, rate_nbytes=rate_nbytes,
                show=lambda done, total: bar.update(done * 100 // total),
            )  # fmt: skip
        shared = f", {short_nbytes(num_cloned)} of it shared with the run" if num_cloned else ""
        reporter.say("checkpoint", f"{out}{shared}")


@app.command()
def export(paths: StepPaths, debug: Debug = False) -> None:
    """Write the weights of a run that is not live, or of a checkpoint, to OUT as safetensors.

    They have the parameters' names of the model. A run keeps neither config nor tokenizer: copy
    them into OUT from the model's folder to load it with transformers.
    """
    with _errors_as_messages(debug):
        from offload.offline import export_step
        from offload.progress import Reporter

        folders, out = _run_and_out(paths)
        reporter = Reporter()
        with reporter.bar("exporting", 100) as bar:
            export_step(folders, out, show=lambda done, total: bar.update(done * 100 // total))
        reporter.say("exported", str(out))


def _run_and_out(paths: list[Path]) -> tuple[list[Path], Path]:
    if len(paths) < 2:
        raise PolicyError("name the folders of the run, and then the folder to write.")
    return paths[:-1], paths[-1]


@app.command()
def doctor(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Folders on the drives to measure; 512 MiB each.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure drives again that are known already.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show what this machine offers, and how fast its drives are."""
    with _errors_as_messages(debug):
        from offload.doctor import examine
        from offload.progress import Reporter

        examine(paths or (), Reporter(), again=calibrate)
