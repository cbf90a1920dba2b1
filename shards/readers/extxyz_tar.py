"""Archives of extended XYZ: OC20's trajectories, compressed one by one, with reference energies beside them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, cast

from hydrazero.shards.errors import SourceError, StructureError
from hydrazero.shards.readers.ase_reader import extxyz_frames
from hydrazero.shards.readers.frames import Frame, FrameMaker, ReadSettings, UnreadFrame, brief, reader
from hydrazero.shards.readers.opening import COMPRESSIONS, READ_ERRORS, plain_suffix

SUFFIXES = (".extxyz", ".xyz")
REFERENCES = ".txt"
ADSORPTION = "adsorption_energy"


@reader(suffixes=(".tar", ".tgz"))
def read_extxyz_tar(path: Path, settings: ReadSettings) -> Iterator[UnreadFrame]:
    """Read the .extxyz members of a tar, in their order, without unpacking it to the disk.

    A .txt of the same name has a line 'system, frame, reference energy' for each frame (OC20): they become the fields
    'system_id', 'frame_number' and 'reference_energy', and 'adsorption_energy' is the energy less the reference; it is
    the label if `fields.energy` says so. Raises SourceError for an archive that is damaged, or has a member that
    would lie outside of it.
    """
    subtract = settings.fields.energy == ADSORPTION
    if subtract:
        settings = replace(settings, fields=settings.fields.model_copy(update={"energy": "energy"}))
    maker = FrameMaker(settings)
    try:
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar.getmembers() if _safe(member, path).isfile()}
            size = max(path.stat().st_size, 1)
            # tarfile takes an archive that ends after a member for whole; whole ones end with two blocks of zeros.
            if path.suffix.lower() == ".tar" and size < tar.offset + tarfile.BLOCKSIZE:
                raise SourceError(f"{path} ends early, after {len(members)} members; copy it again.")
            for name, member in members.items():
                plain = Path(name)
                if plain_suffix(plain) in SUFFIXES:
                    references = _references(tar, members, plain)
                    if references is None and subtract:
                        raise SourceError(f"{path}: no text with reference energies is beside {name}.")
                    fraction = (member.offset_data + member.size) / size
                    frames = extxyz_frames(
                        _text(tar, member), f"{path.name}/{name}", f"{path}, {name}", lambda: 0.0, maker
                    )
                    for number, frame in enumerate(frames):
                        read = frame.read
                        if references is not None:
                            read = partial(_with_reference, frame, number, references, subtract)
                        yield replace(frame, read=read, fraction=fraction)
    except (tarfile.TarError, *READ_ERRORS) as error:
        raise SourceError(f"{path} is no whole tar archive ({brief(error)}); copy it again.") from error


def _safe(member: tarfile.TarInfo, path: Path) -> tarfile.TarInfo:
    place = PurePosixPath(member.name)
    if place.is_absolute() or ".." in place.parts:
        raise SourceError(f"{path} has a member '{member.name}' that would lie outside of it; it is not to be trusted.")
    return member


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    raw = tar.extractfile(member)
    unpack = COMPRESSIONS.get(Path(member.name).suffix.lower())
    return io.TextIOWrapper(cast(Any, raw if unpack is None else unpack(raw)), encoding="utf-8")


def _references(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: Path) -> list[list[str]] | None:
    """Words of each line of the text beside an extxyz; None if there is no such text."""
    stem = name.with_suffix("") if name.suffix.lower() in COMPRESSIONS else name
    for suffix in ("", *COMPRESSIONS):
        member = members.get(f"{stem.with_suffix(REFERENCES).as_posix()}{suffix}")
        if member is not None:
            return [line.strip().split(",") for line in _text(tar, member) if line.strip()]
    return None


def _with_reference(frame: UnreadFrame, number: int, references: list[list[str]], subtract: bool) -> Frame:
    """Read a frame, with the line that belongs to it."""
    words = references[number] if number < len(references) else []
    try:
        system, step, reference = words[0], words[1].removeprefix("frame"), float(words[2])
    except (IndexError, ValueError):
        told = f"'{','.join(words)}' is not 'system, frame, reference energy'" if words else "there is none"
        fault = StructureError("no_reference", f"of the text's line for the frame, {told}")
        return Frame(source_id=frame.source_id, error=fault)
    made = frame.read()
    info: dict[str, Any] = {**made.info, "system_id": system, "frame_number": step, "reference_energy": reference}
    structure = made.structure
    if structure is not None and structure.energy is not None:
        info[ADSORPTION] = structure.energy - reference
        structure = replace(structure, energy=info[ADSORPTION]) if subtract else structure
    return replace(made, structure=structure, info=info)
