"""Train a peer on a dataset of encoders.toml for a given time, and write its errors and costs.

    python -m results.peers.run PEER DATASET --seconds 600 --threads 2 --seed 1 --out RESULT.json

PEER and DATASET are names in encoders.toml. A short run with the same settings comes first and measures how long the
start and an epoch take; the machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from results.jobs import HERE, ROOT
from results.label_errors import LabelErrors
from results.peers.split_files import write_split_files
from results.peers.tools import PEERS, TOOLS, Job, Tool, Training

from hydrazero.shards.files import write_json


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    """A peer trained on a dataset."""

    peer: dict[str, Any]
    """Entry of the peer in the TOML file."""
    dataset: dict[str, Any]
    """Entry of the dataset in the TOML file."""
    seconds: float
    """Time of training, with the start of the process."""
    threads: int
    seed: int
    environments: Path
    """Folder of the peers' environments."""
    work: Path
    """Folder of its files."""

    def result(self, shards: Path) -> dict[str, Any]:
        """Train on a folder of shards, evaluate, and return errors and costs."""
        tool, job = TOOLS[self.peer["tool"]], self._job()
        shutil.rmtree(self.work, ignore_errors=True)
        write_split_files(shards, job.folder)
        tool.prepare(job)
        probe = trained(tool, job, self.work / "probe", tool.probe)
        limit = tool.limit(self.seconds, probe)
        if limit <= 0:
            raise SystemExit(
                f"{tool.package} takes {probe.start:.0f} s to start; give it more than {self.seconds:.0f}."
            )
        found = trained(tool, job, self.work / "run", limit)
        structures = len(ase.io.read(job.folder / "train.xyz", ":"))
        costs = {
            "seconds": found.seconds,
            "start_seconds": found.start,
            "epochs": found.epochs,
            "structures_per_s": structures / found.per_epoch,
            "threads": self.threads,
            "seed": self.seed,
            "settings": {"file": self.peer["settings"], **self.peer.get("changes", {})},
        }
        return costs | self._errors(tool, job, found.model)

    def _job(self) -> Job:
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = self.environments.absolute() / TOOLS[self.peer["tool"]].package
        if not (environment / ".installed").exists():
            raise SystemExit(f"{environment} does not exist; make .bench/{environment.name}/.installed sets it up.")
        return Job(
            folder=self.work.absolute() / "data",
            environment=environment,
            settings=self.peer["settings"],
            changes=self.peer.get("changes", {}),
            variables={**os.environ, **threads, "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"},
            seed=self.seed,
            isolated=self.dataset.get("isolated", {}),
        )

    def _errors(self, tool: Tool, job: Job, model: Path) -> dict[str, Any]:
        """Predict both splits in the peer's environment and return the errors, parameters, rate and version."""
        script, found = str(PEERS / f"predict_{tool.package}.py"), {}
        for split in ("val", "test"):
            source, out = job.folder / f"{split}.xyz", self.work.absolute() / f"{split}.npz"
            job.run([job.script("python"), script, str(model), str(source), str(out)], job.folder)
            with np.load(out) as predicted:
                errors = errors_of(source, predicted["energy"], predicted["forces"])
                found |= {
                    "parameters": int(predicted["parameters"]),
                    "version": str(predicted["version"]),
                    "predicted_per_s": float(predicted["structures_per_s"]),
                    split: errors.summary(),
                }
        return found | {"groups": errors.of_groups(self.dataset.get("groups", []))}


def trained(tool: Tool, job: Job, out: Path, limit: float) -> Training:
    """Train with a limit in the folder `out` and return what was done."""
    out = out.absolute()
    out.mkdir(parents=True)
    line = tool.line(job, out, limit)
    (out / "command.txt").write_text(" ".join(line) + "\n", encoding="utf-8")
    started = time.time()
    job.run(line, out)
    return tool.training(job, out, limit, started, time.time())


def errors_of(source: Path, energies: np.ndarray, forces: np.ndarray) -> LabelErrors:
    """Return the errors of energies in eV, [S], and forces in eV/Å, [A, 3], predicted for a file of structures."""
    structures = ase.io.read(source, ":")
    sizes = np.array([len(atoms) for atoms in structures])
    true = np.array([atoms.get_potential_energy() for atoms in structures])
    wrong = forces - np.concatenate([atoms.get_forces() for atoms in structures])
    return LabelErrors(
        names=[atoms.info["source_id"] for atoms in structures],
        energies=(energies - true) / sizes,
        forces=np.split(wrong, np.cumsum(sizes)[:-1]),
    )


def named(entries: list[dict[str, Any]], name: str, what: str) -> dict[str, Any]:
    """Return the entry of a name; end with the known names if there is none."""
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise SystemExit(f"{what} {name} is none of {', '.join(entry['name'] for entry in entries)} in encoders.toml.")


def main() -> None:
    """Run one peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer")
    parser.add_argument("dataset")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=Path, help="default: those that `make results NAME=encoders` has converted")
    parser.add_argument("--environments", type=Path, default=Path(".bench"))
    parser.add_argument("--change", nargs="*", default=[], metavar="OPTION=VALUE", help="of the tool's command line")
    options = parser.parse_args()
    spec = tomllib.loads((HERE / "encoders.toml").read_text(encoding="utf-8"))
    peer, dataset = named(spec["peers"], options.peer, "peer"), named(spec["data"], options.dataset, "dataset")
    shards = options.shards or ROOT / "encoders" / "data" / options.dataset
    if not (shards / "manifest.json").exists():
        raise SystemExit(f"{shards} holds no shards; name a folder of them with --shards.")
    changes = {**peer.get("changes", {}), **dict(change.split("=", 1) for change in options.change)}
    run = PeerRun(
        peer={**peer, "changes": changes},
        dataset=dataset,
        seconds=options.seconds,
        threads=options.threads,
        seed=options.seed,
        environments=options.environments,
        work=options.out.with_suffix(""),
    )
    write_json(options.out, run.result(shards))


if __name__ == "__main__":
    main()
