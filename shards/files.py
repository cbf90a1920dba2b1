"""Files: written so that each is complete or absent, locked between processes, and read with one sentence on errors."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import shutil
import socket
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydrazero.shards.errors import ConfigError, HydrazeroError

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy
    from pydantic import TypeAdapter

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems without locks, such as Lustre mounted without flock."""
MOST_BYTES = 1 << 30
"""Largest file that is read into memory as a whole: a manifest, a record, or metrics."""
LONGEST_NOTE = 300
"""Bytes of the note on the process that holds a lock."""


@contextmanager
def replacing(path: Path, *, shared: bool = False, durable: bool = False, suffix: str = "") -> Iterator[Path]:
    """Yield the path of a temporary file or folder beside `path`, and rename it to `path` at the end.

    `path` keeps its old content, or stays absent, until the rename; the temporary one is removed if the block raises.
    Set `shared` where several processes may write `path` at the same time: each then has a temporary file of its own.
    With `durable`, the content is on the disk before the rename, so that a power failure cannot leave an empty file.
    `suffix` ends the temporary name, for writers that look at it. Raises OSError, about `path`, where the system does.
    """
    owner = f"-{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.name}.part{owner}{suffix}")
    if temporary.is_symlink() or (temporary.exists() and not (temporary.is_file() or temporary.is_dir())):
        temporary.unlink()  # what is written must not go where a link of somebody else leads
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as other:
        if (error := _of_system(other)) is None:
            raise
        # A full disk is reported without a name, and the temporary one would mean nothing to the user.
        if error.filename is None or os.fspath(error.filename) == os.fspath(temporary):
            error.filename, error.filename2 = os.fspath(path), None
        raise error from (None if error is other else other)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path, advice: str) -> None:
    """Raise ConfigError, which ends with the advice, if a folder cannot be written, or made if there is none."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"{nearest} is no folder; {advice}.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"nothing can be written to the folder {nearest}; {advice}.")


def without_links(path: str, flags: int) -> int:
    """Open a file that several steps write, for `open(..., opener=without_links)`.

    A symbolic link is an error (OSError), and so is a pipe that nobody reads, for which opening would wait otherwise.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _of_system(error: Exception) -> OSError | None:
    """Return an OSError, also one of which safetensors or Arrow have made a text; None for errors of other kinds."""
    number = re.search(r"\b(?:os error|errno) (\d+)\b", str(error))  # 'Errno' is Python's own text
    if number is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])), getattr(error, "filename", None))
    return error if isinstance(error, OSError) else None


def write_bytes(path: Path, data: bytes, *, shared: bool = False, durable: bool = False) -> None:
    """Write a file through a temporary file and a rename; the options are those of `replacing`."""
    with replacing(path, shared=shared, durable=durable) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, *, shared: bool = False, durable: bool = False) -> None:
    """Write a text in UTF-8 through a temporary file and a rename; the options are those of `replacing`."""
    write_bytes(path, text.encode(), shared=shared, durable=durable)


def write_json(path: Path, document: Any, *, shared: bool = False, durable: bool = False) -> None:
    """Write a JSON document, indented by one space; the options are those of `replacing`."""
    write_text(path, json.dumps(document, indent=1) + "\n", shared=shared, durable=durable)


def read_json(source: Path | Traversable, what: str = "", *, shape: Any = Any, hint: str = "") -> Any:
    """Return the content of a JSON file.

    `what` says what the file is for, such as 'run file'; `hint` ends the sentence about a file that cannot be read.
    `shape` is a type that pydantic knows, such as `dict[str, int]` or a model; the content must fit it, and is returned
    as it is. Raises ConfigError if the file cannot be read, is not valid JSON, or has other content.
    """
    name = f"{what} {source}".lstrip()
    return parse_json(_read_bytes(source, name, hint), name, shape=shape, hint=hint)


