# Everything installs into .venv; PYTHON is the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test fuzz test-sanitized test-engines test-browser docs lint format lock audit clean

# Every file is compared with its SHA-256 in dependencies/*.lock. What these need, they hold: nothing else is resolved.
HASHED := -m pip install --quiet --require-hashes --no-deps --no-build-isolation --requirement

# Runtime packages only; sizes measured with a CPU build of torch.
$(VENV)/.runtime: pyproject.toml constraints.txt dependencies/build.lock dependencies/runtime.lock
	@echo "Installing into $(VENV): torch, transformers and niwaki, whose kernels are compiled. With a CPU build of torch"
	@echo "0.26 GB to download, 1.2 GB on disk, about 5 minutes on two cores; a CUDA build is several times larger."
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python $(HASHED) dependencies/build.lock
	$(RUN)/python $(HASHED) dependencies/runtime.lock
	# By version alone: see dependencies/lock.py. A CUDA build brings what it needs, by exact versions.
	$(RUN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(RUN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Packages of tests, linters and the handbook too.
$(VENV)/.installed: $(VENV)/.runtime dependencies/dev.lock
	@echo "Adding the packages of tests, linters and the handbook: about 2.5 GB on disk with the above."
	$(RUN)/python $(HASHED) dependencies/dev.lock
	touch $@

demo: $(VENV)/.runtime
	$(RUN)/niwaki demo --overwrite

# Two processes of one thread each, split by file, so that each fixture is made once.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile -m "not engines and not browser and not fuzz"

# 10,000 mutations of every kind of record: some minutes.
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 -m fuzz tests

# Kernels that report every wrong access to memory (GCC); FUZZ=1 runs the 10,000 mutations instead. Python itself and
# torch are not built so: their leaks do not count.
SANITIZED := build/sanitized
MUTATED := tests/formats tests/model/test_mutated_files.py tests/runtime/contextual/test_mutated_predictors.py \
	tests/kernels/test_sparse_product.py tests/kernels/test_inputs.py
test-sanitized: $(VENV)/.installed
	$(RUN)/cmake -S . -B $(SANITIZED) -DPython_EXECUTABLE=$(CURDIR)/$(RUN)/python -DNIWAKI_SANITIZE=ON
	$(RUN)/cmake --build $(SANITIZED)
	NIWAKI_TEST_KERNELS=$$(ls $(SANITIZED)/_cpu*.so) OMP_NUM_THREADS=1 UBSAN_OPTIONS=print_stacktrace=1 \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	$(RUN)/python -m pytest -m $(if $(FUZZ),fuzz,"not fuzz") $(MUTATED)

# llama-cpp-python is built from source, once: some minutes, and a C++ compiler.
$(VENV)/.engines: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,engines]"
	touch $@

test-engines: $(VENV)/.engines
	$(RUN)/python -m pytest -m engines

# Generated parts of the handbook, then the site in ./site, which opens without a server.
docs: $(VENV)/.installed
	$(RUN)/python docs/generate.py
	$(RUN)/python -m mkdocs build --strict

# Needs Chromium, which pip cannot install: on Debian, apt-get install chromium.
$(VENV)/.browser: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,browser]"
	touch $@

test-browser: $(VENV)/.browser
	$(RUN)/python -m pytest -m browser tests/measure/report tests/rollout

lint: $(VENV)/.installed
	$(RUN)/ruff check src tests benchmarks docs dependencies
	$(RUN)/ruff format --check src tests docs dependencies
	$(RUN)/mypy

format: $(VENV)/.installed
	$(RUN)/ruff check --fix src tests benchmarks docs dependencies
	$(RUN)/ruff format src tests docs dependencies

# Needs PyPI. Changed ranges in pyproject.toml or versions in constraints.txt ask for it.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet "uv==0.13.9"
	build/lock/bin/python dependencies/lock.py

# Versions against the advisories in dependencies/advisories.json, without a network.
audit: $(VENV)/.installed
	$(RUN)/python dependencies/audit.py

clean:
	rm -rf $(VENV) site niwaki-demo niwaki-demo-*.jsonl
