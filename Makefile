# Every target sets up what it needs, in .venv; nothing is expected but python3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
SPECS := $(wildcard specs/*.yaml)

# What is generated, built and tested here has the repository's own tuned tiles, not those of whoever runs it.
export RPAC_TUNED := none

# A second interpreter for the newest jax, which needs Python 3.12 or later; the compile tests run there too.
# A name may be there and still not run (a version manager's stand-in), so each is tried.
NEWEST_PYTHON := $(shell for python in python3.14 python3.13 python3.12 \
	$$(ls -d $(HOME)/.pyenv/versions/3.1[2-9].*/bin/python 2>/dev/null | sort -rV); do \
	"$$python" -c pass 2>/dev/null && echo "$$python" && break; done)
NEWEST := .venv-newest

.PHONY: demo test test-newest test-slow fuzz test-adapters test-init test-serve lint support samples generate generated check mutations bench-cpu bench-gpu bench-peers bench-models report-peers report-browser bench-kernels bench-steps bench-chunks bench-scheduling \
	same calibrate lock test-oldest release build-all serve-demo clean

demo: $(VENV)/ready
	start=$$(date +%s); $(BIN)/rpac build specs/llama3-8b.yaml --target tpu7x --target cpu && \
		RPAC_DEMO_START=$$start $(BIN)/python examples/demo.py build/llama3-8b.rpac build/demo.json

# A server of a small checkpoint with random weights under load, from a bundle with its whole step; and the time to the first
# token, compared with jit.
DEMO := build/serve-demo
serve-demo: export PYTHONPATH := examples$(if $(PYTHONPATH),:$(PYTHONPATH))
serve-demo: $(VENV)/ready
	$(BIN)/python -m serve.tiny $(DEMO)
	$(BIN)/rpac init $(DEMO) --dtype float32 --max-model-len 256 --block-size 16 --max-num-seqs 16 \
		--max-num-batched-tokens 64 --num-gpu-blocks-override 32 --force -o $(DEMO).yaml
	MODEL=$(DEMO) $(BIN)/rpac build $(DEMO).yaml --target cpu --this-cpu --step serve.whole:step
	$(BIN)/python -m serve.demo $(DEMO) $(DEMO).rpac
	$(BIN)/python -m serve.first_token $(DEMO) $(DEMO).rpac $(DEMO).yaml

test: $(VENV)/ready lint generated
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"
	$(MAKE) test-newest

test-newest:
ifeq ($(NEWEST_PYTHON),)
	@echo "no Python 3.12 or later here: the compile tests ran on one jax only"
else
	$(MAKE) $(NEWEST)/ready
	$(NEWEST)/bin/python -m pytest -n $(JOBS) -m "compile and not slow and not once"
endif

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -n $(JOBS) -m slow

# The fuzz tests for MINUTES in all, from a new seed, or from SEED. What finds a fault is kept in tests/fuzz/corpus.
MINUTES ?= 15
FUZZ_TESTS := 14
fuzz: $(VENV)/ready
	RPAC_FUZZ_SECONDS=$$(( 60 * $(MINUTES) / $(FUZZ_TESTS) )) RPAC_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -rA tests/fuzz

# The adapters beside the packages that they stand in for, in environments under build/adapters.
test-adapters: $(VENV)/ready
	NEWEST_PYTHON="$(NEWEST_PYTHON)" $(BIN)/python -m pytest -m slow -rA tests/adapters

# `rpac init` on every decoder of the transformers package, in an environment under build/init.
test-init: $(VENV)/ready
	NEWEST_PYTHON="$(NEWEST_PYTHON)" $(BIN)/python -m pytest -m slow -rA tests/init

# The example server on checkpoints that transformers writes, in an environment under build/serve.
test-serve: $(VENV)/ready
	$(BIN)/python -m pytest -m slow -rA tests/examples/test_serve_transformers.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/conditionals.py --limit 120
	$(BIN)/python benchmarks/readability.py --longest 120 --closures 20 --integers 12 --twice 0 --residue 0 --refs 0

support: $(VENV)/ready
	$(BIN)/rpac support > docs/support.md

# Rewrites the samples in the README and in docs/ that are not what their commands print.
samples: $(VENV)/ready
	$(BIN)/python tests/docs/samples.py --write

generate: $(VENV)/ready
	@for spec in $(SPECS); do $(BIN)/rpac generate $$spec || exit; done

# Fails where generated/ is not what the templates make of specs/, and shows the difference.
generated: $(VENV)/ready
	@for spec in $(SPECS); do $(BIN)/rpac generate $$spec --check || exit; done

check: $(VENV)/ready
	@for spec in $(SPECS); do echo "== $$spec"; $(BIN)/rpac check $$spec || exit; done

# How many bugs, planted into kernels, the check catches: build/mutations.json, for `rpac sign --mutations`. Takes hours.
mutations: $(VENV)/ready
	$(BIN)/python tests/check/plant_bugs.py build/mutations.json

build-all: $(VENV)/ready
	@for spec in $(SPECS); do $(BIN)/rpac build $$spec || exit; done

bench-cpu: $(VENV)/ready
	$(BIN)/python benchmarks/cpu.py

