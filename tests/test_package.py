"""The house: what may import what, that every folder is packaged, and that the README's commands exist."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from structures import small_model

from hydrazero.launch.cli.main import SECTIONS, main
from hydrazero.models import load_model, save_model
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import load_run_config

ROOT = Path(__file__).parents[1]
ROOMS = ("shards", "models", "trainer", "launch", "ds_configs")
FLOORS = (
    ("shards",),
    ("models",),
    ("trainer.balance", "trainer.ranks", "trainer.plots"),
    ("trainer.config",),
    ("trainer.engine", "trainer.records"),
    ("trainer.cost", "trainer.checkpoint"),
    ("trainer.evaluation",),
    ("trainer.loop",),
    ("trainer.start",),
    ("trainer.setup",),
    ("trainer.rehearsal", "trainer.search"),
    ("trainer.train", "trainer.propose"),
    ("trainer.finetune", "trainer.report"),
    ("trainer.demo",),
    ("launch",),
)
"""The order of the rooms: each may import those of lower floors, none of its own floor or above."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LAZY_FACTORIES = {
    "hydrazero.models.inference.potential",
    "hydrazero.models.inference.ase_calculator",
    "hydrazero.models.inference.reused_neighbours",
    "hydrazero.models.inference.torch_sim_model",
}
"""The one circle of imports: a potential makes the interfaces that compute with it."""
MOST_FILES = 16
HOLD_RUN_CONFIG = ("launch/cli/", "trainer/finetune/command.py")
"""Command files."""
ONLY_IN = {
    "deepspeed": {"trainer"},
    "tensorboard": {"trainer"},
    "mpi4py": {"shards/convert/workers.py"},
    "webdataset": {"shards/convert/writer.py", "shards/stream/block_reader.py"},
}


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def module_name(path: Path) -> str:
    return ".".join(("hydrazero", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in modules()}


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it: at its top, in functions, for type checkers."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update({name if name in MODULES else node.module for name in full})
    return names


def room_of(module: str) -> str:
    """Return the room of a module: a top folder, or a folder or file of trainer."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "trainer" else parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_lower_floors_only(path):
    top, place, room = path.relative_to(ROOT).parts[0], str(path.relative_to(ROOT)), room_of(module_name(path))
    for name in imported(path):
        parts = name.split(".")
        if name in MODULES and room_of(name) not in (room, "ds_configs"):
            assert FLOOR[room_of(name)] < FLOOR[room], f"{place} imports {name}"
        if parts[0] in ONLY_IN:
            assert top in ONLY_IN[parts[0]] or place in ONLY_IN[parts[0]], f"{place} imports {name}"


def test_no_circle_of_imports_but_the_lazy_factories():
    left = {name: {other for other in imported(path) if other in MODULES} - {name} for name, path in MODULES.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    while free := {name for name in left if not any(name in others for others in left.values())}:
        left = {name: others for name, others in left.items() if name not in free}
    assert left.keys() <= LAZY_FACTORIES


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules()}), ids=lambda path: path.name)
def test_folders_can_be_taken_in_at_a_glance(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_FILES


def test_functions_get_the_section_that_they_use_and_not_the_whole_run_file():
    """RunConfig is known where run files are read, where runs are put together, and to the command line."""
    allowed = ("trainer/config/", "trainer/setup.py", "trainer/train.py", "trainer/rehearsal/", *HOLD_RUN_CONFIG)
    naming = [str(path.relative_to(ROOT)) for path in modules() if "RunConfig" in path.read_text(encoding="utf-8")]
    assert [place for place in naming if not place.startswith(allowed)] == []


def test_every_folder_with_code_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(("hydrazero", *path.parent.relative_to(ROOT).parts)) for path in modules()}
    assert folders == set(project["packages"])


def test_no_file_hides_a_module_of_python_or_of_a_dependency():
    others = {
        "torch",
        "deepspeed",
        "webdataset",
        "tensorboard",
        "click",
        "rich",
        "ase",
        "numpy",
        "vesin",
        "safetensors",
    }
    taken = set(sys.stdlib_module_names) | others
    assert [path for path in modules() if path.stem in taken and path.stem != "__init__"] == []


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "runs").glob("*.toml")), ids=lambda path: path.stem)
def test_run_files_are_valid(path, tmp_path):
    text = path.read_text()
    if "[[tasks]]" not in text:  # the demo adds its own
        text += '\n[[tasks]]\nname = "t"\nshards = "s"\n'
    (tmp_path / "run.toml").write_text(text)
    config = load_run_config(tmp_path / "run.toml")
    deepspeed_config(config.deepspeed, config.train.steps)


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "convert").glob("*.toml")), ids=lambda path: path.stem)
def test_convert_settings_are_valid(path):
    from hydrazero.shards.convert.settings import load_convert_settings

    assert load_convert_settings(path).source["method"]


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ hydrazero ")]


def test_the_readme_shows_the_commands():
    shown = {command.split()[1] for command in readme_commands()}
    assert {"convert", "init", "train", "evaluate", "export", "screen", "launch"} <= shown


@pytest.mark.parametrize("command", readme_commands())
def test_options_in_the_readme_exist(command):
    words = command.split("#")[0].split()[1:]
    known = {option for parameter in main.commands[words[0]].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("name", sorted(main.commands))
def test_help_pages(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0 and main.commands[name].help.splitlines()[0] in " ".join(result.output.split())


def test_the_help_page_lists_each_command_with_a_sentence_on_one_line():
    page = CliRunner().invoke(main, ["--help"], terminal_width=80).output.splitlines()
    listed = [name for commands in SECTIONS.values() for name in (command.name for command in commands)]
    assert sorted(listed) == sorted(main.commands) and all(f"{heading}:" in page for heading in SECTIONS)
    for name in listed:
        (line,) = [line for line in page if line.split()[:1] == [name]]
        assert line.split(maxsplit=1)[1] == main.commands[name].help.splitlines()[0] and line.endswith(".")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `pip install .` makes."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    options = ["--no-deps", "--no-build-isolation", "-w", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", "-q", *options, "."]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_code_and_data(wheel):
    """What `pip install .` puts into another environment: modules, sources of kernels, run files, DeepSpeed JSON."""
    held = set(zipfile.ZipFile(wheel).namelist())
    kinds = ("*.json", "*.toml", "*.cpp", "*.h", "py.typed")
    data = [path for room in ROOMS for kind in kinds for path in (ROOT / room).rglob(kind)]
    expected = {f"hydrazero/{path.relative_to(ROOT).as_posix()}" for path in [*modules(), *data]}
    assert expected - held == set()


def empty_environment(folder: Path, wheel: Path) -> Path:
    """Return the Python of a fresh environment with the wheel and its dependencies, but for those of training."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    left_out = ("hydrazero", "__editable__", *ONLY_IN)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.replace("-", "_").lower().startswith(left_out) and path.name != "__pycache__":
            (packages / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return python


def test_the_wheel_works_without_deepspeed(wheel, tmp_path):
    """In a fresh environment without DeepSpeed, TensorBoard, mpi4py and WebDataset."""
    python = empty_environment(tmp_path / "environment", wheel)
    model = small_model("painn")
    save_model(model, tmp_path / "model.safetensors")
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def output(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Usage: hydrazero" in output("hydrazero", "--help")
    code = (
        "import importlib.util; from hydrazero.models import load_model; "
        "print(load_model('model.safetensors').tasks, importlib.util.find_spec('deepspeed'))"
    )
    assert output(str(python), "-c", code) == f"{load_model(tmp_path / 'model.safetensors').tasks} None\n"


def test_what_deepspeed_does_not_document_is_known_in_two_files_alone():
    """In memory `ZeroLayout`, on the disk `ZeroFiles`: a new version of DeepSpeed changes nothing else."""
    private = re.compile(
        r"fp32_groups|fp32_partitioned|bit16_groups|bf16_groups|fp16_groups|\bds_(id|numel|tensor|shape)\b|_hp_mapping"
        r"|hp_param|mp_rank_|zero_pp_rank|averaged_gradients|checkpoint_engine|_copy_recovery|checkpoint_event"
    )
    using = {str(path.relative_to(ROOT)) for path in modules() if private.search(path.read_text(encoding="utf-8"))}
    assert using == {"trainer/engine/zero_layout.py", "trainer/checkpoint/zero_files.py"}
