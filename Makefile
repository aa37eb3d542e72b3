# The course's commands. `make book` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SITE := _build/html
PORT ?= 8000

.PHONY: help book test mutants run lab serve clean repository environment

help:
	@echo "make book                   build the site into $(SITE)"
	@echo "make test                   run every check"
	@echo "make mutants                plant faults in nflib and see which its tests find (ONLY=nflib.linear for one module)"
	@echo "make run                    re-execute the chapters whose code changed (CHAPTER=03 for one, ALL=1 for all)"
	@echo "make lab                    open the chapters in JupyterLab"
	@echo "make serve                  build the site and serve it at http://localhost:$(PORT)"
	@echo "make repository URL=...     write another repository address everywhere"
	@echo "make clean                  remove what was built (the environment stays; 'make clean ALL=1' removes it too)"

# Does nothing where requirements.txt and pyproject.toml are the ones installed.
environment:
	@$(PYTHON) tools/environment.py $(VENV)

book: environment
	@$(BIN)/python tools/build.py
	@echo "The site stands in $(SITE): open file://$(CURDIR)/$(SITE)/index.html, or run 'make serve'."

test: environment
	@$(BIN)/python tools/test.py $(STAGE)

mutants: environment
	@$(BIN)/python tools/mutants.py $(if $(ONLY),--only $(ONLY)) $(if $(ALL),--all)

run: environment
	@$(BIN)/python tools/notebooks.py run $(if $(CHAPTER),--chapter $(CHAPTER)) $(if $(ALL),--all)

lab: environment
	@$(BIN)/jupyter lab chapters $(if $(filter 0,$(shell id -u)),--allow-root)

serve: book
	@echo "Serving http://localhost:$(PORT) (Ctrl+C stops it)."
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory $(SITE)

repository: environment
	@$(BIN)/python tools/repository.py $(URL)

clean:
	@rm -rf _build build nflib.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find nflib tests tools chapters -name __pycache__ -prune -exec rm -rf {} +
	@find chapters -name .ipynb_checkpoints -prune -exec rm -rf {} +
	@$(if $(ALL),rm -rf $(VENV))
