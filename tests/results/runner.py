"""Make the runs of a table of results one after the other, skip those with a result, and write the table.

    python -m results.runner NAME DATA [--only RUN]

NAME.toml in this folder lists datasets and runs, and NAME.run.toml is the template of their run files.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

from results.equal_time import make_peer, peer_runs, write_equal_time
from results.finetuning import run_finetunings
from results.jobs import HERE, all_jobs, make
from results.tables import write_table


def main() -> None:
    """Make missing plans, then missing runs, whose number of steps does not depend on the load of the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="one run, by the name of its files: RUN, or DATASET-RUN")
    options = parser.parse_args()
    spec = tomllib.loads((HERE / f"{options.name}.toml").read_text(encoding="utf-8"))
    if "sizes" in spec:
        sys.stdout.write(f"{run_finetunings(spec, options.name, options.data)}\n")
        return
    everything = all_jobs(spec, options.name)
    peers = peer_runs(spec, options.name)
    write = write_equal_time if peers else write_table
    jobs = [job for job in everything if options.only in (None, job.label)]
    if not jobs and options.only not in peers:
        raise SystemExit(f"--only {options.only} is none of {', '.join([*(job.label for job in everything), *peers])}")
    # Plans that need the results of other runs are made later.
    at_first = [job for job in jobs if "structures_of" not in job.run]
    for job in at_first:
        make("plan", job, options.data)
    for job in jobs:
        make("plan", job, options.data)
        make("result", job, options.data)
        write(spec, options.name, everything)
    for label, peer in peers.items():
        if options.only in (None, label):
            make_peer(peer, spec, options.name, options.data)
            write(spec, options.name, everything)
    sys.stdout.write(f"{write(spec, options.name, everything)}\n")


if __name__ == "__main__":
    main()
