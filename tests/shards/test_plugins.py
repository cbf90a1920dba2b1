"""Things by name: built-in ones, and those of packages that are installed for the test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hydrazero.shards import plugins, readers
from hydrazero.shards.errors import ConfigError, SourceError
from hydrazero.shards.plugins import Package, Registry
from hydrazero.shards.readers import READERS, ReadSettings, expand_sources, read_frames

GROUP = "hydrazero.test_things"
THINGS: Registry[type[BaseException]] = Registry(
    kind="thing",
    group=GROUP,
    builtin={"key": "builtins:KeyError", "value": "builtins:ValueError"},
    base=BaseException,
)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that lays a package with entry points beside a module where Python finds installed ones."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def forget() -> None:
        plugins._installed.cache_clear()
        readers._formats_by_suffix.cache_clear()

    forget()

    def laid(
        package: str, points: dict[str, str], code: str = "", *, module: str = "some_things", group: str = GROUP
    ) -> None:
        info = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        (Path(tmp_path) / f"{module}.py").write_text(code)
        forget()

    yield laid
    forget()
    sys.modules.pop("some_things", None)
    sys.modules.pop("broken_things", None)


def test_built_in_things_are_found():
    assert THINGS.names() == ["key", "value"]
    assert THINGS.get("key") is KeyError and THINGS.package_of("key") is None


def test_a_wrong_name_is_one_sentence():
    with pytest.raises(ConfigError, match=r"^unknown thing 'valeu' \(did you mean 'value'\?\)\.$"):
        THINGS.get("valeu")


def test_a_package_adds_a_thing(install):
    install("some-things", {"mine": "some_things:Mine"}, "class Mine(Exception):\n    pass\n")
    assert THINGS.names() == ["key", "value", "mine"]
    assert THINGS.get("mine").__name__ == "Mine"
    assert THINGS.package_of("mine") == Package(name="some-things", version="1.2")


def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match="'mine' comes from the package 'some-things', which is not installed"):
        THINGS.get("mine", package="some-things")


def test_two_packages_of_one_name(install):
    install("some-things", {"mine": "some_things:Mine", "key": "some_things:Mine"}, "class Mine(Exception): pass\n")
    install("other-things", {"mine": "some_things:Mine"}, "class Mine(Exception): pass\n")
    with pytest.raises(ConfigError, match="both define the thing 'mine'"):
        THINGS.get("mine")
    with pytest.raises(ConfigError, match="the packages hydrazero and some-things both define the thing 'key'"):
        THINGS.get("key")
    assert THINGS.get("value") is ValueError


def test_a_package_that_cannot_be_imported(install):
    install("broken-things", {"mine": "broken_things:Mine"}, "import no_such_module_here\n", module="broken_things")
    with pytest.raises(ConfigError, match="'mine' of the package 'broken-things' cannot be imported"):
        THINGS.get("mine")
    assert THINGS.get("value") is ValueError


def test_a_package_with_something_else(install):
    install("some-things", {"mine": "some_things:mine"}, "mine = 3\n")
    with pytest.raises(ConfigError, match=r"'mine' of the package 'some-things' is not a subclass of BaseException"):
        THINGS.get("mine")


READER = """
from functools import partial
from hydrazero.shards.readers.frames import FrameMaker, RawFrame, UnreadFrame, reader

def read_plain(path, settings):
    raw = RawFrame(numbers=[int(path.read_text())], positions=[[0.0] * 3], cell=[[0.0] * 3] * 3, pbc=False, energy=1.0)
    yield UnreadFrame(source_id="a", read=partial(FrameMaker(settings).make, raw, "a", {}), fraction=1.0)

read_first = reader(suffixes=(".one", ".npz"), further_suffixes=(".two",))(read_plain)
read_second = reader(suffixes=(".one",))(read_plain)
"""


def numbers_in(path: Path, name: str | None = None) -> list[int]:
    settings = ReadSettings(format=name)
    frames = [frame for file in expand_sources([path], settings) for frame in read_frames(file, settings)]
    return [int(frame.structure.numbers[0]) for frame in frames if frame.structure is not None]


def test_a_format_of_a_package_is_recognised_by_its_suffixes(install, tmp_path):
    points = {"first": "some_things:read_first", "plain": "some_things:read_plain"}
    install("some-things", points, READER, group="hydrazero.readers")
    folder = tmp_path / "files"
    folder.mkdir()
    for suffix, number in ((".one", 1), (".two", 2), (".three", 3)):
        (folder / f"a{suffix}").write_text(str(number))
    assert numbers_in(folder / "a.one") == numbers_in(folder) == [1]
    assert numbers_in(folder, "first") == [1, 2] and numbers_in(folder / "a.three", "plain") == [3]
    assert READERS.package_of("first") == Package(name="some-things", version="1.2")
    (folder / "a.npz").write_text("4")
    with pytest.raises(SourceError, match="not a readable npz archive"):  # a built-in format has precedence
        numbers_in(folder / "a.npz")
    with pytest.raises(SourceError, match="format 'plain' has no suffix to look for"):
        numbers_in(folder, "plain")


def test_two_formats_of_one_suffix(install, tmp_path):
    points = {"first": "some_things:read_first", "second": "some_things:read_second"}
    install("some-things", points, READER, group="hydrazero.readers")
    (tmp_path / "a.one").write_text("1")
    with pytest.raises(SourceError, match=r"formats 'first' and 'second' .* claim the suffix \.one"):
        numbers_in(tmp_path / "a.one")
    assert numbers_in(tmp_path / "a.one", "second") == [1]
