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

from offload.errors import BudgetError, OffloadError, PolicyError

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
    """List the runs that lie in FOLDERS, and remove those that nobody needs; never a live one."""
    with _errors_as_messages(debug):
        from offload import runs
        from offload.policy import short_nbytes

        for info in (info for folder in folders for info in runs.find_runs(folder)):
            goes = info.kind is runs.RunKind.ORPHAN or (
                committed and info.kind is runs.RunKind.COMMITTED
            )
            if remove and goes:
                runs.remove(info.folder, committed=committed)
            what = "removed" if remove and goes else "kept"
            typer.echo(f"{what:<8} {short_nbytes(info.nbytes):>9}  {info}")


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
