"""Tar archives of extended XYZ, such as OC20: compressed trajectories with reference energies beside them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TextIO, cast

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.extxyz.text import extxyz_frames
from hydrazero.shards.readers.finding.folders import ABOUT
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import COMPRESSIONS, READ_ERRORS, in_utf8, is_hidden, plain_suffix, text_of

SUFFIXES = (".extxyz", ".xyz")
REFERENCES = ".txt"
ADSORPTION = "adsorption_energy"


@reader(suffixes=(".tar", ".tgz"))
def read_extxyz_tar(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Yield the frames of the .extxyz members of a tar, in their order, without unpacking it to the disk.

    A .txt of the same name has a line 'system, frame, reference energy' for each frame (OC20). They become the fields
    'system_id', 'frame_number' and 'reference_energy', and 'adsorption_energy' is the energy minus the reference; it
    is the label if `fields.energy` names it. Raises SourceError for a damaged archive, or for a member whose path
    leads out of the archive.
    """
    subtract = settings.fields.energy == ADSORPTION
    if subtract:
        settings = replace(settings, fields=settings.fields.model_copy(update={"energy": "energy"}))
    maker = FrameMaker(settings)
    try:
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar.getmembers() if _safe(member, path).isfile()}
            size = max(path.stat().st_size, 1)
            # tarfile accepts an archive that ends after a member, but complete ones end with two blocks of zeros.
            if path.suffix.lower() == ".tar" and size < tar.offset + tarfile.BLOCKSIZE:
                raise SourceError(f"{path} is truncated after {len(members)} members; copy it again.")
            for name, member in members.items():
                plain = Path(name)
                if _holds_frames(name):
                    references = _references(tar, members, plain, path)
                    if references is None and subtract:
                        raise SourceError(f"{path}: there is no .txt with reference energies beside {name}.")
                    fraction = (member.offset_data + member.size) / size
                    frames = extxyz_frames(
                        _text(tar, member, f"{path}, {name}"),
                        f"{path.name}/{name}",
                        f"{path}, {name}",
                        lambda: 0.0,
                        maker,
                    )
                    for number, frame in enumerate(frames):
                        read = frame.read
                        if references is not None:
                            read = partial(_with_reference, frame, number, references, subtract)
                        yield replace(frame, read=read, fraction=fraction)
    except (tarfile.TarError, *READ_ERRORS) as error:
        raise SourceError(f"{path} is not a complete tar archive ({brief(error)}); copy it again.") from error


def _safe(member: tarfile.TarInfo, path: Path) -> tarfile.TarInfo:
    place = PurePosixPath(member.name)
    if place.is_absolute() or ".." in place.parts:
        raise SourceError(
            f"{path} has a member '{member.name}' whose path leads out of it; such an archive is not safe."
        )
    return member


def members_not_read(path: Path) -> list[str]:
    """Return the names of the files in an archive that `read_extxyz_tar` passes over.

    Hidden files and those about the data, such as README, are left out. The archive is read to its end.
    One that is damaged has none, since its reader says so.
    """
    try:
        with tarfile.open(path) as tar:
            names = [member.name for member in tar.getmembers() if member.isfile()]
    except (tarfile.TarError, *READ_ERRORS):
        return []
    frames = {_stem(name) for name in names if _holds_frames(name)}
    shown = [name for name in names if not (_is_hidden(name) or _holds_frames(name) or _is_about(name))]
    return [name for name in shown if not (plain_suffix(Path(name)) == REFERENCES and _stem(name) in frames)]


def _is_about(name: str) -> bool:
    return ABOUT.fullmatch(PurePosixPath(name).name) is not None


def _holds_frames(name: str) -> bool:
    return plain_suffix(Path(name)) in SUFFIXES and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(map(is_hidden, PurePosixPath(name).parts))


def _stem(name: str) -> str:
    """Return a name without its suffix, and without that of a compression."""
    plain = Path(name)
    inner = plain.with_suffix("") if plain.suffix.lower() in COMPRESSIONS else plain
    return inner.with_suffix("").as_posix()


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> TextIO:
    raw = tar.extractfile(member)
    unpack = COMPRESSIONS.get(Path(member.name).suffix.lower())
    return text_of(in_utf8(raw if unpack is None else unpack(cast(Any, raw))), where)


def _references(
    tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: Path, path: Path
) -> list[list[str]] | None:
    """Return the words of each line of the .txt beside an .extxyz; None if there is no such file."""
    for suffix in ("", *COMPRESSIONS):
        member = members.get(f"{_stem(name.as_posix())}{REFERENCES}{suffix}")
        if member is not None:
            text = _text(tar, member, f"{path}, {member.name}")
            return [line.strip().split(",") for line in text if line.strip()]
    return None


def _with_reference(frame: UnreadFrame, number: int, references: list[list[str]], subtract: bool) -> Frame:
    """Read a frame, and add the values of the line that belongs to it."""
    words = references[number] if number < len(references) else []
    try:
        system, step, reference = words[0], words[1].removeprefix("frame"), float(words[2])
    except (IndexError, ValueError):
        found = f"'{','.join(words)}'" if words else "missing"
        text = f"the line of the frame in the .txt is {found}, not 'system, frame, reference energy'"
        fault = StructureError("no_reference", text)
        return Frame(source_id=frame.source_id, error=fault)
    made = frame.read()
    info: dict[str, Any] = {**made.info, "system_id": system, "frame_number": step, "reference_energy": reference}
    structure = made.structure
    if structure is not None and structure.energy is not None:
        info[ADSORPTION] = structure.energy - reference
        structure = replace(structure, energy=info[ADSORPTION]) if subtract else structure
    return replace(made, structure=structure, info=info)
