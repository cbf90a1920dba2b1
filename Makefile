# make demo and make test set everything up by themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= ../shared/data
SCHNETPACK := .bench/schnetpack
MACE := .bench/mace
NEQUIP := .bench/nequip
KILLS ?= 20
SEED ?= 0
MINUTES ?= 10

.PHONY: demo test test-compiled test-docs fuzz torture slurm-test hosts-test check docs bench bench-scaling real results sixteen links clean

demo: .venv/.installed
	rm -rf runs/demo
	$(BIN)/hydrazero demo --out runs/demo

# What starts no ranks in two processes, then the rest alone, since ranks share the cores already.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ranks and not compiler and not docs and not fuzz" -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "ranks and not compiler and not docs and not fuzz"

# Every encoder and head through the compiler; a quarter of an hour.
test-compiled: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m compiler

# Every command and every line of Python in the manual, with few steps; some minutes.
test-docs: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m docs

# Random faulty files for every reader, MINUTES altogether: each must be converted, or end in one sentence.
fuzz: .venv/.installed
	OMP_NUM_THREADS=1 HYDRAZERO_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest -m fuzz --timeout 0

# Kills a run at random moments and resumes it each time; the end must be that of a run which was never killed.
torture: .venv/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/ranks/torture.py --kills $(KILLS) --seed $(SEED)

# Jobs on a Slurm of two nodes, started for it on this host; needs root and Debian's slurm-wlm. Some three minutes.
slurm-test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/slurm/run.py || [ $$? -eq 77 ]

# A run on two hosts, which are network namespaces, one of which vanishes; needs root, iproute2, openssh-server and pdsh.
hosts-test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/hosts/run.py || [ $$? -eq 77 ]

check: .venv/.installed links
	$(BIN)/ruff check .
	$(BIN)/mypy

# Writes the generated pages of the reference and builds the site into site/; links, anchors and references must resolve.
docs: .venv/.installed links
	PYTHONPATH=.links $(BIN)/python docs/generate/write_reference.py
	$(BIN)/zensical build --strict --clean

# Converts the three tasks of launch/runs/ethanol_3bpa.toml from DATA, trains some ten minutes, prints the table.
real: .venv/.installed
	rm -rf runs/ethanol_3bpa runs/data/ethanol_pbe runs/data/ethanol_ccsdt runs/data/3bpa
	$(BIN)/hydrazero convert $(DATA)/ethanol_multifid/pbe_def2svp/*.xyz --task ethanol_pbe --out runs/data/ethanol_pbe --config launch/convert/ethanol_pbe.toml
	$(BIN)/hydrazero convert $(DATA)/ethanol_multifid/ccsdt_ccpvtz/*.npz --task ethanol_ccsdt --out runs/data/ethanol_ccsdt --config launch/convert/ethanol_ccsdt.toml
	$(BIN)/hydrazero convert $(DATA)/3bpa_wb97x/train_300K.xyz $(DATA)/3bpa_wb97x/train_mixedT.xyz --task 3bpa --out runs/data/3bpa --config launch/convert/3bpa.toml
	$(BIN)/hydrazero train launch/runs/ethanol_3bpa.toml --ranks 2
	$(BIN)/hydrazero evaluate runs/ethanol_3bpa
	$(BIN)/hydrazero export runs/ethanol_3bpa --out runs/ethanol_3bpa/model.safetensors
	$(BIN)/hydrazero report runs/ethanol_3bpa

# Converts sixteen real tasks from DATA, of which lips is of pickles, and checks the counts.
sixteen: .venv/.installed
	PYTHONPATH=tests $(BIN)/python -m results.sixteen $(DATA) runs/data/sixteen --trust-pickle

# A table of docs/results, run by run; what is done is not done again. The table of encoders has peers, which get
# environments of their own.
results: .venv/.installed $(if $(filter encoders,$(NAME)),$(SCHNETPACK)/.installed $(MACE)/.installed $(NEQUIP)/.installed)
	PYTHONPATH=tests $(BIN)/python -m results.runner $(NAME) $(DATA)

# The peers get environments of their own, since SchNetPack wants an older torch and MACE an older e3nn; several gigabytes.
# ONLY=data, sums, encoders, small, steps, screen, scaling or groups: that part alone; only steps and screen have peers.
bench: .venv/.installed $(if $(filter data sums encoders small scaling groups,$(ONLY)),,$(SCHNETPACK)/.installed $(MACE)/.installed)
	$(BIN)/python tests/bench/run.py --peer-python $(SCHNETPACK)/bin/python --mace-python $(MACE)/bin/python \
		--sixteen runs/data/sixteen --out runs/bench.json $(if $(ONLY),--only $(ONLY))

# ZeRO stages against plain PyTorch DDP on 1, 2 and 4 ranks, some minutes on a quiet machine of two cores.
bench-scaling: .venv/.installed
	$(BIN)/python tests/bench/run.py --only scaling --out runs/bench.json

links:
	mkdir -p .links/hydrazero
	for part in trainer models shards ds_configs launch; do ln -sfn ../../$$part .links/hydrazero/$$part; done

# torch comes first: deepspeed is built from source against it.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip setuptools wheel
	$(BIN)/pip install -q -c constraints.txt torch ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed
	PYTHONWARNINGS=ignore $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[demo,dev,docs,formats,search,torch-sim]'
	touch $@

$(SCHNETPACK)/.installed:
	$(PYTHON) -m venv $(SCHNETPACK)
	$(SCHNETPACK)/bin/pip install -q schnetpack==2.1.1
	touch $@

$(MACE)/.installed:
	$(PYTHON) -m venv $(MACE)
	$(MACE)/bin/pip install -q torch==2.13.0
	$(MACE)/bin/pip install -q mace-torch==0.3.16
	touch $@

$(NEQUIP)/.installed:
	$(PYTHON) -m venv $(NEQUIP)
	$(NEQUIP)/bin/pip install -q torch==2.13.0
	$(NEQUIP)/bin/pip install -q nequip==0.19.1
	touch $@

clean:
	rm -rf .venv .links build site *.egg-info