# On a machine with a GPU, with a CUDA build of jax beside rpac there.
bench-gpu: $(VENV)/ready
	$(BIN)/rpac build benchmarks/gpu.yaml --target gpu
	$(BIN)/rpac bench build/gpu.rpac -o build/bench-gpu.json

bench-peers: $(VENV)/ready
	$(BIN)/python benchmarks/peers.py
	$(MAKE) report-peers

# The times of peers that `rpac report` shows, from what bench-peers found.
report-peers: $(VENV)/ready
	$(BIN)/python benchmarks/report_peers.py

# A report's page in a browser, which comes from the distribution's packages if none is here; screenshots in build/report.
report-browser: $(VENV)/ready
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
		apt-get install -y --no-install-recommends chromium
	RPAC_SCREENSHOTS=build/report $(BIN)/python -m pytest -rA tests/report/test_browser.py

# Every shipped spec on every TPU target, in both layouts.
bench-models: $(VENV)/ready
	$(BIN)/python benchmarks/models.py

# Kernels of the jax package, with this jax and with the newest.
bench-kernels: $(VENV)/ready
	$(BIN)/python benchmarks/kernels.py
ifneq ($(NEWEST_PYTHON),)
	$(MAKE) $(NEWEST)/ready
	$(NEWEST)/bin/python benchmarks/kernels.py
endif

# docs/steps-predicted.md: whole steps of public models. Hours where nothing is cached.
bench-steps: $(VENV)/ready
	$(BIN)/python benchmarks/predicted_steps.py

bench-chunks: $(VENV)/ready
	$(BIN)/python benchmarks/chunks.py --target tpu7x
	$(BIN)/python benchmarks/chunks.py --target v6e

bench-scheduling: $(VENV)/ready
	$(BIN)/python benchmarks/scheduling.py

# Compares the programs of this checkout with those of an earlier one: make same OTHER=../rpac-before
same: $(VENV)/ready
	$(BIN)/python benchmarks/same.py $(OTHER) --schedules

# The source archive, the wheel and its SBOM in dist/; the wheel is checked in an environment that has nothing else.
# RPAC_HOME=https://github.com/OWNER/rpac makes the links of the package's description absolute; see hatch_build.py.
# KEY=FILE, a private key of `rpac keygen`, signs the provenance of all of them; see release/provenance.py.
release: $(VENV)/ready build/sbom/ready
	rm -rf dist build/release
	$(BIN)/python -m build --no-isolation --outdir dist
	$(PYTHON) -m venv --without-pip build/release
	$(BIN)/python -m pip --python build/release/bin/python install -q dist/*.whl
	cd build/release && bin/rpac specs tiny && bin/rpac build tiny.yaml --target cpu && bin/rpac inspect build/tiny.rpac
	build/sbom/bin/python release/sbom.py dist/*.whl build/release/bin/python dist/rpac.cdx.json
ifdef KEY
	$(BIN)/python release/provenance.py sign dist --key $(KEY)
else
	@echo "no KEY: the files in dist/ have no provenance"
endif

calibrate: $(VENV)/ready
	$(BIN)/python benchmarks/calibrate.py

# Environments have exactly the packages of the lock, each with its hash. LOCK= takes the newest that pyproject.toml allows instead.
LOCK ?= requirements-dev.txt
INSTALL = $(if $(LOCK),\
	$(1)/bin/python -m pip install -q --require-hashes -r $(LOCK) && \
	$(1)/bin/python -m pip install -q --no-build-isolation --no-deps -e .,\
	$(1)/bin/python -m pip install -q -e '.[dev]')

$(VENV)/ready: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(call INSTALL,$(VENV))
	@touch $@

$(NEWEST)/ready: pyproject.toml $(LOCK)
	$(NEWEST_PYTHON) -m venv $(NEWEST)
	$(call INSTALL,$(NEWEST))
	@touch $@

build/sbom/ready: requirements-release.txt
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/python -m pip install -q --require-hashes -r requirements-release.txt
	@touch $@

# Writes the locks anew, with the newest packages that pyproject.toml allows, for each Python from 3.11 on.
UV_LOCK = build/lock/bin/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"
lock: build/lock/ready
	$(UV_LOCK) --extra dev pyproject.toml -o requirements-dev.txt
	$(UV_LOCK) requirements-release.in -o requirements-release.txt

build/lock/ready:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q uv
	@touch $@

# Tests that use each dependency, with the oldest releases that pyproject.toml allows.
OLDEST := build/oldest/bin/python
test-oldest: build/lock/ready
	build/lock/bin/uv venv -q --clear --python $(PYTHON) build/oldest
	build/lock/bin/uv pip install -q --no-build --python $(OLDEST) --resolution lowest-direct -r pyproject.toml \
		--extra plot --extra tune --extra remote --extra metrics --extra trust
	build/lock/bin/uv pip install -q --no-build --python $(OLDEST) pip pytest hypothesis jsonschema aiohttp in-toto-attestation
	PYTHONPATH=$(CURDIR) $(OLDEST) -m pytest -q -W ignore::DeprecationWarning -m "not slow and not compile" \
		tests/trust tests/bundle tests/predict/test_plot.py tests/cli/test_small_commands.py tests/tune/test_executors.py \
		tests/engine/test_observing.py tests/engine/test_storage.py tests/engine/test_loading.py

clean:
	rm -rf build $(VENV) $(NEWEST)
