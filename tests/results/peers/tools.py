"""How each peer is trained for a given time: its command line, its limit of time or epochs, and what it has done."""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import ase.io
from ase.data import atomic_numbers
from results.peers.split_files import energies_by_element

PEERS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a peer is trained on, and with what."""

    folder: Path
    """Absolute path of a folder with train.xyz, val.xyz and test.xyz."""
    environment: Path
    """Absolute path of the peer's Python environment."""
    settings: str
    """Name of the file of settings in this folder."""
    changes: dict[str, Any]
    """Options of the tool's command line that differ from the file."""
    variables: dict[str, str]
    """Environment variables, which hold the number of threads."""
    seed: int
    isolated: dict[str, float]
    """Energies of isolated atoms by element, eV; empty if the dataset has none."""

    def script(self, name: str) -> str:
        """Return the path of a program of the environment."""
        return str(self.environment / "bin" / name)

    def run(self, line: list[str], folder: Path) -> str:
        """Run a command in a folder and return its output; end with it if the command fails."""
        done = subprocess.run(line, cwd=folder, env=self.variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(line)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training run has done."""

    start: float
    """Seconds from the start of the process to the first step."""
    seconds: float
    """Seconds from the start of the process to the end of the training."""
    epochs: float
    """Number of passes over the training structures."""
    model: Path
    """Model file or checkpoint, from which predictions are made."""

    @property
    def per_epoch(self) -> float:
        """Return the seconds of an epoch, with its validation."""
        return (self.seconds - self.start) / self.epochs


class Tool(Protocol):
    """A peer's way of training."""

    package: str
    """Name of its package, of the folder of its environment, and of its program for predictions."""
    probe: float
    """Limit of the short run that measures times: epochs or seconds."""

    def prepare(self, job: Job) -> None:
        """Write the structures in the tool's own format; this time is not counted, as hydrazero's conversion is not."""

    def limit(self, seconds: float, probe: Training) -> float:
        """Return the limit with which a run takes the given seconds, from what a short run took."""

    def line(self, job: Job, out: Path, limit: float) -> list[str]:
        """Return the command that trains in the folder `out`."""

    def training(self, job: Job, out: Path, limit: float, started: float, ended: float) -> Training:
        """Return what the process did between two times of the clock."""


class Mace:
    """mace-torch: whole epochs, of which the last fifth is its second stage."""

    package = "mace"
    probe = 2.0

    def prepare(self, job: Job) -> None:
        """Do nothing: MACE reads extended XYZ."""

    def limit(self, seconds: float, probe: Training) -> float:
        """Return the number of epochs that comes closest to the time, at least two for its two stages."""
        return float(max(round((seconds - probe.start) / probe.per_epoch), 2))

    def line(self, job: Job, out: Path, limit: float) -> list[str]:
        """Return the command; the second stage begins after four fifths of the epochs, as in the README's example."""
        numbers = {number: job.isolated[symbol] for symbol, number in elements_of(job).items() if job.isolated}
        options = {
            "config": PEERS / job.settings,
            "name": "run",
            "seed": job.seed,
            "train_file": job.folder / "train.xyz",
            "valid_file": job.folder / "val.xyz",
            "E0s": numbers or "average",
            "max_num_epochs": int(limit),
            "start_stage_two": max(int(0.8 * limit), 1),
            **job.changes,
        }
        return [job.script("mace_run_train"), *(f"--{name}={value}" for name, value in options.items())]

    def training(self, job: Job, out: Path, limit: float, started: float, ended: float) -> Training:
        """Return the times of the log; the evaluation of the training set at the end is not counted."""
        log = next((out / "logs").glob("*[0-9].log")).read_text(encoding="utf-8")
        return Training(
            start=time_of("Started training", log) - started,
            seconds=time_of("Training complete", log) - started,
            epochs=limit,
            model=out / "run_stagetwo.model",
        )


class SchNetPack:
    """SchNetPack: Lightning's limit of time."""

    package = "schnetpack"
    probe = 10.0

    def prepare(self, job: Job) -> None:
        """Write its database with the energies of the elements, which are a fit to those of the structures."""
        energies = energies_by_element(ase.io.read(job.folder / "train.xyz", ":"))
        line = [job.script("python"), str(PEERS / "make_schnetpack_db.py"), str(job.folder), json.dumps(energies)]
        job.run(line, job.folder)

    def limit(self, seconds: float, probe: Training) -> float:
        """Return the time that is left after the start."""
        return seconds - probe.start

    def line(self, job: Job, out: Path, limit: float) -> list[str]:
        """Return the command."""
        splits = {split: len(ase.io.read(job.folder / f"{split}.xyz", ":")) for split in ("train", "val")}
        return [
            job.script("spktrain"),
            f"--config-dir={PEERS / 'schnetpack'}",
            f"experiment={job.settings}",
            f"run.work_dir={out}",
            f"run.data_dir={job.folder}",
            f"run.path={out}",
            "run.id=run",
            f"data.datapath={job.folder / 'structures.db'}",
            f"+data.split_file={job.folder / 'split.npz'}",
            f"data.num_train={splits['train']}",
            f"data.num_val={splits['val']}",
            "data.num_test=1",
            f"+seed={job.seed}",
            f"+trainer.max_time={clock(limit)}",
            *(f"{name}={value}" for name, value in job.changes.items()),
        ]

    def training(self, job: Job, out: Path, limit: float, started: float, ended: float) -> Training:
        """Return the times, of which what is not within the limit belongs to the start, and the epochs."""
        folder, settings = out / "run", PEERS / "schnetpack" / "experiment" / f"{job.settings}.yaml"
        epochs = epochs_of(job, settings, folder / "checkpoints" / "last.ckpt")
        seconds = ended - started
        return Training(start=seconds - round(limit), seconds=seconds, epochs=epochs, model=folder / "best_model")


class NequIP:
    """NequIP: Lightning's limit of time."""

    package = "nequip"
    probe = 10.0

    def prepare(self, job: Job) -> None:
        """Do nothing: NequIP reads extended XYZ."""

    def limit(self, seconds: float, probe: Training) -> float:
        """Return the time that is left after the start."""
        return seconds - probe.start

    def line(self, job: Job, out: Path, limit: float) -> list[str]:
        """Return the command; energies of isolated atoms are the shifts, or else a fit to those of the structures."""
        shifts = job.isolated or energies_by_element(ase.io.read(job.folder / "train.xyz", ":"))
        elements = list(elements_of(job))
        pairs = ",".join(f"{symbol}:{shifts[symbol]!r}" for symbol in elements)
        return [
            job.script("nequip-train"),
            f"--config-path={PEERS}",
            f"--config-name={job.settings}",
            f"hydra.run.dir={out}",
            f"model_type_names=[{','.join(elements)}]",
            f"data.seed={job.seed}",
            f"data.train_file_path={job.folder / 'train.xyz'}",
            f"data.val_file_path={job.folder / 'val.xyz'}",
            f"trainer.max_time={clock(limit)}",
            f"training_module.model.per_type_energy_shifts={{{pairs}}}",
            *(f"{name}={value}" for name, value in job.changes.items()),
        ]

    def training(self, job: Job, out: Path, limit: float, started: float, ended: float) -> Training:
        """Return the times, of which what is not within the limit belongs to the start, and the epochs."""
        epochs = epochs_of(job, PEERS / job.settings, out / "last.ckpt")
        seconds = ended - started
        return Training(start=seconds - round(limit), seconds=seconds, epochs=epochs, model=out / "best.ckpt")


TOOLS: dict[str, Tool] = {tool.package: tool for tool in (Mace(), SchNetPack(), NequIP())}


def epochs_of(job: Job, settings: Path, checkpoint: Path) -> float:
    """Return the number of epochs at the last checkpoint of a Lightning run, which is written when its time is over."""
    batch = re.search(r"batch_size: (\d+)", settings.read_text(encoding="utf-8"))
    if batch is None:
        raise SystemExit(f"{settings} names no batch_size; add the one that is used for training.")
    steps = job.run([job.script("python"), str(PEERS / "checkpoint_steps.py"), str(checkpoint)], checkpoint.parent)
    return int(steps) / math.ceil(len(ase.io.read(job.folder / "train.xyz", ":")) / int(batch[1]))


def elements_of(job: Job) -> dict[str, int]:
    """Return symbols and atomic numbers of the training structures' elements, by atomic number."""
    symbols = {symbol for atoms in ase.io.read(job.folder / "train.xyz", ":") for symbol in atoms.symbols}
    return {symbol: atomic_numbers[symbol] for symbol in sorted(symbols, key=atomic_numbers.__getitem__)}


def clock(seconds: float) -> str:
    """Return a time as Lightning reads it, DD:HH:MM:SS."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 1440:02d}:{minutes // 60 % 24:02d}:{minutes % 60:02d}:{left:02d}"


def time_of(message: str, log: str) -> float:
    """Return the time of the clock at which a message was logged, such as 2026-01-31 23:59:59.123."""
    found = re.search(rf"^(\S+ \S+)\.(\d{{3}}) \w+: {message}", log, re.MULTILINE)
    if found is None:
        raise SystemExit(f"the log of MACE has no line '{message}'; its version writes other lines.")
    return (datetime.fromisoformat(found[1]) + timedelta(milliseconds=int(found[2]))).timestamp()
