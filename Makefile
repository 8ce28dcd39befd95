PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/installed
NOTEBOOKS := $(shell find nbs -name '*.ipynb' -not -path '*/.*' | sort)
export MPLBACKEND ?= agg
export PYTHONWARNINGS ?= ignore::FutureWarning

.DEFAULT_GOAL := help
.PHONY: help install train sample test gpu test-browser notebooks export clean

help:       ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install the pinned set (several GB, once)

$(INSTALLED): settings.ini setup.py
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3,11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

train: $(INSTALLED)  ## train both arms and compare them; ARGS="--data imagewoof-320 ..." for photographs
	$(BIN)/resizer_compare --arms bilinear,learned --seeds 0 --data sample --arch resnet18 --size 128 --out 64 --epochs 6 --bs 25 --workers 0 $(ARGS)

sample: $(INSTALLED)  ## before a release: every arm with three seeds on the set that draws itself, written to results/; a quarter of an hour
	$(BIN)/resizer_compare --arms bilinear,again,antialias,pil,none,muller,learned --seeds 0,1,2 --data sample --arch resnet18 --size 128 --out 64 --epochs 6 --bs 25 --workers 0 --name sample $(ARGS)
	cp runs/sample/table.md results/sample.md
	cp runs/sample/runs.csv results/sample.csv

test: $(INSTALLED)  ## run every notebook as nbdev_test does, then tests/; ARGS="-k name" for some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 $(ARGS)

gpu:        ## test on a GPU, without installing anything; ARGS="--limit 20" for a small version, on a CPU too
	PYTHONPATH=. $(PYTHON) tests/gpu.py $(ARGS)

test-browser: $(INSTALLED)  ## explore in a real JupyterLab, and reports, in headless Chromium; installs both (Debian, root or sudo)
	command -v chromedriver >/dev/null || $$([ $$(id -u) = 0 ] || echo sudo) sh -c 'apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver'
	$(BIN)/python -m pip install -q -e '.[browser]'
	$(BIN)/python -m pytest tests/browser/in_chromium.py $(ARGS)

export: $(INSTALLED)  ## write the library and README.md from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/python nbs/readme.py

notebooks: $(INSTALLED)  ## export, run every notebook in Jupyter and keep its outputs, then clean and write README.md
	$(BIN)/nbdev_export
	MPLBACKEND= PYTHONWARNINGS=ignore $(BIN)/jupyter execute --inplace $(NOTEBOOKS)
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/readme.py

clean:      ## remove what the commands wrote, except .venv and runs
	rm -rf build *.egg-info .pytest_cache _docs _proc
