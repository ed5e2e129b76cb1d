# Needs Python >= 3.11 with venv, make and git; all else goes into .venv. UV=1 installs with uv, if it is there.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
RUN := $(VENV)/bin/python
CANDIDATES := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11
LOG := $(VENV)/install.log
# pip reads [dependency-groups] from 25.1 on only.
READ_GROUPS := import tomllib; groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; \
	print(*(line for group in groups.values() for line in group), sep="\n")

.PHONY: help
help: ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: check
check: $(VENV)/.ready ## format, lint, types and import floors (seconds)
	@failed=; \
	$(RUN) -m ruff format --check --quiet . || { echo "run: $(RUN) -m ruff format ."; failed=yes; }; \
	$(RUN) -m ruff check --quiet . || failed=yes; \
	$(RUN) -m mypy || failed=yes; \
	$(RUN) -m pytest -q -p no:randomly tests/unit/test_floors.py || failed=yes; \
	[ -z "$$failed" ]

.PHONY: test
test: $(VENV)/.ready ## every test, in parallel; starts the servers it needs (ARGS="-k name" narrows, in one process)
	@$(RUN) -m pytest $(or $(ARGS),-n auto --dist worksteal)

.PHONY: faults
faults: $(VENV)/.ready ## minutes of faults on 8 processes, and every mutant (ARGS="--minutes 2 --seed 7 --processes 8")
	@$(RUN) -m tests.faults $(ARGS)

.PHONY: demo
demo: $(VENV)/.ready ## two workers, one embedded server, one table; exits 0
	@$(RUN) -m example_worker.demo $(ARGS)

.PHONY: bench
bench: $(VENV)/.ready ## measure this machine and print what it shows (ARGS=experiments, staleness, fanout, tracking, wakeup, peers)
	@$(RUN) -m tests.benchmarks $(ARGS)

.PHONY: clean
clean: ## remove .venv and everything that was generated
	@rm -rf $(VENV) build dist .demo .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	@find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +

# A candidate is run, not just looked up: a pyenv shim can exist for a Python that is not there.
$(VENV)/.ready: pyproject.toml Makefile
	@set -eu; \
	usable() { "$$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	has_pip() { "$$1" -c 'import ensurepip' >/dev/null 2>&1; }; \
	uv=; if [ -n "$(UV)" ]; then uv=$$(command -v uv || true); [ -n "$$uv" ] || echo "no uv here: using pip"; fi; \
	python=; bare=; \
	for each in $(CANDIDATES); do \
	  usable "$$each" || continue; \
	  if has_pip "$$each"; then python=$$each; break; fi; \
	  bare=$${bare:-$$each}; \
	done; \
	if [ -z "$$python" ] && [ -n "$$uv" ]; then python=$$bare; fi; \
	if [ -z "$$python" ] && [ -n "$$bare" ]; then \
	  version=$$("$$bare" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "$$bare cannot make virtual environments: its venv package is missing. On Debian or Ubuntu:"; \
	  echo "    apt install python3-venv      (or python$$version-venv)"; exit 1; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "No Python >= 3.11 works here (tried: $(CANDIDATES)). On Debian or Ubuntu:"; \
	  echo "    apt install python3 python3-venv"; \
	  echo "or name one:  make PYTHON=/path/to/python3"; exit 1; \
	fi; \
	usable $(RUN) || rm -rf $(VENV); \
	mkdir -p $(VENV); \
	"$$python" -c '$(READ_GROUPS)' > $(VENV)/groups.txt; \
	with_uv() { \
	  { usable $(RUN) || "$$uv" venv --allow-existing --python "$$python" $(VENV); } \
	  && "$$uv" pip install --python $(RUN) -e '.[demo]' -r $(VENV)/groups.txt; \
	}; \
	with_pip() { \
	  { $(RUN) -m pip --version || "$$python" -m venv $(VENV); } \
	  && $(RUN) -m pip install --disable-pip-version-check -e '.[demo]' -r $(VENV)/groups.txt; \
	}; \
	echo "installing into $(VENV) with $$("$$python" --version) (half a minute the first time) ..."; \
	: > $(LOG); is_done=; \
	if [ -n "$$uv" ]; then with_uv >> $(LOG) 2>&1 && is_done=yes || echo "uv failed (see $(LOG)): using pip"; fi; \
	[ -n "$$is_done" ] || with_pip >> $(LOG) 2>&1 || { cat $(LOG); echo "installing failed; the log above is $(LOG)"; exit 1; }; \
	touch $@
