# make setup   .venv with everything; done in a moment when nothing has changed
# make demo    tools/demo.py; its arguments: make demo DEMO_ARGS="--quick"
# make test    the tests, on all cores; pytest's arguments: make test TEST_ARGS="-n 0 tests/modeling"
# make docs    the documentation's site in output/site, warnings are errors
# make lint    ruff and mypy
# make gpu-check   what only a GPU can tell, in ten minutes, nothing installed: docs/gpu.md
#
# PYTHON=python3.12 names the Python that .venv is made of.
# PY=python uses that interpreter as it is, for a machine whose Python already has torch, detectron2
# and the rest: no .venv, nothing installed, nothing replaced.

PYTHON ?= python3
# Old Pythons read this line too, to say that they are too old.
CHECK_VERSION = import sys; v = sys.version.split()[0]; sys.exit( \
	sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this one is " + v + ": " \
	+ sys.executable + ". Name another: make PYTHON=python3.x, or PY=... for one to use as it is.")

.PHONY: setup demo test docs lint gpu-check

ifdef PY
THERE := $(PY)

setup:
	@$(PY) -c '$(CHECK_VERSION)'
else
PY := .venv/bin/python
READY := .venv/.ready
THERE = $(or $(wildcard $(PY)),$(PYTHON))

setup: $(READY)

# torch comes with the first pip; the second finds detectron2's requirements, torch not among them.
# SAHI, for an example in the tests, without its OpenCV, which would replace the headless one.
$(READY): pyproject.toml tools/install_detectron2.py $(wildcard tools/detectron2_*)
	@$(PYTHON) -c '$(CHECK_VERSION)'
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(PY) -m pip install --editable '.[dev]'
	$(PY) -m pip install --no-deps 'sahi>=0.12'
	$(PY) tools/install_detectron2.py
	@touch $@
endif

demo: setup
	$(PY) tools/demo.py $(DEMO_ARGS)

# An interpreter of the user's may lack pytest-xdist: its tests run on one core.
ALL_CORES = import importlib.util as u; print("-n auto --dist worksteal" if u.find_spec("xdist") else "")

test: setup
	$(PY) -m pytest $$($(PY) -c '$(ALL_CORES)') $(TEST_ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy mask_rcnn_plugin

# Without setup, which may want the internet; the plugin need not be installed either.
gpu-check:
	PYTHONPATH=.:$$PYTHONPATH $(THERE) tools/gpu_check.py $(GPU_CHECK_ARGS)
