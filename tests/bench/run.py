"""Run all benchmarks, print a table and write a list of rows {name, value, unit, peer, peer_value, ratio}.

Both sides run alternately in separate processes, several times; values are medians over all steps of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from head_groups import CASES, EVERYWHERE, GROUPS, RANKS
from systems import SCREENED, SYSTEMS, THREADS

HERE = Path(__file__).parent
PEER = "SchNetPack 2.1.1 PaiNN"
MACE = "mace-torch 0.3.16"
PARTS = ["data", "sums", "encoders", "small", "steps", "screen", "scaling", "groups"]
ALONE = "sixteen models of one head in turn"
STACKED = "heads of all tasks on every rank"
FIRST_STEPS = 3
"""Number of first steps with each placement of heads that warm up and are not counted."""
REFERENCE_STRUCTURES, REFERENCE_SECONDS = 1.1e9, 50.0
"""Number of structures that HydraGNN screened, and the seconds it took (arXiv 2604.15380)."""


def run_worker(python: str, script: str, *arguments: str, threads: int = THREADS) -> dict[str, list[float]]:
    """Run a benchmark script and return its measurements."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if "mace" in script:
        environment["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4 stores its constants in a pickle file
    command = [python, str(HERE / script), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("SECONDS ")]
    if result.returncode != 0 or not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    handed: dict[str, list[float]] = json.loads(lines[0].removeprefix("SECONDS "))
    return handed


def row(name: str, value: float, unit: str, peer: str | None = None, peer_value: float | None = None) -> dict[str, Any]:
    """Return one row of the result."""
    ratio = None if peer_value is None else value / peer_value
    return {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio}


def step_rows(peer_python: str, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Return rows that compare steps with the peer's, measured alternately."""
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for _ in range(rounds):
        for seconds, python, script in ((ours, sys.executable, "ours.py"), (theirs, peer_python, "peer_schnetpack.py")):
            for name, values in run_worker(python, script, str(repeats)).items():
                seconds.setdefault(name, []).extend(values)
    middle = {name: statistics.median(values) for name, values in ours.items()}
    peer = {name: statistics.median(values) for name, values in theirs.items()}
    rows = []
    for system, make in SYSTEMS.items():
        structures = make()
        count, atoms = len(structures), sum(len(s) for s in structures)
        for kind in ("train", "infer"):
            against = peer[f"{kind}_{system}"]
            for mode, suffix in (("eager", ""), ("compiled", ""), ("compiled", "_bf16")):
                mine = middle[f"{mode}_{kind}_{system}{suffix}"]
                name = f"{mode}_{kind}_{system}{suffix}"
                rows.append(row(name, count / mine, "structures/s", PEER, count / against))
                rows.append(row(f"{name}_atoms", atoms / mine, "atoms/s", PEER, atoms / against))
        for suffix in ("", "_bf16"):
            memory, most = middle[f"memory_{system}{suffix}"], peer[f"memory_{system}"]
            rows.append(row(f"step_peak_memory_{system}{suffix}", memory, "MB", PEER, most))
    for name, kind in (("heads16_train_cost", "train"), ("heads16_infer_cost", "energies")):
        rows.append(row(name, middle[f"heads_{kind}_many"] / middle[f"heads_{kind}_one"], "times one head"))
    rows.append(row("gradnorm_overhead", middle["balance_with"] / middle["balance_without"], "times a step without"))
    return rows


def sum_rows(rounds: int) -> list[dict[str, Any]]:
    """Return rows on the sums over neighbours: the speed of each operator beside the peak, and time over degree 1."""
    found = run_worker(sys.executable, "pair_sums.py", str(rounds))
    middle = {name: statistics.median(values) for name, values in found.items()}
    rows = []
    seconds_by_degree = dict.fromkeys((1, 2, 3), 0.0)
    for degree in seconds_by_degree:
        for operator in ("pair_sum", "pair_sum_transposed", "pair_gradient", "pair_weight_gradient"):
            name = f"{operator}_L{degree}"
            seconds_by_degree[degree] += middle[name]
            speed = middle[f"{name}_work"] / middle[name]
            rows.append(row(f"{name}_gflops", speed, "GFLOP/s", "product of two matrices", middle["peak"]))
    for degree, seconds in seconds_by_degree.items():
        rows.append(row(f"pair_sums_L{degree}", seconds / seconds_by_degree[1], "times degree 1, all operators"))
    return rows


def encoder_rows(rounds: int) -> list[dict[str, Any]]:
    """Return rows that compare training steps of TensorNet and LACE with PaiNN's."""
    found = run_worker(sys.executable, "encoder_steps.py", str(rounds))
    middle = {name: statistics.median(values) for name, values in found.items()}
    rows = []
    for system, make in SYSTEMS.items():
        count, peer = len(make()), len(make()) / middle[f"painn_{system}"]
        for name in ("tensornet", "lace_small"):
            rows.append(
                row(f"train_{name}_{system}", count / middle[f"{name}_{system}"], "structures/s", "painn", peer)
            )
    return rows


def small_rows(steps: int) -> list[dict[str, Any]]:
    """Return rows on whole steps on few structures, over the time in their compiled graphs, on one and two threads."""
    rows = []
    for threads, suffix in ((1, ""), (2, "_2_threads")):
        found = run_worker(sys.executable, "small_steps.py", str(steps), str(threads), threads=threads)
        middle = {name: statistics.median(values) for name, values in found.items()}
        rows.append(row(f"small_step_overhead{suffix}", middle["whole"] / middle["graph"], "times its compiled graph"))
        rows.append(row(f"small_step_graph{suffix}", 1e3 * middle["graph"], "ms a step"))
        rows.append(row(f"small_step_wait{suffix}", 1e3 * middle["wait"], "ms a step"))
    return rows


def run_ranks(script: str, ranks: int, *arguments: str) -> dict[str, list[float]]:
    """Run a benchmark script on several ranks of one thread each; return the measurements of the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    lines = [line for line in outputs[0].splitlines() if line.startswith("SECONDS ")]
    if any(process.returncode for process in processes) or not lines:
        raise SystemExit(f"{script} failed on {ranks} ranks:\n" + "\n".join(outputs))
    handed: dict[str, list[float]] = json.loads(lines[0].removeprefix("SECONDS "))
    return handed


def scaling_rows(rounds: int) -> list[dict[str, Any]]:
    """Return rows that compare ZeRO stages with PyTorch DDP on the same work, on 1, 2 and 4 ranks of one thread."""
    rows = []
    for ranks in (2, 1, 4):
        found = run_ranks("scaling_ranks.py", ranks, str(rounds))
        middle = {name: statistics.median(values) for name, values in found.items()}
        suffix = "" if ranks == 2 else f"_on_{ranks}"
        for side in (name for name in found if not name.endswith("_bytes")):
            if side != "ddp":
                ratio = middle[side] / middle["ddp"]
                rows.append(row(f"{side}_over_ddp{suffix}", ratio, "times a step of DDP, same work"))
            if ranks > 1:
                rows.append(row(f"{side}_sent{suffix}", middle[f"{side}_bytes"] / 1e6, "MB of messages a step"))
    return rows


def group_rows(steps: int) -> list[dict[str, Any]]:
    """Return rows that compare heads in groups of ranks by task with stacked heads on every rank.

    Both train in the same way on four ranks. With fewer cores than ranks, a rank that waits leaves its core to others,
    so that the wall-clock time of a step hides an imbalance. The processor time of the busiest rank is what the step
    would take with a core per rank.
    """
    found = run_ranks("head_groups_rank.py", RANKS, str(steps))
    units = {
        "step": ("ms a step, wall clock", 1e3),
        "step_processor": ("ms a step, processor time of the busiest rank", 1e3),
        "imbalance": ("processor time of the busiest rank over the mean", 1.0),
        "sums": ("ms a step, sums of gradients, wall clock", 1e3),
        "sums_processor": ("ms a step, sums of gradients, processor time", 1e3),
        "sent": ("kB to all-reduces, of a rank a step", 1e-3),
        "states": ("kB of weights, gradients, moments", 1e-3),
    }
    rows = []
    for case in CASES:
        for quantity, (unit, factor) in units.items():
            of_sides = (found[f"{case}_{side}_{quantity}"][FIRST_STEPS:] for side in (GROUPS, EVERYWHERE))
            groups, everywhere = (factor * statistics.median(of_side) for of_side in of_sides)
            rows.append(row(f"groups_{case}_{quantity}", groups, unit, STACKED, everywhere))
    pairs = [(found[f"{case}_{EVERYWHERE}_loss"], found[f"{case}_{GROUPS}_loss"]) for case in CASES]
    losses = [abs(other / one - 1.0) for both in pairs for one, other in zip(*both, strict=True)]
    rows.append(row("groups_loss_difference", 1e6 * max(losses), f"millionths, largest of {steps} steps' losses"))
    for kind in ("shared", "heads"):
        most = max(found[f"{case}_{kind}_difference"][0] for case in CASES)
        rows.append(row(f"groups_{kind}_difference", 1e6 * most, "millionths, largest of the weights at the end"))
    return rows


def screen_rows(peer_python: str, mace_python: str | None, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Return rows on screening from shards to Parquet by sixteen heads.

    It is compared with one head at a time, and with the peers' models alone.
    """
    sides = [(sys.executable, "screening.py", ()), (peer_python, "peer_schnetpack.py", (str(repeats), "screen"))]
    sides += [] if mace_python is None else [(mace_python, "peer_mace.py", (str(repeats),))]
    seconds: list[dict[str, list[float]]] = [{} for _ in sides]
    for _ in range(rounds):
        for found, (python, script, arguments) in zip(seconds, sides, strict=True):
            for name, values in run_worker(python, script, *arguments).items():
                found.setdefault(name, []).extend(values)
    ours, *peers = ({name: statistics.median(values) for name, values in found.items()} for found in seconds)
    rows = []
    for system, make in SCREENED.items():
        count = len(make())
        for kind in ("energy", "forces"):
            name = f"screen_{kind}_{system}"
            rate = 1.0 / ours[f"{name}_all"]
            for suffix, peer, label in zip(("", "_over_mace"), peers, (PEER, MACE), strict=False):
                rows.append(row(f"{name}{suffix}", rate, "structures/s, 16 heads", label, count / peer[name]))
        alone = 1.0 / ours[f"screen_energy_{system}_one"] / 16
        rows.append(row(f"screen_energy_{system}_over_single", rate_of(ours, system), "structures/s", ALONE, alone))
    shares = [value for name, value in ours.items() if name.endswith("_all_model")]
    rows.append(row("screen_efficiency", min(shares), "of the time in the model, the least of the four"))
    dies = REFERENCE_STRUCTURES / REFERENCE_SECONDS * ours["screen_energy_molecules_all"]
    rows.append(row("screen_billion_processors", dies, "of these for 1.1 billion in 50 s, by arithmetic"))
    return rows


def rate_of(seconds: dict[str, float], system: str) -> float:
    """Return structures/s of a screen of energies by all heads."""
    return 1.0 / seconds[f"screen_energy_{system}_all"]


def gpu_rows(repeats: int) -> list[dict[str, Any]]:
    """Return rows on steps on a GPU, with the fraction of its peak arithmetic that matrix products reach."""
    near = run_worker(sys.executable, "gpu_neighbours.py", str(repeats))
    rows = [
        row("gpu_neighbour_lists", 1.0 / statistics.median(near["lists"]), "atoms/s, 64-atom cells"),
        row("gpu_neighbour_slots", 1.0 / statistics.median(near["slots"]), "atoms/s, laid out in slots"),
    ]
    handed = run_worker(sys.executable, "gpu_steps.py", str(repeats))
    for system, make in SYSTEMS.items():
        atoms = sum(len(s) for s in make())
        for kind in ("train", "infer"):
            for precision in ("float32", "tf32", "bf16"):
                done = handed[f"flops_{kind}_{system}_{precision}"][0]
                most = handed[f"peak_{precision}"][0]
                for mode in ("eager", "compiled"):
                    seconds = statistics.median(handed[f"{mode}_{kind}_{system}_{precision}"])
                    name = f"gpu_{mode}_{kind}_{system}_{precision}"
                    rows.append(row(f"{name}_atoms", atoms / seconds, "atoms/s"))
                    rows.append(row(f"{name}_peak", done / seconds / most, "of the peak of matrix products"))
    return rows


def data_rows(sixteen: Path | None) -> list[dict[str, Any]]:
    """Return rows on data loading, on one core."""
    handed = run_worker(sys.executable, "data_rates.py", threads=1)
    value = {name: statistics.median(values) for name, values in handed.items()}
    per_s = "structures/s/core"
    rows = [
        row("decode_columns_per_s", value["decode_columns"], per_s),
        row("edges_over_vesin_molecules", value["edges_molecules"], "times bare vesin"),
        row("edges_over_vesin_metals", value["edges_metals"], "times bare vesin"),
        row("edges_over_vesin", max(value["edges_molecules"], value["edges_metals"]), "times bare vesin"),
        row("pipeline_molecules_per_s", value["pipeline_molecules"], per_s),
        row("pipeline_metals_per_s", value["pipeline_metals"], per_s),
        row("over_webdataset_npz", value["structures"], per_s, "webdataset, npz samples", value["npz"]),
        row("over_aselmdb", value["structures"], per_s, "ase-db-backends, aselmdb", value["aselmdb"]),
        row("worker_memory", value["worker_memory"], "MB"),
    ]
    if sixteen is None or not sixteen.is_dir():
        sys.stderr.write("packing is skipped: the sixteen real tasks are missing (run make sixteen)\n")
        return rows
    mixed = {name: values[0] for name, values in run_worker(sys.executable, "mixed_batches.py", str(sixteen)).items()}
    rows.append(row("mixed_batch_efficiency", mixed["alone"] / mixed["mixed"], "atoms/s over those of the tasks alone"))
    packed = {name: values[0] for name, values in run_worker(sys.executable, "packing_fill.py", str(sixteen)).items()}
    units = {
        "packing_fill": f"of the atoms, {packed.pop('tasks'):.0f} real tasks",
        "slot_fill": "of the slots",
        "edges_spread": "fullest batch over mean, edges",
        "simulated_imbalance": "fullest of 16,384 ranks over mean, edges",
    }
    return rows + [row(name, packed[name], unit) for name, unit in units.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peer-python", help="Python of an environment with SchNetPack; without it, steps and screening are skipped"
    )
    parser.add_argument(
        "--mace-python",
        help="Python of an environment with mace-torch; without it, screening is not compared with MACE",
    )
    parser.add_argument("--only", choices=PARTS, help="run this part only; other rows of --out are kept")
    parser.add_argument("--sixteen", type=Path, help="folder of the sixteen real tasks, for the fill of batches")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    parts = [options.only] if options.only else PARTS
    rows = data_rows(options.sixteen) if "data" in parts else []
    if "sums" in parts:
        rows += sum_rows(3 * options.rounds)
    if "encoders" in parts:
        rows += encoder_rows(options.rounds)
    if "small" in parts:
        rows += small_rows(100 * options.rounds)
    if options.peer_python and "steps" in parts:
        rows += step_rows(options.peer_python, options.rounds, options.repeats)
    if options.peer_python and "screen" in parts:
        rows += screen_rows(options.peer_python, options.mace_python, options.rounds, options.repeats)
    if "scaling" in parts:
        rows += scaling_rows(10 * options.rounds)
    if "groups" in parts:
        rows += group_rows(10 * options.rounds)
    if torch.cuda.is_available() and "steps" in parts:
        rows += gpu_rows(options.repeats)
    if options.only and options.out.is_file():
        new = {each["name"] for each in rows}
        rows = [each for each in json.loads(options.out.read_text()) if each["name"] not in new] + rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("name", "value", "unit", "peer", "ratio"):
        table.add_column(heading, justify="left" if heading in ("name", "unit") else "right", no_wrap=True)
    for r in rows:
        peer = "" if r["peer_value"] is None else f"{r['peer_value']:,.1f}"
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        value = f"{r['value']:,.1f}" if r["value"] >= 20 else f"{r['value']:.3f}"
        table.add_row(r["name"], value, r["unit"], peer, ratio)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