def parse_json(
    text: bytes | str, name: str, *, shape: Any = Any, hint: str = "", error: type[HydrazeroError] = ConfigError
) -> Any:
    """Return the content of a JSON text that `name` describes; see `read_json` for its `shape` and `hint`.

    Raises `error` with one sentence if the text is not valid JSON, is nested too deeply, or has other content.
    """
    advice = f"; {hint}" if hint else ""
    try:
        document = json.loads(decoded(text) if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as fault:  # a text that is no UTF-8, no JSON, or has a number of 5,000 digits
        reason = "it is nested too deeply" if isinstance(fault, RecursionError) else fault
        raise error(f"{name} is not valid JSON: {reason}{advice}.") from fault
    if shape is not Any:
        check_shape(document, name, shape, hint=hint, error=error)
    return document


def check_shape(
    document: Any, name: str, shape: Any, *, hint: str = "", error: type[HydrazeroError] = ConfigError
) -> None:
    """Raise `error`, with the place of the first fault, unless a document fits a type that pydantic knows."""
    from pydantic import ValidationError

    try:
        _adapter(shape).validate_python(document)
    except ValidationError as faults:
        fault = faults.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, fault["loc"])) or "its top level"
        message = fault["msg"][:1].lower() + fault["msg"][1:200]
        advice = f"; {hint}" if hint else ""
        raise error(f"{name} has other content than it should have ({place}: {message}){advice}.") from faults


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # its import takes 100 ms, and the launched ranks' watchers do not need it

    return TypeAdapter(shape)


def read_json_lines(path: Path, *, shape: Any = Any) -> list[Any]:
    """Return the documents of a file with one on each line, without an incomplete last line, which a writer may leave.

    Raises ConfigError, with the number of the line, for one that is not valid JSON or does not fit `shape`.
    """
    found = []
    lines = _read_bytes(path, str(path)).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            found.append(parse_json(line, f"{path}, line {number},", shape=shape))
        except ConfigError:
            if number == len(lines):  # without its line end: the writer was killed, or is writing
                break
            raise
    return found


def read_toml(source: Path | Traversable, what: str) -> dict[str, Any]:
    """Return the tables of a TOML file; `what` says what the file is for, such as 'run file'.

    Raises ConfigError if the file cannot be read, or, with line and column, if it is not valid TOML.
    """
    name = f"{what} {source}"
    try:
        return tomllib.loads(decoded(_read_bytes(source, name)))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not valid TOML: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{name} is not valid TOML: it is nested too deeply.") from error


def read_text(source: Path | Traversable, what: str = "", *, hint: str = "") -> str:
    """Return the content of a text file in UTF-8, or in UTF-16 with a byte order mark; see `read_json`."""
    name = f"{what} {source}".lstrip()
    try:
        return decoded(_read_bytes(source, name, hint))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not a text in UTF-8: {error}.") from error


