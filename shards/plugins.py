"""Encoders, readers and balancers by name: the built-in ones, and those that installed packages add as entry points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from hydrazero.shards.errors import ConfigError, HydrazeroError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package that adds something to hydrazero."""

    name: str
    """Name under which pip knows the package."""
    version: str
    """Installed version."""


@dataclass(frozen=True, kw_only=True)
class Registry(Generic[T]):
    """Everything of one kind that users choose by name.

    A package adds to it in its pyproject.toml, for example:

        [project.entry-points."hydrazero.encoders"]
        mynet = "my_package.mynet:MyNet"
    """

    kind: str
    """Singular noun for messages, such as 'encoder'."""
    group: str
    """Group of entry points, such as 'hydrazero.encoders'."""
    builtin: Mapping[str, str]
    """Name -> 'module:attribute', for everything of this kind that comes with hydrazero; imported on first use."""
    base: type | None = None
    """Class from which everything of this kind is derived; None if the registry holds functions."""
    error: type[HydrazeroError] = ConfigError
    """Type of the errors that are raised."""

    def names(self) -> list[str]:
        """Return all names: the built-in ones in their order, then those of other packages in alphabetical order."""
        return [*self.builtin, *sorted(set(_installed(self.group)) - set(self.builtin))]

    def package_of(self, name: str) -> Package | None:
        """Return the package that a name comes from; None for built-in and unknown names."""
        if name in self.builtin or name not in _installed(self.group):
            return None
        return _package(_installed(self.group)[name][0])

    def check(self, name: str, package: str | None = None) -> None:
        """Raise an error of one sentence if a name is unknown, or if several packages claim it.

        `package` is the package that the name came from when it was written down, if that is known.
        """
        points = _installed(self.group).get(name, [])
        claims = [*(["hydrazero"] if name in self.builtin else []), *(_package(point).name for point in points)]
        if len(claims) > 1:
            raise self.error(
                f"the packages {' and '.join(claims)} both define the {self.kind} '{name}'; uninstall one of them, or "
                "rename it there."
            )
        if not claims and package is not None:
            raise self.error(
                f"the {self.kind} '{name}' comes from the package '{package}', which is not installed; run: pip "
                f"install {package}"
            )
        if not claims:
            raise self.error(f"unknown {self.kind} '{name}'{did_you_mean(name, self.names())}.")

    def get(self, name: str, package: str | None = None) -> T:
        """Return the class or function of a name, imported if need be.

        Raises what `check` raises, and an error of one sentence if another package's module cannot be imported or
        defines something of another kind.
        """
        self.check(name, package)
        if name in self.builtin:
            module, attribute = self.builtin[name].split(":")
            known: T = getattr(import_module(module), attribute)
            return known
        (point,) = _installed(self.group)[name]
        where = f"the {self.kind} '{name}' of the package '{_package(point).name}'"
        try:
            added: Any = point.load()
        except Exception as error:  # whatever another package's module raises
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise self.error(f"{where} cannot be imported ({reason}); fix or uninstall that package.") from error
        fits = callable(added) if self.base is None else isinstance(added, type) and issubclass(added, self.base)
        if not fits:
            needed = "a function" if self.base is None else f"a subclass of {self.base.__name__}"
            raise self.error(f"{where} is not {needed} ({point.value}); fix or uninstall that package.")
        found: T = added
        return found


def _package(point: EntryPoint) -> Package:
    """Return the package that has defined an entry point."""
    if point.dist is None:  # only for entry points that no installed package stands behind
        return Package(name=point.value, version="")
    return Package(name=point.dist.name, version=point.dist.version)


@cache
def _installed(group: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points of a group by name; looked up once, since that reads every installed package."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found
