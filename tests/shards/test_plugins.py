"""Things by name: built-in ones, and those of packages that are installed for the test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hydrazero.shards import plugins
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.plugins import Package, Registry

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
    plugins._installed.cache_clear()

    def laid(package: str, points: dict[str, str], code: str = "", module: str = "some_things") -> None:
        info = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        (Path(tmp_path) / f"{module}.py").write_text(code)
        plugins._installed.cache_clear()

    yield laid
    plugins._installed.cache_clear()
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