def file_fault(error: OSError) -> str | None:
    """Return the sentence for users about a file that cannot be read or written; None for errors of other kinds."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if error.filename is None and not full:
        return None
    name = "a file" if error.filename is None else os.fsdecode(error.filename)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return (
            f"{name} cannot be written, since a file is where a folder is needed ({error.strerror}); name another path."
        )
    advice = "free some space there, or name a folder on another disk" if full else "check its path and permissions"
    return f"{name} cannot be {'written' if full else 'read or written'} ({error.strerror}); {advice}."


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text that begins with the given bytes: UTF-8 unless its byte order mark says UTF-16."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decoded(data: bytes) -> str:
    """Return a text in UTF-8 or UTF-16, without its byte order mark; raise UnicodeDecodeError for any other."""
    return data.decode(encoding_of(data))


def _read_bytes(source: Path | Traversable, name: str, hint: str = "") -> bytes:
    if isinstance(source, Path) and source.exists() and not source.is_file():
        what = "is a folder" if source.is_dir() else "is not a regular file"  # to open a pipe would wait for a writer
        raise ConfigError(f"{name} {what}; name a file.")
    try:
        if isinstance(source, Path) and (size := source.stat().st_size) > MOST_BYTES:
            raise ConfigError(
                f"{name} has {size:,} bytes, more than the {MOST_BYTES:,} that are read; name a smaller one."
            )
        return source.read_bytes()
    except OSError as error:
        advice = f"; {hint}" if hint else ""
        raise ConfigError(f"{name} cannot be read ({error.strerror}){advice}.") from error


def toml_text(table: Mapping[str, Any], comment: Sequence[str] = ()) -> str:
    """Return a file of tables as TOML, with comment lines before them.

    A list of tables is written under `[[name]]` headings. Raises ConfigError for a value that TOML cannot hold.
    """
    try:
        parts = [text for name, value in table.items() for text in _toml_parts(name, value)]
    except TypeError as error:
        raise ConfigError(f"this value cannot be written as TOML: {error}.") from error
    lines = "".join(f"# {line}\n" for line in comment)
    return "\n".join([lines, *parts] if comment else parts)


def _toml_parts(name: str, value: Any) -> list[str]:
    import tomli_w

    # tomli_w itself writes short tables of a list in one line each, to which nobody can add a line.
    flat = isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
    if flat and not any(isinstance(inner, Mapping) for item in value for inner in item.values()):
        return [f"[[{name}]]\n{tomli_w.dumps(item)}" for item in value]
    return [tomli_w.dumps({name: value})]


@contextmanager
def locked(path: Path, *, remove: bool = False) -> Iterator[None]:
    """Hold the lock of the file `path`, and wait for it while another process holds it.

    The system releases the lock when its process ends, however that happens. With `remove`, the file is removed at the
    end. Raises ConfigError where the file cannot be opened, or its file system has no locks.
    """
    while (held := _acquire(path, blocking=True)) is None:
        pass  # whoever held the lock has removed the file: lock the new one
    with held:
        try:
            yield
        finally:
            if remove:
                path.unlink(missing_ok=True)


def try_lock(path: Path) -> AcquireReturnProxy | None:
    """Lock the file `path`, or return None at once if another process holds its lock.

    The lock is released at the end of a `with` block of the returned object, by its `lock.release()`, or when this
    process ends, however that happens; processes forked from this one do not hold it. The file names this process, for
    `lock_holder`. Raises ConfigError where the file cannot be opened, and NoLocksError where its file system has no
    locks.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return _acquire(path, blocking=False, note=f"process {os.getpid()} on host {socket.gethostname()} since {started}")


def lock_holder(path: Path) -> str:
    """Return what `try_lock` has noted about the process that holds the lock of a file, as part of a sentence."""
    try:
        with open(path, "rb") as file:
            note = file.read(LONGEST_NOTE).decode(errors="replace")
    except OSError:
        note = ""
    return "".join(letter for letter in note if letter.isprintable()) or "another process"


def _acquire(path: Path, *, blocking: bool, note: str = "") -> AcquireReturnProxy | None:
    """Return the held lock of a file; None if another process holds it, or has removed the file meanwhile."""
    from filelock import FileLock, Timeout  # their import takes 50 ms, and few commands need them

    def check(descriptor: int) -> None:
        try:
            if not os.path.samestat(path.stat(), os.fstat(descriptor)):
                raise _ReplacedError
        except FileNotFoundError as error:
            raise _ReplacedError from error
        if note:
            with suppress(OSError):  # a full disk does not make the lock less of one
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, note.encode(), 0)

    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError(f"{path} is not a regular file and cannot be used as a lock; remove it.")
    # Only the kernel's own lock will do: a marker file would outlive a process that is killed.
    lock = FileLock(path, fallback_to_soft=False, thread_local=False, on_acquired=check)
    try:
        return lock.acquire(blocking=blocking)
    except (Timeout, _ReplacedError):
        return None
    except OSError as error:
        kind = NoLocksError if error.errno in NO_LOCKS else ConfigError
        raise kind(f"{path} cannot be locked ({error.strerror}); choose a folder on another disk.") from error


class NoLocksError(ConfigError):
    """A file cannot be locked, since its file system has no locks."""


class _ReplacedError(Exception):
    """The locked file has been removed or replaced meanwhile, so that its lock keeps nobody out."""
