"""Items of HDF5 files, none of which may be in another file: a file must not have others of this machine read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydrazero.shards.errors import SourceError
from hydrazero.shards.readers.frames import brief
from hydrazero.shards.readers.opening import optional_module
from hydrazero.shards.text.foreign_text import escaped

MOST_LINKS = 16
"""Largest number of soft links that lead to an item; more are a circle."""


def open_hdf5(path: Path) -> tuple[Any, Any]:
    """Return h5py and an open file; raise SourceError if h5py is not installed, or the file is not HDF5."""
    h5py = optional_module("h5py", "h5py", f"{path}: reading HDF5")
    try:
        return h5py, h5py.File(path, "r")
    except OSError as error:
        raise SourceError(
            f"{path} is not a readable HDF5 file ({brief(error)}); copy it again if it should be one."
        ) from error


class OwnItems(Mapping[str, Any]):
    """The datasets and groups below a group of HDF5, by their paths.

    Raises SourceError for a link to another file, and for a dataset whose numbers are in another file.
    """

    def __init__(self, h5py: Any, group: Any, source: Path) -> None:
        self._h5py, self.group, self._source = h5py, group, source

    @property
    def attrs(self) -> Any:
        """Attributes of the group."""
        return self.group.attrs

    def dataset(self, name: str) -> Any:
        """Return a dataset, or None if there is none of that name."""
        item = self.get(name)
        return item if isinstance(item, self._h5py.Dataset) else None

    def below(self, name: str) -> OwnItems | None:
        """Return the items of a group inside of this one, or None if there is none of that name."""
        link = self.group.get(name, getlink=True)
        if isinstance(link, self._h5py.HardLink) and self.group.get(name, getclass=True) is not self._h5py.Group:
            return None  # a dataset, as most items of large files are, which is not opened for this
        try:
            item = self._resolved(self.group, name, 0)
        except KeyError:
            return None
        return OwnItems(self._h5py, item, self._source) if isinstance(item, self._h5py.Group) else None

    @property
    def address(self) -> Any:
        """Address of the group in the file, which is the same for all links to it."""
        return self._h5py.h5o.get_info(self.group.id).addr

    def __getitem__(self, name: str) -> Any:
        item = self._resolved(self.group, name, 0)
        if isinstance(item, self._h5py.Dataset):
            virtual = item.is_virtual and any(source.file_name != "." for source in item.virtual_sources())
            if virtual or item.external:
                raise SourceError(
                    f"{self._source}: the numbers of '{escaped(name)}' are in another file, which is not read; copy "
                    "them."
                )
        return item

    def __iter__(self) -> Iterator[str]:
        return iter(self.group)

    def __len__(self) -> int:
        return len(self.group)

    def _resolved(self, group: Any, name: str, links: int) -> Any:
        place = group.file if name.startswith("/") else group
        for part in filter(None, name.split("/")):
            if not isinstance(place, self._h5py.Group):
                raise KeyError(name)
            if part == ".":
                continue
            link = place.get(part, getlink=True)
            if link is None or part == "..":
                raise KeyError(name)
            if isinstance(link, self._h5py.ExternalLink):
                raise SourceError(
                    f"{self._source}: '{escaped(name)}' is a link to the file '{escaped(link.filename)}', which is not "
                    "followed; copy what it leads to."
                )
            if isinstance(link, self._h5py.SoftLink):
                if links == MOST_LINKS:
                    raise KeyError(name)
                place = self._resolved(place, link.path, links + 1)
            else:
                place = place[part]
        return place
