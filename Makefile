# `make demo` shows the system at work, `make report` measures it, `make test` checks all of it.
# Each first sets up all it needs in $(VENV).

PYTHON ?= python3.11
VENV ?= .venv
# On the machines we test on, this version is a CPU build; a plain `torch` may bring gigabytes of
# CUDA. On a GPU host: `make demo TORCH=torch`.
TORCH ?= torch==2.13.0
# Exact versions of all other packages; `make constraints` renews them. `CONSTRAINTS=` takes the
# newest that pyproject.toml allows; `make test-newest` does so in an environment of its own.
CONSTRAINTS ?= constraints
JOBS ?= 2
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
PINNED = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)/main.txt)
PINNED_BUILD = $(if $(CONSTRAINTS),--build-constraint $(CONSTRAINTS)/main.txt)
PINS = $(if $(CONSTRAINTS),$(CONSTRAINTS)/main.txt)
RUN = $(VENV)/bin
export CONSTRAINTS
PACKAGES = vlm_collab edge_client server_plugin eval

# The tests with vLLM need an environment of their own, of 3.5 GB. `make test VLLM=0` skips them.
VLLM ?= 1

# Those with lmms-eval need one of 100 MB, which borrows the rest from $(VENV). `LMMS=0` skips them.
LMMS ?= 1

.PHONY: demo report serve test lint types layers structure docs check vllm-env check-vllm \
  bench-vllm lmms-env check-lmms test-slow parity test-newest test-oldest constraints browser rtsp-server clean

demo: $(VENV)/.demo
	$(RUN)/vlm-collab demo --out out/demo

# Makes every figure and table of the paper on the demo model, and prints where numbers differ from
# docs/results/demo. Continues a stopped run; `rm -r out/report` starts again.
report: $(VENV)/.demo
	$(RUN)/python -m eval.report.demo --out out/report

serve: $(VENV)/.demo
	$(RUN)/vlm-collab serve

# Types are checked while the tests' environments are installed; each uses one core.
NEEDED = browser rtsp-server $(if $(filter-out 0,$(VLLM)),vllm-env) $(if $(filter-out 0,$(LMMS)),lmms-env)
test: $(VENV)/.dev
	$(MAKE) --jobs 2 --output-sync=target lint types layers docs $(NEEDED)
	$(MAKE) check $(if $(filter-out 0,$(VLLM)),check-vllm)

lint: $(VENV)/.dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/codespell

types: $(VENV)/.dev
	$(RUN)/mypy

layers: $(VENV)/.dev
	$(RUN)/lint-imports

# The documentation as a site in out/docs. A link or anchor that leads nowhere is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

# Size, import circles, imports against the layers and duplicate code of this tree, beside an earlier
# revision: `make structure REVISION=a32fb50`. `LIST=1` names every finding.
structure: $(VENV)/.dev
	@$(RUN)/python -m tests.support.structure $(addprefix --revision ,$(REVISION)) $(if $(LIST),--list)

# Two workers on two cores, with one thread each, so that their thread pools do not compete.
# Includes the tests with lmms-eval, which alone would leave one core idle.
check: $(VENV)/.dev browser rtsp-server $(if $(filter-out 0,$(LMMS)),lmms-env)
	OMP_NUM_THREADS=1 $(RUN)/pytest --numprocesses $(JOBS) --dist loadfile \
	  -m "not slow and not vllm$(if $(filter-out 0,$(LMMS)),, and not lmms)"

vllm-env: $(VENV)/.dev
	$(RUN)/python -m tests.support.vllm_cpu.environment

check-vllm: vllm-env
	OMP_NUM_THREADS=1 $(RUN)/pytest -m "vllm and not slow" --numprocesses $(JOBS) --dist loadgroup \
	  tests/server_plugin/vllm

# Measures the cost of attention rows in vLLM on the CPU (docs/vllm.md). Run nothing else meanwhile.
BENCH ?= --rounds 24
bench-vllm: vllm-env
	$(RUN)/python -m tests.support.vllm_cpu.environment eval.bench.vllm $(BENCH)

lmms-env: $(VENV)/.dev
	$(RUN)/python -m tests.support.lmms_env

check-lmms: lmms-env
	OMP_NUM_THREADS=1 $(RUN)/pytest -m "lmms and not slow" tests/eval/test_lmms_eval.py

# Tests that take minutes and rarely fail: models on thousands of scenes, more configurations of
# vLLM. Run them before a release; CI does not.
test-slow: vllm-env browser
	OMP_NUM_THREADS=1 $(RUN)/pytest -m "slow and not vllm and not lmms" --numprocesses $(JOBS) \
	  --dist loadfile
	OMP_NUM_THREADS=1 $(RUN)/pytest -m "vllm and slow" --numprocesses $(JOBS) --dist loadgroup \
	  tests/server_plugin/vllm

# Tests that another version of a dependency would break first: answers, rows and boxes of all model
# families against plain transformers, reading checkpoints, output of commands, both ends of a link.
PARITY = $(addprefix tests/server_plugin/test_,transformers_backend.py instructblip.py \
    qwen2_5_vl.py deprecations.py checkpoints.py service.py cli.py) \
  $(addprefix tests/edge_client/test_,client.py cli.py picture.py)
TESTS ?= $(PARITY)
parity: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN)/pytest -m "not vllm and not lmms" --numprocesses $(JOBS) \
	  --dist loadfile $(TESTS)

# Tests with the newest versions that pyproject.toml allows, in an environment of their own; takes
# half a minute if they are those of constraints/. CI runs it after `make test`, to notice releases
# that break something. `make test-newest TESTS=tests` runs all tests.
test-newest: $(VENV)/.dev
	@TORCH="$(TORCH)" $(RUN)/python -m tests.support.versions drift; case $$? in \
	  0) echo "the newest versions that pyproject.toml allows are those of constraints/" ;; \
	  1) rm -rf .venv-newest && $(MAKE) VENV=.venv-newest CONSTRAINTS= parity ;; \
	  *) exit 1 ;; \
	esac

# Tests with the lowest versions that pyproject.toml allows, except torch. Run it before a release
# and when a bound changes.
test-oldest: $(VENV)/.dev
	rm -rf .venv-oldest && $(RUN)/python -m tests.support.versions oldest .venv-oldest/constraints
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=.venv-oldest/constraints parity

constraints: $(VENV)/.dev
	TORCH="$(TORCH)" $(RUN)/python -m tests.support.versions write

# The page is tested in Chromium. Without it these tests are skipped with a message, except in CI.
browser:
	@for name in chromium chromium-browser google-chrome; do \
	  command -v $$name >/dev/null && exit 0; \
	done; \
	[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium || \
	  echo "no Chromium here, and none can be installed: the page is not tested in a browser"

# Cameras are tested against GStreamer's RTSP server, which runs under Debian's own Python.
RTSP_SERVER = gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-good
rtsp-server: browser
	@dpkg -s $(RTSP_SERVER) >/dev/null 2>&1 && exit 0; \
	[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(RTSP_SERVER) || \
	  echo "no RTSP server here, and none can be installed: streams are not tested against one"

$(VENV)/.torch: $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade $(PINNED) pip
	$(PIP) install $(PINNED) "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml demo/pyproject.toml
	$(PIP) install $(PINNED) $(PINNED_BUILD) --editable ".[eval]" --editable ./demo
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml demo/pyproject.toml
	$(PIP) install $(PINNED) $(PINNED_BUILD) --editable ".[dev]" --editable ./demo
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm .venv-lmms .venv-newest .venv-oldest out build dist
