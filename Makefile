# `make study` and `make test` do everything, set-up included; `make bench` measures speed beside peers; `make explore` serves
# a page that asks the newest database, `make explore DATABASE=folder` another one; `make lab` opens the notebooks, and
# `make docs` builds the site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: study test lab bench build outputs explore docs
study: $(VENV)/ready
	$(BIN)/asyproxy run toy
	@set -e; for seed in 0 1 2; do \
	  echo "asyproxy run benchmark -p seed $$seed"; $(BIN)/asyproxy run benchmark -p seed $$seed; done
	$(BIN)/asyproxy report
	@$(BIN)/python .ci/project.py retell

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -rs -n 2 --dist worksteal -p no:cacheprovider .ci/test_project.py

bench: $(VENV)/ready
	$(BIN)/asyproxy run input_pipeline
	$(BIN)/asyproxy run evaluation_speed
	$(BIN)/asyproxy run search_speed
	$(BIN)/asyproxy run training_speed

# On 127.0.0.1, port 8866 or $ASYPROXY_PORT; Ctrl+C ends it.
explore: $(VENV)/ready
	$(BIN)/python -m asyproxy.page.serving "$(DATABASE)"

lab: $(VENV)/ready
	$(BIN)/jupyter lab --log-level=WARN --ServerApp.root_dir=. nbs/index.ipynb

# The notebooks as they are, with the outputs that they hold, as a site; needs no network.
docs: $(VENV)/ready
	$(BIN)/python nbs/site/build.py

# For maintainers: execute the library notebooks, clean them, export the package and build the README.
build: $(VENV)/ready
	$(BIN)/python .ci/project.py build

# For maintainers: give the studies the outputs of the runs that are on record.
outputs: $(VENV)/ready
	$(BIN)/python .ci/project.py outputs

# pip runs from outside, so the system's Python need not bring ensurepip.
$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got " + sys.version.split()[0] + "; name another one with make PYTHON=python3.12")'
	@echo "Setting up $(VENV) with the locked versions. This takes some minutes; on Linux torch brings its CUDA libraries (about 6 GB)."
	$(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --requirement requirements.txt
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -c "from asyproxy.evaluation import compile_loops; compile_loops()"
	@touch $@
