PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/installed
NOTEBOOKS := $(shell find nbs -name '*.ipynb' -not -path '*/.*' | sort)
export MPLBACKEND ?= agg
export PYTHONWARNINGS ?= ignore

.DEFAULT_GOAL := help
.PHONY: help install train test test-all test-newest test-demo drills gpu size notebooks export clean

help:       ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install the pinned set (several GB, once)

$(INSTALLED): settings.ini setup.py
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3,11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

train: $(INSTALLED)  ## train bilinear, learned and none, and compare them; ARGS="--data imagewoof-320 ..." for photographs
	$(BIN)/resizer_compare --resizers bilinear,learned,none --seeds 0 --data sample --arch timm/resnet10t --size 128 --out 64 --epochs 3 --bs 25 --num_workers 0 $(ARGS)

test: $(INSTALLED)  ## run the notebooks of the library as nbdev_test does, then the fast tests; ARGS="-k name" for some
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --skip_folder_re '^[_.]|tutorials' --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 -m 'not slow' $(ARGS)

test-all: $(INSTALLED)  ## what test does, the tutorials, and the slow tests
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 $(ARGS)

test-newest: ## build the packages, install them in an empty environment with the newest fastai and no nbdev, and test them there
	rm -rf build
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install build twine
	build/newest/bin/python -m build -o build/dist .
	build/newest/bin/python -m twine check --strict build/dist/*
	build/newest/bin/python -m pip install "$$(ls build/dist/*.tar.gz)[ship]"
	build/newest/bin/python -m pip install --no-deps --force-reinstall build/dist/*.whl
	build/newest/bin/python -m pip install pytest pytest-xdist hypothesis
	cp -r tests README.md build
	cd build && OMP_NUM_THREADS=1 newest/bin/python -m pytest tests/test_package.py tests/test_readme.py $(ARGS)
	cd build && OMP_NUM_THREADS=1 newest/bin/python -m pytest tests -n 2 -m 'not slow' $(ARGS)

test-demo: $(INSTALLED)  ## drive the demo in Chromium; Gradio wants an older Pillow, so it is installed beside .venv
	$(BIN)/python -m pip install --upgrade --target build/demo gradio selenium
	PYTHONPATH=build/demo OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_demo.py $(ARGS)

drills: $(INSTALLED)  ## kill runs at random moments, train for minutes and watch the memory, fill the disk; by hand
	$(BIN)/python -m pytest tests/drills.py -s $(ARGS)

gpu:        ## test what differs on a GPU; PYTHON=... is the interpreter, nothing is installed
	PYTHONPATH=. $(PYTHON) tests/gpu.py $(ARGS)

size: $(INSTALLED)  ## lines, tokens, names and cells of the library
	@$(BIN)/python tests/size.py

export: $(INSTALLED)  ## write the library from the notebooks
	$(BIN)/nbdev_export

notebooks: $(INSTALLED)  ## export, run every notebook in Jupyter and keep its outputs, then clean
	$(BIN)/nbdev_export
	env -u MPLBACKEND $(BIN)/jupyter execute --inplace $(NOTEBOOKS)
	$(BIN)/nbdev_clean

clean:      ## remove what the commands wrote, except .venv and runs
	rm -rf build *.egg-info .pytest_cache _docs _proc
