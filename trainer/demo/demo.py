"""The demo: label, convert, train, evaluate, export, relax, screen and report, with the same steps as a user's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from hydrazero.models.inference.potential import Potential, load_model, structure_from_atoms
from hydrazero.shards.convert.convert import convert
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.shards.errors import ConfigError
from hydrazero.shards.structure import Structure
from hydrazero.shards.text.terminal import PlainConsole
from hydrazero.trainer.config.run_file import load_run_config
from hydrazero.trainer.demo.labels import DEMO_TASKS, make_demo_sources
from hydrazero.trainer.demo.structures import parent_molecule, screening_structures
from hydrazero.trainer.evaluation.tables import print_evaluation
from hydrazero.trainer.records.run_log import progress_bar
from hydrazero.trainer.records.task_errors import Evaluation

SEED = 0
"""Seed of the structures."""
RANKS = 2
"""Number of ranks that train, and of processes that label."""
SCREENED = 20_000
"""Number of structures that are screened."""
RELAXED_MOLECULE, RELAXED_TASK = "CH3CH2OH", "gfn2"
"""Molecule that is relaxed, and the task whose head is used."""


def run_demo(out: Path) -> None:
    """Run the demo in the new folder `out`; raise ConfigError if it exists, DemoError if a method fails."""
    try:
        out.mkdir(parents=True)  # fails where another demo has made it a moment ago
    except FileExistsError as error:
        raise ConfigError(f"{out} exists; remove it or choose another --out.") from error
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}); choose another --out.") from error
    started, console = time.monotonic(), PlainConsole(stderr=True)
    console.rule("1/6 label structures with five methods")
    shards = _make_shards(out)
    console.rule(f"2/6 train five heads with {RANKS} ranks (PaiNN, ZeRO-1)")
    _train(out, shards)
    console.rule("3/6 evaluate on the test split")
    evaluation = _evaluate(out)
    console.rule("4/6 export, and relax a molecule with the exported model")
    potential = _export(out)
    relaxation = _relax(potential, out)
    console.rule(f"5/6 screen {SCREENED:,} structures with all heads")
    screened = _screen(potential, out)
    console.rule("6/6 report")
    from hydrazero.trainer.report import write_report

    report = write_report([out])
    print_evaluation(evaluation)
    output = PlainConsole(soft_wrap=True)
    output.print(relaxation)
    output.print(screened)
    for path in (out / "model.safetensors", report, out / "evaluation.json", out / "screen.parquet"):
        output.print(str(path))
    output.print(f"done in {time.monotonic() - started:.0f} s")


def _make_shards(out: Path) -> dict[str, Path]:
    """Label and convert the structures of every task; return the shard folders by task."""
    total = sum(task.structures for task in DEMO_TASKS)
    bar, advance = progress_bar("labelling ", total)
    with bar:
        sources = make_demo_sources(out / "sources", seed=SEED, workers=RANKS, progress=lambda _, n: advance(n))
    bar, advance = progress_bar("converting", total)
    shards = {}
    with bar:
        for task in DEMO_TASKS:
            settings = ConvertSettings(source={"method": task.fidelity, "code": "labelled by 'hydrazero demo'"})
            shards[task.name] = out / "shards" / task.name
            convert([sources[task.name]], task.name, shards[task.name], settings)
            advance(task.structures)
    return shards


def _train(out: Path, shards: dict[str, Path]) -> None:
    from hydrazero.trainer.ranks.launcher import train_ranks
    from hydrazero.trainer.records.run_files import RUN_NAME

    template = (resources.files("hydrazero.launch") / "runs" / "demo.toml").read_text(encoding="utf-8")
    tasks = "".join(f'\n[[tasks]]\nname = "{name}"\nshards = "{folder}"\n' for name, folder in shards.items())
    run_file = out / "run.toml"
    run_file.write_text(template.replace('out = "runs/demo"', f'out = "{out}"') + tasks, encoding="utf-8")
    load_run_config(run_file)
    train_ranks(run_file, RANKS, options=(), record=out / RUN_NAME)


def _evaluate(out: Path) -> Evaluation:
    from hydrazero.trainer.evaluation.evaluate import evaluate, open_run_or_model

    potential, folders, files = open_run_or_model(out)
    bar, advance = progress_bar("evaluating", None)
    with bar:
        return evaluate(potential, folders, "test", files, advance)


def _export(out: Path) -> Potential:
    from hydrazero.trainer.evaluation.export import export_run

    export_run(out, out / "model.safetensors")
    return load_model(out / "model.safetensors")


def _relax(potential: Potential, out: Path) -> str:
    """Relax a distorted molecule with the exported model's ASE calculator; return a sentence about it."""
    import ase.io
    from ase.optimize import BFGS

    atoms = parent_molecule(RELAXED_MOLECULE)
    atoms.rattle(0.1, seed=SEED)
    atoms.calc = potential.calculator(task=RELAXED_TASK)
    before = atoms.get_potential_energy()
    optimizer = BFGS(atoms, logfile=None)
    converged = optimizer.run(fmax=0.05, steps=200)
    after = atoms.get_potential_energy()
    ase.io.write(out / "relaxed.extxyz", atoms, format="extxyz")
    how = "relaxed" if converged else "did not converge"
    return f"{RELAXED_MOLECULE} {how} in {optimizer.nsteps} steps with {RELAXED_TASK}: {before:.3f} -> {after:.3f} eV"


def _screen(potential: Potential, out: Path) -> str:
    """Screen generated structures with every head; return a sentence about it."""
    from hydrazero.models.screening import FunctionSource, ScreenSettings, screen

    def structures() -> Iterator[Structure]:
        for number, atoms in enumerate(screening_structures(SCREENED, SEED)):
            yield structure_from_atoms(atoms, f"generated#{number}")

    bar, advance = progress_bar("screening ", SCREENED)
    with bar:
        settings = ScreenSettings(tasks=tuple(potential.tasks))
        made = FunctionSource("generated", structures, SCREENED)
        summary = screen(potential, [made], out / "screen.parquet", settings, progress=advance)
    rate = summary.structures / summary.seconds
    return f"screened {summary.structures:,} structures with {len(potential.tasks)} heads at {rate:,.0f} structures/s"
