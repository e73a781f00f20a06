# Two commands: `make demo` and `make test`. Everything they need is installed into .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup docs demo compare staleness staleness-quick test test-chaos test-cluster test-distributed test-compile test-browser test-nginx test-fuzz mutation lint format types imports check setup-vllm test-vllm setup-reverb bench-buffer

setup: $(VENV)/.done

# scripts/setup holds a lock: two makes in one clone must not both build the environment
$(VENV)/.done: pyproject.toml constraints.txt scripts/setup
	scripts/setup $(PYTHON) $(VENV)

demo: setup
	$(BIN)/stalewise demo $(ARGS)

# GRPO, token TIS and stalewise live on the same stale data: one chart here and one in runs/compare.png
compare: setup
	$(BIN)/python -m benchmarks.compare $(ARGS)

# the staleness study, resumed where it was stopped: ARGS="--hours 3 --part main"
staleness: setup
	$(BIN)/python -m benchmarks.staleness run $(ARGS)

staleness-quick: setup
	$(BIN)/python -m benchmarks.staleness quick

test: setup
	$(BIN)/pytest -n 3 --dist worksteal $(ARGS)

# 100 kills of each policy, 10 to 25 minutes; another order of kills: ARGS=--chaos-seed=7
test-chaos: setup
	$(BIN)/pytest tests/chaos --chaos-kills=100 --timeout=0 -o log_cli=true -o log_cli_level=INFO --log-disable=httpx $(ARGS)

# the dashboard over 100,000 groups and beside a real run, in Chromium, about 5 minutes
test-browser: setup
	CI=true $(BIN)/pytest tests/browser/test_*.py tests/browser/long_look.py -s --timeout=0

# a Redis Cluster of three nodes on loopback, started by the tests; a minute or two
test-cluster: setup
	$(BIN)/pytest tests/cluster --cluster --timeout=300 $(ARGS)

# two gloo ranks on the CPU: the step alone, then the learner against a real service, about five minutes
test-distributed: setup
	$(BIN)/pytest tests/distributed --distributed -n 0 $(ARGS)

# torch.compile against plain layers on the CPU, with a C++ compiler, in one process and on two ranks; about six minutes
test-compile: setup
	$(BIN)/pytest tests/compiled --compile -n 0 $(ARGS)

# the fuzzers of `make test` with 60 times their executions, about an hour
test-fuzz: setup
	$(BIN)/pytest tests/fuzz --fuzz-scale=60 --timeout=0 $(ARGS)

# about 20 minutes; less of it with MUTATION_ARGS="--sample 100 --seed 1", or with the names of modules
mutation: setup
	$(BIN)/python scripts/mutate-objectives $(MUTATION_ARGS)

format: setup
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && scripts/check

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

# never with --quiet: it hides the warnings from --strict, too, and nothing fails
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint types imports docs test

# vLLM pins other versions than ours: an environment of its own, on its CPU build
VENV_VLLM := .venv-vllm

setup-vllm: $(VENV_VLLM)/.done

$(VENV_VLLM)/.done: pyproject.toml constraints-vllm.txt scripts/setup-vllm
	scripts/setup-vllm $(PYTHON) $(VENV_VLLM)

# the service of the end-to-end test runs from .venv; the fixtures of the other tests need what is not installed here
test-vllm: setup setup-vllm
	$(VENV_VLLM)/bin/pytest tests/vllm --confcutdir=tests/vllm

# DeepMind's Reverb needs an old TensorFlow: an environment of its own, 1.7 GB, for the comparison of benchmarks/buffer.py
VENV_REVERB := .venv-reverb

setup-reverb: $(VENV_REVERB)/.done

$(VENV_REVERB)/.done: constraints-reverb.txt scripts/setup-reverb
	scripts/setup-reverb $(PYTHON) $(VENV_REVERB)

# under ten minutes; shorter with ARGS=--quick
bench-buffer: setup setup-reverb
	$(BIN)/python -m benchmarks.buffer $(ARGS)

# the cache of weights in a real nginx (Debian: apt-get install nginx-light), which `make test` skips where there is none
test-nginx: setup
	STALEWISE_NEEDS_NGINX=1 $(BIN)/pytest tests/nginx
