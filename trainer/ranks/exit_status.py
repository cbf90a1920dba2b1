"""How the process of a rank ends, and with which exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import click

from hydrazero.shards.errors import HydrazeroError
from hydrazero.shards.files import file_fault
from hydrazero.shards.text.foreign_text import echo, escaped

MAY_PASS = 75
"""Exit status of a rank that has lost another one (EX_TEMPFAIL of sysexits.h)."""
FAILED = 70
"""Exit status of a rank with an error that is not meant for users (EX_SOFTWARE)."""


def exit_rank(status: int) -> NoReturn:
    """End this process at once, its output flushed.

    Threads of the process group may still release Python objects; a thread that asks for the interpreter while it shuts
    down aborts the process ("terminate called without an active exception", about one exit in ten with two ranks).
    """
    mpi = sys.modules.get("mpi4py.MPI")  # imported if the ranks have found each other through it
    if status == 0 and mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # mpirun counts a rank that leaves without it as failed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_process_after(
    job: Callable[[], object],
    *,
    interrupted: int = FAILED,
    prints: Callable[[HydrazeroError], bool] = lambda error: True,
) -> NoReturn:
    """Do the job of this process, then end the process with the exit status that belongs to the outcome.

    An error of a user is printed as one sentence if `prints` says so, one about a file as a sentence, and any other one
    with its traceback; `interrupted` is the exit status after Ctrl-C.
    """
    try:
        job()
    except HydrazeroError as error:
        if prints(error):
            echo(f"Error: {escaped(error)}", err=True)
        exit_rank(error.exit_status)
    except click.ClickException as error:
        error.show()
        exit_rank(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        exit_rank(interrupted)
    except Exception as error:
        sentence = file_fault(error) if isinstance(error, OSError) else None
        if sentence is None:
            traceback.print_exc()
        else:
            echo(f"Error: {escaped(sentence)}", err=True)
        exit_rank(FAILED)
    exit_rank(0)
