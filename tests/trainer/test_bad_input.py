"""Bad input on the command line: one clear sentence that names the place, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from click.testing import CliRunner, Result
from sources import make_shards, metals, molecules, write_extxyz
from structures import small_model

from hydrazero.launch.cli.main import main
from hydrazero.models.inference.model_file import FORMAT_VERSION, save_model
from hydrazero.shards.manifest import read_manifest
from hydrazero.trainer.config.deepspeed_json import deepspeed_config
from hydrazero.trainer.config.run_file import RunConfig, load_run_config

HEADER = 'Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="F F F"'


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, *words: str) -> None:
    """The command failed with one sentence that holds the words."""
    lines = [line for line in result.stderr.splitlines() if line.startswith(("Error:", "Error "))]
    assert result.exit_code != 0 and result.exit_code != -1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def frame(*rows: str, header: str = HEADER) -> str:
    return f"{len(rows)}\n{header}\n" + "\n".join(rows) + "\n"


GOOD = frame("O 0 0 0 0 0 0", "H 0 0 1 0 0 0")
H_AT = "H 0 0 {} 0 0 0"
PERIODIC = 'Lattice="{}" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="T T T"'

BAD_FRAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no energy": (GOOD.replace("energy=-1.0", ""), ("no energy", "'energy'")),
    "no forces": (frame("H 0 0 0", header="Properties=species:S:1:pos:R:3 energy=-1.0"), ("no forces",)),
    "NaN energy": (GOOD.replace("energy=-1.0", "energy=nan"), ("no energy (field 'energy')", "NaN")),
    "infinite energy": (GOOD.replace("energy=-1.0", "energy=inf"), ("energy is inf",)),
    "NaN force": (frame("O 0 0 0 0 0 0", "H 0 0 1 0 nan 0"), ("force on atom 1",)),
    "forces of the wrong shape": (
        frame("O 0 0 0 0 0", header="Properties=species:S:1:pos:R:3:forces:R:2 energy=-1.0"),
        ("forces", "shape (1, 2)"),
    ),
    "zero cell": (frame("O 0 0 0 0 0 0", header=PERIODIC.format("0 0 0 0 0 0 0 0 0")), ("length zero",)),
    "singular cell": (frame("O 0 0 0 0 0 0", header=PERIODIC.format("4 0 0 0 4 0 4 4 0")), ("linearly dependent",)),
    "same place": (frame("O 0 0 0 0 0 0", H_AT.format(1), H_AT.format(1)), ("atoms 1 and 2", "same place")),
    "same place across the boundary": (
        frame("O 2 2 0 0 0 0", "H 2 2 4.001 0 0 0", header=PERIODIC.format("4 0 0 0 4 0 0 0 4")),
        ("atoms 0 and 1", "same place"),
    ),
    "unknown element": (frame("Qq 0 0 0 0 0 0"), ("Qq", "element")),
    "broken line": (frame("O 0 zero 0 0 0 0"), ("zero",)),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frame(tmp_path, name):
    text, words = BAD_FRAMES[name]
    source = tmp_path / "source.xyz"
    source.write_text(GOOD + text + GOOD.replace(" 1 0", " 2 0"))
    out = tmp_path / "shards" / "out"
    refused(command("convert", source, "--task", "t", "--out", out), "source.xyz", "frame 1", *words)
    assert not (tmp_path / "shards").exists() or list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_skip_bad_sets_aside_and_counts(tmp_path, name):
    source = tmp_path / "source.xyz"
    good = [frame("O 0 0 0 0 0 0", H_AT.format(0.9 + 0.01 * n)) for n in range(30)]
    source.write_text(good[0] + BAD_FRAMES[name][0] + "".join(good[1:]))
    result = command("convert", source, "--task", "t", "--out", tmp_path / "out", "--skip-bad")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "out")
    assert manifest.structures() == 30 and sum(manifest.set_aside.values()) == 1
    (line,) = (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()
    assert json.loads(line)["source_id"] == "source.xyz#1"
    assert json.loads(line)["reason"] == next(iter(manifest.set_aside))


def _empty(path: Path) -> None:
    path.write_text("")


def _truncated(path: Path) -> None:
    path.write_text((GOOD * 3)[:-25])


def _binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def _no_count(path: Path) -> None:
    path.write_text(GOOD + "what is this\n")


@pytest.mark.parametrize(
    ("damage", "suffix", "words"),
    [
        (_empty, ".xyz", ("is empty",)),
        (_truncated, ".xyz", ("frame 2", "truncated")),
        (_binary, ".xyz", ("cannot be read",)),
        (_binary, ".npz", ("not a readable npz",)),
        (_binary, ".db", ("ASE database",)),
        (_binary, ".cif", ("frame 0", "cannot be read")),
        (_no_count, ".xyz", ("frame 1", "what is this")),
    ],
)
def test_bad_file(tmp_path, damage: Callable[[Path], None], suffix, words):
    source = tmp_path / f"source{suffix}"
    damage(source)
    for more in ((), ("--skip-bad",)):  # a file that breaks off is no bad frame
        refused(command("convert", source, "--task", "t", "--out", tmp_path / "out", *more), source.name, *words)
        assert not (tmp_path / "out").exists()


def test_bad_conversion_settings(tmp_path):
    source, config, out = tmp_path / "a.xyz", tmp_path / "c.toml", tmp_path / "out"
    source.write_text(GOOD)
    base = ("convert", source, "--task", "t", "--out", out)
    for text, words in (
        ('[units]\nenergy = "Hartee"', ("unit 'Hartee'", "did you mean 'Hartree'")),
        ('[units]\nforces = "eV/Mile"', ("unit 'eV/Mile'",)),
        ("[unit]", ("c.toml", "unit", "did you mean 'units'")),
        ("duplicates = 3", ("c.toml", "duplicates must be a text, not 3")),
        ('[labels]\nrequire = ["enregy"]', ("enregy", "did you mean 'energy'")),
        ("[split]\ntrain = 0.9", ("add up to 1",)),
        ("nonsense", ("c.toml", "not valid TOML")),
    ):
        config.write_text(text)
        refused(command(*base, "--config", config), *words)
    refused(command(*base, "--task", "u"), "--task is given 2 times (t, u)")
    refused(command(*base, "--format", "extxzy"), "extxzy", "did you mean 'extxyz'")
    refused(command("convert", source, "--task", "a/b", "--out", out), "a/b")
    refused(command("convert", tmp_path / "absent.xyz", "--task", "t", "--out", out), "absent.xyz does not exist")
    assert not out.exists()
    out.mkdir()
    refused(command(*base), "exists")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"), "emt", molecules(60) + metals(10))


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "emt"))


def run_file(folder: Path, shards: Path, text: str = "", tasks: str | None = None) -> Path:
    tasks = f'[[tasks]]\nname = "emt"\nshards = "{shards}"\n' if tasks is None else tasks
    path = folder / "run.toml"
    path.write_text(
        f'[run]\nout = "{folder}/run"\n{tasks}\n[train]\nsteps = 2\n'
        "[model]\nfeatures = 8\nlayers = 1\ncutoff = 4.0\nhead_features = 4\n" + text
    )
    return path


def test_damaged_shards(copied, tmp_path):
    tar = copied / "train-000000.tar"
    whole = tar.read_bytes()
    run = run_file(tmp_path, copied)
    for damage, words in (
        (lambda: tar.write_bytes(whole[:-3000]), ("train-000000.tar", "truncated")),
        (lambda: tar.unlink(), ("train-000000.tar", "missing")),
    ):
        damage()
        refused(command("inspect", copied), *words)
        refused(command("train", run), *words)
        assert not (tmp_path / "run").exists()
        tar.write_bytes(whole)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    tar.write_bytes(bytes(flipped))
    refused(command("inspect", copied, "--verify"), "train-000000.tar", "checksum")
    refused(command("train", run, "--set", "data.workers=1"), "train-000000.tar", "block 0", "checksum")


def _model(folder: Path) -> Path:
    path = folder / "m.safetensors"
    if not path.exists():
        save_model(small_model(), path)
    return path


def test_bad_manifests(copied, tmp_path):
    manifest = copied / "manifest.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "format_version": 99}))
    refused(command("inspect", copied), "format version 99")
    manifest.write_text(json.dumps({key: value for key, value in document.items() if key != "labels"}))
    refused(command("inspect", copied), "labels")
    manifest.write_text("{")
    refused(command("inspect", copied), "manifest.json is not valid JSON")
    manifest.unlink()
    refused(command("inspect", copied), "manifest.json")
    refused(command("inspect", tmp_path / "nowhere"), "nowhere")


def test_bad_run_files(shards, tmp_path):
    def run(text: str = "", *more: object, tasks: str | None = None) -> Result:
        return command("train", run_file(tmp_path, shards, text, tasks), *more)

    refused(run("radius = 3\n"), "run.toml", "model.radius is not known")
    refused(run("layer = 3\n"), "model.layer", "did you mean 'layers'")
    refused(run("", "--set", "model.cutoff=long"), "model.cutoff must be a number, not 'long'")
    refused(run("", "--set", "train.steps=2.5"), "train.steps must be a whole number")
    refused(run("", "--set", "train.steps=0"), "train.steps is 0")
    refused(run("", "--set", "nonsense"), "section.key=value")
    refused(run("", "--set", "tasks.weight=2"), "[[tasks]] is a list of tables; change it in the run file.")
    refused(run("", "--set", "train.steps.x=2"), "'steps' is a single value", "set it as train.steps=VALUE.")
    refused(run("", "--set", "steps=5"), "--set steps=5: the key is in a section; did you mean train.steps?")
    for key, value, words in (
        ("run.seed", -1, "must be at least 0"),
        ("data.temperature", 0.5, "must be at least 1"),
        ("data.temperature", "nan", "must be a finite number"),
        ("model.cutoff", 0, "must be at least 0.5"),
        ("model.cutoff", "inf", "must be a finite number"),
        ("loss.forces_weight", "nan", "must be a finite number"),
    ):
        refused(run("", "--set", f"{key}={value}"), f"{key} is {value}", words)
    weightless = f'[[tasks]]\nname = "emt"\nshards = "{shards}"\nweight = 0.0\n'
    refused(run(tasks=weightless), "every task has the weight 0")
    zero = "[loss]\nenergy_weight = 0.0\nforces_weight = 0.0\nstress_weight = 0.0\n"
    refused(run(zero), "trains nothing", "look at [loss]")
    refused(run("", "--set", "model.encoder=pain"), "toml: model.encoder: unknown", "'pain'", "did you mean 'painn'")
    refused(run('encoder = "pain"\nsize = "tiny"\n'), "toml: model.encoder: unknown", "'pain'")
    refused(run("", "--set", "model.repulsion=zbll"), "model.repulsion 'zbll'", "did you mean 'zbl'")
    refused(run("[deepspeed]\nconfig = 'zero7'\n"), "zero7", "known: zero0, ")
    refused(run("[loss]\nkind = 'hubber'\n"), "hubber", "did you mean 'huber'")
    refused(run("[batch]\nstructures = 4\natoms = 3\nslots = 400\n"), "'emt'", "batch.atoms to at least 8")
    absent = '[[tasks]]\nname = "x"\nshards = "nowhere"\n'
    refused(run(tasks=absent), "task 'x'", "nowhere", "hydrazero convert")
    twice = f'[[tasks]]\nname = "emt"\nshards = "{shards}"\n' * 2
    refused(run(tasks=twice), "'emt' is named twice")
    refused(run(tasks="tasks = []\n"), "tasks")
    refused(command("train", tmp_path / "absent.toml"), "absent.toml")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    refused(run(), "holds a run already", "--resume")
    refused(run("", "--resume"), "run.json", "other content", "tasks: field required")
    shutil.rmtree(tmp_path / "run")
    refused(run("", "--resume"), "holds no run to resume")


BAD_ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no object": ("[1, 2]", ("ds.json", "no object of settings")),
    "no JSON": ("{", ("ds.json", "not valid JSON")),
    "null scheduler": ('{"scheduler": null}', ("scheduler is null", "left out")),
    "null parameters": ('{"optimizer": {"type": "Adam", "params": null}}', ("params is null",)),
    "bf16": ('{"bf16": {"enabled": true}}', ("bf16 is supported with the ZeRO stages 1, 2, 3, not with 0",)),
    "fp16": ('{"fp16": {"enabled": "auto"}}', ("fp16.enabled is 'auto'",)),
    "autocast": (
        '{"torch_autocast": {"enabled": true, "dtype": "float16"}}',
        ("torch_autocast.dtype is 'float16'", "'bfloat16'"),
    ),
    "clipping": ('{"gradient_clipping": "much"}', ("gradient_clipping is 'much'",)),
    "warm-up": (
        '{"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}}',
        ("warmup_num_steps is 2, but the run has 2 steps",),
    ),
    "unknown optimizer": ('{"optimizer": {"type": "AdamX", "params": {"lr": 1e-3}}}', ("DeepSpeed", "AdamX")),
    "unknown parameter": (
        '{"optimizer": {"type": "AdamW", "params": {"lrr": 1e-3}}}',
        ("params.lrr is not known (did you mean 'lr'?)",),
    ),
    "other name of the rate": (
        '{"optimizer": {"type": "AdamW", "params": {"learning_rate": 1e-3}}}',
        ("deepspeed.optimizer.params.learning_rate is not known (did you mean 'lr'?)",),
    ),
    "rate that is a word": (
        '{"optimizer": {"type": "Lamb", "params": {"lr": "fast"}}}',
        ('deepspeed.optimizer.params.lr must be a number, not "fast"',),
    ),
    "betas that are a number": (
        '{"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}',
        ("deepspeed.optimizer.params.betas must be a list of numbers, not 0.9",),
    ),
    "unknown stage": ('{"zero_optimization": {"stage": 7}}', ("DeepSpeed", "stage", "0, 1, 2, 3")),
    "unknown ZeRO key": ('{"zero_optimization": {"stag": 1}}', ("DeepSpeed", "stag", "not permitted")),
    "no optimizer": ('{"optimizer": {}}', ("optimizer.type is missing",)),
    "batch size": ('{"train_batch_size": 7, "gradient_accumulation_steps": 2}', ("DeepSpeed", "train_batch_size")),
}


@pytest.mark.parametrize("name", BAD_ENGINES)
def test_bad_deepspeed_configurations(shards, tmp_path, name):
    text, words = BAD_ENGINES[name]
    config = tmp_path / "ds.json"
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    document = json.loads(text) if text != "{" else None
    config.write_text(json.dumps({**base, **document}) if isinstance(document, dict) else text)
    refused(command("train", run_file(tmp_path, shards, f'[deepspeed]\nconfig = "{config}"\n')), *words)
    assert not (tmp_path / "run").exists()


def _scheduler(config: RunConfig) -> dict[str, object]:
    params: dict[str, object] = deepspeed_config(config.deepspeed, config.train.steps)["scheduler"]["params"]
    return params


def test_a_warm_up_is_cut_only_where_nobody_set_it(shards, tmp_path):
    path = run_file(tmp_path, shards)
    params = _scheduler(load_run_config(path))
    assert params["warmup_num_steps"] == 1 and params["total_num_steps"] == 3
    changes = ["train.steps=50", "deepspeed.scheduler.params.warmup_num_steps=40"]
    params = _scheduler(load_run_config(path, changes))
    assert params["warmup_num_steps"] == 40
    refused(command("train", path, "--set", changes[1]), "warmup_num_steps is 40, but the run has 2 steps")


def test_bad_models(shards, tmp_path):
    path, out = _model(tmp_path), tmp_path / "s.parquet"
    water = write_extxyz(tmp_path / "w.xyz", [Atoms("OH2", positions=[[0, 0, 0], [0, 0, 1], [0, 1, 0]])])
    refused(command("screen", path, water, "--out", out, "--tasks", "taks0"), "taks0", "did you mean 'task0'")
    refused(command("screen", path, water, "--out", out, "--tasks", " , "), "--tasks", "names no task")
    refused(command("evaluate", path, shards), "holds the task 'emt'")
    refused(command("evaluate", path), "name the shard folders")
    refused(command("evaluate", tmp_path, shards), "run.json")
    refused(command("export", tmp_path, "--out", tmp_path / "x.safetensors"), "model.json")
    refused(command("export", tmp_path, "--out", tmp_path / "x.pt"), "x.safetensors")
    whole = path.read_bytes()
    for cut in (4, 100, len(whole) - 10):
        path.write_bytes(whole[:cut])
        refused(command("screen", path, water, "--out", out), "m.safetensors", "truncated")
    ours = f'"format_version":"{FORMAT_VERSION}"'.encode()
    path.write_bytes(whole.replace(ours, ours.replace(str(FORMAT_VERSION).encode(), b"7")))
    refused(command("screen", path, water, "--out", out), "version 7")
    import safetensors.numpy

    safetensors.numpy.save_file({"a": np.zeros(2)}, str(path))
    refused(command("screen", path, water, "--out", out), "not a model exported by hydrazero")
    refused(command("screen", tmp_path / "no.safetensors", water, "--out", out), "does not exist")
    refused(command("evaluate", tmp_path / "no"), "no does not exist; name a run folder or an exported model.")
    refused(command("inspect", water), "is not a readable model file", "data files are converted first")
    assert not out.exists() and not list(tmp_path.glob(".s.parquet*"))


def test_report_of_a_folder_that_is_no_run(tmp_path):
    refused(command("report", tmp_path), "run.json", "is")
