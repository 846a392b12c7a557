# Runs from a fresh clone with cargo, a C and C++ toolchain, and python3 with pip.
#
#   make demo          fetch a small model, quantize it to 3 bits, look at the file, generate text
#                      with it; MODEL=gemma or MODEL=qwen takes another
#   make test          set up what the tests need and run them all
#   make test-real     convert a real model of each kind (half an hour)
#   make test-engines  check exported files in llama.cpp, which it builds first (twenty minutes)
#   make gpu-check     build the program that tests and measures on a GPU
#   make ci            what a change must pass: formatting, lints, docs, tests

MODEL    := smollm2
# The files that scripts/fetch-model makes.
smollm2  := target/models/smollm2-135m-instruct.gguf
gemma    := target/models/gemma-3-270m.gguf
qwen     := target/models/qwen2.5-coder-0.5b-instruct.gguf
qwen-1.5b := target/models/qwen2.5-coder-1.5b-instruct.gguf
SOURCE   := $(or $($(MODEL)),$(error no model `$(MODEL)`: scripts/fetch-model lists them))
DEMO     := target/demo/$(MODEL)-3bit.slim.gguf
PEER     := target/peers/llama.slim.gguf
VENV     := target/venv
PYTHON   := $(VENV)/bin/python
GGUF     := gguf==0.19.0
ONNX     := onnx==1.23.2 onnxruntime==1.32.0 safetensors==0.8.0
# Tiny models, of each family one, that ONNX Runtime runs.
ONNX_MODELS := llama llama-tied-rope3 mistral-swa qwen2 qwen3 gemma2 gemma3 phi3 ministral3 smollm3 \
    olmo3 granite glm4 opt
# The package's shared library, whose name ends with the version.
ORT_IN_VENV := site-packages/onnxruntime/capi/libonnxruntime.so.*
RELEASE  := $(or $(CARGO_TARGET_DIR),target)/release
SLIMLLM  := $(RELEASE)/slimllm
DEBUG    := $(or $(CARGO_TARGET_DIR),target)/debug
EMULATOR := $(CURDIR)/target/cuda-emulator
# A text to calibrate tiny models on: the built-in one, 18 times as long, takes longer to tokenize
# than they take to convert.
TEXT     := converter/data/alice.txt

.PHONY: demo test test-product test-cuda test-peers test-onnx test-real test-engines gpu-check ci
.NOTPARALLEL:

demo: $(SOURCE)
	cargo build --release
	mkdir -p $(dir $(DEMO))
	$(SLIMLLM) convert $(SOURCE) -o $(DEMO) --force --bits 3 --samples 32 --context 512
	$(SLIMLLM) inspect $(DEMO)
	$(SLIMLLM) run $(DEMO) -p "Once upon a time" -n 40 --temperature 0

test: test-product test-cuda test-peers test-onnx

test-product: $(smollm2) $(VENV)/ready $(VENV)/onnx
	SLIMLLM_TEST_MODEL="$(CURDIR)/$(smollm2)" SLIMLLM_PYTHON="$(CURDIR)/$(PYTHON)" \
	    SLIMLLM_TEST_ONNXRUNTIME="$$(echo "$(CURDIR)"/$(VENV)/lib/python3*/$(ORT_IN_VENV))" cargo test

# What else runs is built with the features that the dependencies of tests have: `--test it` turns
# them on. Without it, and for a package by itself, `cargo` would compile nearly all once more.
BUILD    := cargo build --quiet --test it

# The CUDA kernels and all that calls them, on an emulated driver: no GPU is needed.
test-cuda: export LD_LIBRARY_PATH := $(EMULATOR)
test-cuda: export SLIMLLM_TEST_CUDA := 1
test-cuda:
	scripts/cuda-emulator
	cargo test --lib --test it -- cuda on_a_device
	$(BUILD) --workspace --exclude slim-peers --bin gpu-check
	$(DEBUG)/gpu-check --smoke
	SLIMLLM_CUDA_RING=0 $(DEBUG)/gpu-check --smoke --parity

# One program that tests and measures the CUDA kernels on a machine with a GPU, which needs nothing
# but the driver.
gpu-check:
	cargo build --release --package slim-gpu-check
	strip $(RELEASE)/gpu-check
	@ls -l $(RELEASE)/gpu-check

# Two GGUF readers that are not ours must find in a SliM file what `inspect` says.
test-peers: $(VENV)/ready
	mkdir -p $(dir $(PEER))
	$(BUILD) --bin slimllm
	$(DEBUG)/slimllm convert tests/data/archs/llama -o $(PEER) --force \
	    --bits 3 --group-size 32 --samples 4 --context 64 --calibration $(TEXT)
	$(DEBUG)/slimllm inspect $(PEER) --json --metadata > $(PEER).json
	$(PYTHON) tests/peers/read_with_gguf.py $(PEER) $(PEER).json
	SLIMLLM_PEER_FILE="$(CURDIR)/$(PEER)" SLIMLLM_PEER_JSON="$(CURDIR)/$(PEER).json" \
	    cargo test --package slim-peers

# ONNX Runtime must find in an exported folder the logits that we find in the original.
test-onnx: $(VENV)/onnx
	mkdir -p target/onnx
	seq 0 255 > target/onnx/tokens
	$(BUILD) --bin slimllm
	for name in $(ONNX_MODELS); do \
	    rm -rf target/onnx/$$name && \
	    $(DEBUG)/slimllm convert tests/data/archs/$$name -o target/onnx/$$name.slim.gguf --force \
	        --bits 3 --group-size 32 --samples 4 --context 64 --calibration $(TEXT) --quiet && \
	    $(DEBUG)/slimllm export target/onnx/$$name.slim.gguf --to onnx -o target/onnx/$$name --quiet && \
	    $(PYTHON) scripts/check-onnx-export target/onnx/$$name target/onnx/$$name.slim.gguf \
	        --tokens target/onnx/tokens --context 128 --tolerance 0.02 --slimllm $(DEBUG)/slimllm || exit 1; \
	done

# What tiny random models cannot show. Not part of `test`: it takes half an hour.
test-real:
	cargo build --release
	scripts/test-real

# An engine that is not ours must find in an exported file what we find in the original. Not part of
# `test`: llama.cpp takes long to build.
test-engines: $(smollm2) $(VENV)/ready
	scripts/llama-cpp
	cargo build --release
	$(PYTHON) scripts/check-export

ci:
	.ci/run

$(smollm2):
	scripts/fetch-model smollm2

$(gemma):
	scripts/fetch-model gemma

$(qwen):
	scripts/fetch-model qwen

$(qwen-1.5b):
	scripts/fetch-model qwen-1.5b

# Without its own pip, so that Debian's python3 without python3-venv is enough.
$(VENV)/ready:
	python3 -m venv --clear --without-pip $(VENV)
	python3 -m pip --python $(PYTHON) install --quiet $(GGUF)
	touch $@

$(VENV)/onnx: $(VENV)/ready
	python3 -m pip --python $(PYTHON) install --quiet $(ONNX)
	touch $@
