# FedMeDUET. `make demo` and `make test` need python3 (3.11 to 3.13), venv and make; they set up .venv themselves.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin

.PHONY: help demo test slow faults audit-ground-truth check sbom clean
help:            ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Expected Python 3.11 to 3.13, got {v[0]}.{v[1]}; set PYTHON=python3.12, say.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[federation,export,mlflow,test,viewer]'
	touch $@

demo: .venv/.installed   ## three simulated hospitals pretrain together; ends with the page's address
	$(BIN)/meduet-simulate

test: .venv/.installed   ## the tests, a process for each core (minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow' -n auto --dist loadfile --no-loadscope-reorder

slow: .venv/.installed   ## the same laws over many more draws, whole commands in processes; CI runs both
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n auto --dist worksteal

faults: .venv/.installed  ## kill, cut and lie to a consortium of real processes (25 to 45 minutes on 2 cores, 8 GB); writes docs/faults.md
	$(BIN)/python -m tests.faults docs/faults.md

audit-ground-truth: .venv/.installed  ## attack a run over hippocampus scans, beside what was measured before (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ground_truth ../shared/data/msd_hippocampus runs/ground-truth

check: .venv/.installed  ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

sbom: .venv/.installed   ## what the software is made of, as CycloneDX: dist/sbom.cdx.json
	mkdir -p dist && $(BIN)/python .ci/sbom.py > dist/sbom.cdx.json

clean:           ## remove environment and runs
	rm -rf .venv runs
