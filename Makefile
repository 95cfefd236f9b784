.DEFAULT_GOAL := help
.PHONY: help venv demo test campaign layouts lint gpu bench-compute bench-planner bench-planner-real bench-data bench-convert bench-restart bench-replan faults doctor lock clean

PY := .venv/bin/python
PYTEST_ARGS ?=
BENCH_ARGS ?=
LOCK_EXTRAS := dev,hf
CASES ?= 2000
KILLS ?= 100
FAULTS_ROWS := .pytest_cache/faults.jsonl
export PYTHON

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 28

venv: ## .venv with the locked packages; does nothing where it is up to date (PYTHON=/path chooses the Python)
	@sh .ci/venv.sh

demo: venv ## trains, resumes and samples a small HMoE on Shakespeare, and draws its report
	@$(PY) examples/demo.py

test: venv ## the whole test suite, on two processes (PYTEST_ARGS="-k plan -x -n 0" narrows it)
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

campaign: venv ## what is too long for `make test`: more seeds, rows, whole commands and random examples; two hours
	@HYPOTHESIS_PROFILE=explore $(PY) -m pytest -m campaign $(PYTEST_ARGS)
	@HYPOTHESIS_PROFILE=explore $(PY) -m pytest tests/unit $(PYTEST_ARGS)

layouts: venv ## every row of docs/parallelism.md, up to 8 ranks
	@$(PY) -m pytest -m "" tests/distributed/test_layouts.py $(PYTEST_ARGS)

lint: venv ## ruff: faults and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet . || { echo "not formatted: run .venv/bin/python -m ruff format ."; exit 1; }

gpu: ## proof and figures on a machine with a GPU, to benchmarks/gpu.md and gpu.json; installs nothing; 5 minutes
	@python=$(PY); $$python -c '' 2>/dev/null || python=python3; $$python -m benchmarks.gpu $(BENCH_ARGS)

bench-planner: venv ## the planner's figures, to benchmarks/planner.md (CASES=100000: all random layers under caps)
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.planner --cases $(CASES)

bench-compute: venv ## the experts' compute on a CPU beside Megatron's, to benchmarks/compute.md; 20 minutes
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.compute $(BENCH_ARGS)

bench-planner-real: venv ## planned against contiguous placement in training, to benchmarks/planner_real.md; 10 minutes
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.planner_real

bench-data: venv ## text to token files against Megatron's own way, to benchmarks/data.md (BENCH_ARGS="--datatrove DIR")
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.data $(BENCH_ARGS)

bench-convert: venv ## time and peak memory of exports to Hugging Face at three sizes, to benchmarks/convert.md
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.convert $(BENCH_ARGS)

bench-restart: venv ## from a killed rank to the next training step, to benchmarks/restart.md
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.restart

bench-replan: venv ## experts that move while training beside those that stay, to benchmarks/replan.md; 10 minutes
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.replan $(BENCH_ARGS)

faults: venv ## the fault campaign, its outcome to docs/faults.md (KILLS=100: kills on two ranks, as many on four); an hour
	@mkdir -p $(dir $(FAULTS_ROWS)); rm -f $(FAULTS_ROWS); FAULTS_ROWS=$(FAULTS_ROWS) FAULTS_KILLS=$(KILLS) OMP_NUM_THREADS=1 \
	    $(PY) -m pytest tests/faults tests/distributed/test_numeric_faults.py -m "campaign or not campaign" -p no:cacheprovider $(PYTEST_ARGS); \
	    ended=$$?; $(PY) -m tests.faults.page $(FAULTS_ROWS) && exit $$ended

doctor: ## what this machine has, what a run will use, how to repair what is broken; installs nothing
	@if $(PY) -c '' 2>/dev/null; then $(PY) tools/doctor.py; else python3 tools/doctor.py; fi

lock: venv ## requirements.lock anew from .venv, after setup.py's ranges are installed
	@$(PY) -m pip install -q --no-build-isolation -e '.[$(LOCK_EXTRAS)]'
	@$(PY) .ci/lock.py

clean: ## removes caches and builds; keeps .venv, data and runs
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
