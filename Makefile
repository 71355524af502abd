# The two to begin with: make demo, make test. `make help` lists the rest.

PYTHON ?= python3
PY := .venv/bin/python
BENCH ?=
FIGURES ?=
TESTS ?=
SEEDS ?= 20

.DEFAULT_GOAL := help
.PHONY: bench campaign check clean clients cluster demo docs figures format fuzz gpu help lint proto setup test types

help: ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Makes .venv ready: quick when it is, 6 minutes and 9 GB the first time on a machine.
	@$(PYTHON) scripts/setup.py

demo: setup ## Starts a mesh of two engines, shows the three strategies side by side, and stops it.
	@.venv/bin/kvmesh demo

test: setup ## Runs all tests; TESTS=tests/unit runs some.
	@$(PY) -m pytest $(TESTS)

campaign: setup ## Kills real engines at every stage of a request, SEEDS times each; 20 seeds take about half an hour.
	@$(PY) -m pytest tests/mesh/test_kills.py --kills $(SEEDS)

FUZZ ?= 120
FUZZ_VENV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvmesh/fuzz

fuzz: setup ## Fuzzes both doors and every gRPC method for FUZZ seconds each; schemathesis is fetched on first use.
	@test -x $(FUZZ_VENV)/bin/schemathesis || { $(PYTHON) -m venv $(FUZZ_VENV) && \
		$(FUZZ_VENV)/bin/pip install --quiet --disable-pip-version-check schemathesis==4.32.5; }
	@$(PY) -m pytest -s tests/unit/test_fuzz_grpc.py tests/unit/test_fuzz_http.py --fuzz-seconds $(FUZZ)

BUILT := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvmesh/clients

clients: ## Builds examples/clients (node and npm; g++ and libgrpc++-dev), and fetches buf; tests use them then.
	@mkdir -p $(BUILT)/javascript $(BUILT)/buf
	@cp examples/clients/javascript/package*.json $(BUILT)/javascript/
	@npm ci --prefix $(BUILT)/javascript --ignore-scripts --no-audit --no-fund
	@npm install --prefix $(BUILT)/buf --ignore-scripts --no-audit --no-fund @bufbuild/buf@1.75.0
	@$(MAKE) --no-print-directory -C examples/clients/cpp OUT=$(BUILT)/cpp

gpu: setup ## Runs the checks that need a GPU: two engines and two processes on one; skipped where there is none.
	@$(PY) -m pytest tests/gpu -rs

lint: setup ## Looks over the code with ruff.
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet . || { echo "run: make format"; exit 1; }

types: setup ## Checks the types with mypy.
	@$(PY) -m mypy

check: lint types ## lint and types.

proto: ## Generates the gRPC code from protos/ again.
	@rm -f .venv/kvmesh-stamp
	@$(PYTHON) scripts/setup.py

bench: setup ## Measures this machine: start, router overhead, copy rate; BENCH hands options on.
	@$(PY) -m benchmarks $(BENCH)

figures: setup ## Runs the published comparison of strategies on the simulator, into figures/; FIGURES hands options on.
	@$(PY) -m benchmarks.figures --out figures $(FIGURES)

docs: setup ## Brings the tables in docs/ up to date with settings and protos.
	@$(PY) scripts/docs_tables.py

format: setup ## Formats the code with ruff.
	@$(PY) -m ruff format --quiet .

cluster: ## Brings up deploy/docker-compose.yml with simulated engines; needs docker and compose.
	@compose="docker compose"; $$compose version >/dev/null 2>&1 || compose=docker-compose; \
		$$compose -f deploy/docker-compose.yml --profile sim up --build

clean: ## Removes what was built in this clone; the environment that all clones share stays.
	@rm -rf .venv build kvmesh.egg-info .mypy_cache .ruff_cache .pytest_cache
	@rm -f kvmesh/v1/*_pb2.py kvmesh/v1/*_pb2.pyi kvmesh/v1/*_pb2_grpc.py kvmesh/v1/*_pb2_grpc.pyi
