"""Commands and Python on the pages of the manual: find them, run them, and write down what they print.

What runs, in the order of the page:

- a block ```toml title="PATH" (or any other language with a title) is written to that file;
- in a block ```console each line `$ hydrazero ...` runs, with the lines that continue it after a backslash;
- a block ```python runs as a program of its own.

Blocks ```text, ```shell, ```py and ```toml without a title do not run, nor do lines of other commands.

    python docs/generate/page_blocks.py docs/tutorials/screen.md FOLDER

runs a page in a folder and puts into the page what its blocks print: under each command of a console block, and into
the block ```text title="output" after a block of Python. Output with a line `...` is shortened by hand and stays.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", flags=re.DOTALL | re.MULTILINE)
TITLE = re.compile(r'title="([^"]+)"')
OUTPUT = "output"
"""Title of the block that shows what the block of Python before it prints."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
COLUMNS = 80
"""Width of the terminal that commands believe to have."""
SECONDS = 400
"""Time that a command may take; then it is stopped, and the error shows where each of its processes stood."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    text: str
    start: int
    """Offset of the text in the page."""


class BlockError(RuntimeError):
    """A block that did not run; the message holds what it printed."""


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    found = []
    for match in FENCE.finditer(page):
        language, _, rest = match["info"].partition(" ")
        title = TITLE.search(rest)
        found.append(
            Block(language=language, title=title[1] if title else "", text=match["text"], start=match.start("text"))
        )
    return found


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """Walk through the commands of a console block: the lines of each, and what the page shows under it."""
    for part in re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE):
        if part.startswith("$ "):
            lines = part.splitlines(keepends=True)
            count = 1
            while lines[count - 1].endswith("\\\n"):
                count += 1
            yield "".join(lines[:count]), "".join(lines[count:])


def runs(block: Block) -> bool:
    """Whether anything happens at a block."""
    if block.language == "console":
        return any(command.startswith("$ hydrazero ") for command, _ in commands_of(block))
    return block.language == "python" or (bool(block.title) and block.title != OUTPUT)


def run_page(page: str, folder: Path, change: Callable[[str], str] = str) -> None:
    """Run a page in a folder; `change` shortens each command and file. Raises BlockError if something fails."""
    for block in blocks_of(page):
        for _ in run_block(replace(block, text=change(block.text)), folder):
            pass


def run_block(block: Block, folder: Path) -> Iterator[tuple[str, str]]:
    """Run a block, and give each of its commands ('' for Python) with what it printed; raises BlockError."""
    if block.language == "console":
        for command, _ in commands_of(block):
            if command.startswith("$ hydrazero "):
                yield command, _run(command.removeprefix("$ "), folder)
    elif block.title and block.title != OUTPUT:
        file = folder / block.title
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        yield "", _run([sys.executable, "-c", block.text], folder)


def _run(command: str | list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    # Commands are those of this interpreter's environment.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"COLUMNS": str(COLUMNS), "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    # Every Python process of the command writes its stack at SIGABRT.
    environment["PYTHONFAULTHANDLER"] = "1"
    shown = command if isinstance(command, str) else command[-1]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
    ):
        # Files, not pipes: a process that the command leaves behind would hold a pipe open.
        process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=log,
            start_new_session=True,
        )
        try:
            ended = f"exit status {process.wait(SECONDS)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            time.sleep(2)  # for the stacks of the command's processes
            ended = f"no end after {SECONDS} s"
        finally:
            with suppress(ProcessLookupError):  # also what the command has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed, errors = (file.seek(0) or file.read() for file in (output, log))
    if ended != "exit status 0":
        raise BlockError(f"{ended} of:\n{shown}\n{printed}{errors}")
    return "".join(f"{line.rstrip()}\n" for line in printed.splitlines())


def recorded(page: str, folder: Path) -> str:
    """Run a page in a folder and return it with what its blocks print."""
    pieces, place, printed = [], 0, None
    for block in blocks_of(page):
        text = block.text
        if block.language == "text" and block.title == OUTPUT and printed is not None:
            text = printed
        outputs = dict(run_block(block, folder))
        if block.language == "console":
            text = "".join(
                command + (shown if "...\n" in shown.splitlines(keepends=True) else outputs.get(command, shown))
                for command, shown in commands_of(block)
            )
        printed = outputs.get("") if block.language == "python" else None
        pieces += [page[place : block.start], text]
        place = block.start + len(block.text)
    return "".join([*pieces, page[place:]])


def main() -> None:
    """Record the outputs of one page."""
    page, folder = Path(sys.argv[1]), Path(sys.argv[2])
    page.write_text(recorded(page.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
    main()
