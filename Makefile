# rt_detectron: `make` lists the targets. PYTHON is only used to create .venv.
PYTHON ?= python3
PY := .venv/bin/python
# Extra words for the set-up and for pytest, e.g. PYTEST_ARGS="-k convert"
SETUP_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the tests, each with one thread; 0 runs them in pytest's own process. One more than
# the two cores of a small machine, since some tests wait for others' processes.
TEST_WORKERS ?= 3

DEMO_DATA := datasets/demo
DEMO := output/demo

.PHONY: help setup demo test test-slow coverage lint docs clean
# The demo's steps share the machine's cores, and none may run before the set-up.
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make setup      create .venv with torch, Detectron2 and rt_detectron (every target does it first)"
	@echo "make demo       pretrain, convert, fine-tune and compare on embedded data; prints AP and the report's path"
	@echo "make test       run the tests, in $(TEST_WORKERS) processes (TEST_WORKERS=0: in one)"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make coverage   run the tests and show the lines that none of them runs"
	@echo "make lint       check style, format and types"
	@echo "make docs       build the documentation site into build/site; warnings are errors"
	@echo "make clean      remove the demo's data and results, caches and build leftovers (not .venv)"
	@echo "Python for .venv: PYTHON=$(PYTHON). Detectron2 from source: DETECTRON2_SOURCE=<folder or git URL>."

setup:
	@$(PYTHON) tools/setup_environment.py $(SETUP_ARGS)

# Every stage of the demo but the last has files as its result and is skipped once they exist; tools
# resume what was cut off. `make clean` starts over. Logs are beside the results.
# The data set is looked for in the clone, whatever DETECTRON2_DATASETS the caller has.
demo: export DETECTRON2_DATASETS := datasets
demo: $(DEMO)/resnet18_standard.pkl $(DEMO)/resnet18_l2.pkl
	@echo "3 of 3, fine-tuning: each trial's log is $(DEMO)/compare/trials/.../trial.log"
	@$(PY) tools/compare.py --study configs/study/demo.yaml --output $(DEMO)/compare
	@echo "Shown: pretraining, conversion, fine-tuning and comparison work here; the table has the AP of both arms."
	@echo "Not shown: which backbone is better. Two seeds of small networks, trained for minutes on digits painted"
	@echo "onto a few photographs, decide nothing about real objects. Report: $(DEMO)/compare/report.html"

$(DEMO_DATA)/.complete: | setup
	@echo "1 of 3, data: $(DEMO_DATA)"
	@$(PY) datasets/prepare_demo.py --output $(DEMO_DATA)
	@touch $@

# One run makes both, side by side; a failure of one must not delete the other.
.PRECIOUS: $(DEMO)/standard/classifier.pth $(DEMO)/robust/classifier.pth
$(DEMO)/standard/classifier.pth $(DEMO)/robust/classifier.pth: | $(DEMO_DATA)/.complete
	@$(PY) tools/_stage.py "2 of 3, pretraining" \
	    $(DEMO)/standard/classifier.pth "tools/pretrain.py --config-file configs/pretrain/demo_standard.py \
	        --resume train.output_dir=$(DEMO)/standard" \
	    $(DEMO)/robust/classifier.pth "tools/pretrain.py --config-file configs/pretrain/demo_l2.py \
	        --resume train.output_dir=$(DEMO)/robust"

$(DEMO)/resnet18_standard.pkl: | $(DEMO)/standard/classifier.pth
	@$(PY) tools/convert_checkpoint.py $(DEMO)/standard/classifier.pth $@

$(DEMO)/resnet18_l2.pkl: | $(DEMO)/robust/classifier.pth
	@$(PY) tools/convert_checkpoint.py $(DEMO)/robust/classifier.pth $@

test coverage: export OMP_NUM_THREADS := 1
test: setup
	@$(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: setup
	@$(PY) -m pytest -m slow $(PYTEST_ARGS)

coverage: setup
	@$(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal --cov=rt_detectron --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs: setup
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]' --no-build-isolation
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet --site-dir build/site
	@echo "build/site/index.html"

clean:
	rm -rf $(DEMO) $(DEMO_DATA) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
