# The commands of the README. Each makes .venv first.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.bench-installed
WHEEL_VENV := build/wheels
WHEEL_STAMP := $(WHEEL_VENV)/.installed
TARGET ?= jetpack6
# make bench BUNDLE=runs/a CALIBRATION=faces.csv
BUNDLE ?= engines/resnet18-68
EXPORTED = out/$(notdir $(patsubst %/,%,$(BUNDLE)))
ASTRONAUT = $$($(BIN)/python -c "import skimage, pathlib; print(pathlib.Path(skimage.__file__).parent / 'data' / 'astronaut.png')")

.PHONY: fuzz demo test test-pythons test-aarch64 bench wheels wheelhouse check clean

demo: $(STAMP)
	$(BIN)/kp export engines/resnet18-68 --fp16 --out out/resnet18-68
	$(BIN)/kp predict "$(ASTRONAUT)" --model out/resnet18-68 --out out --drawn out/demo.jpg --times

# its files are shared out to two processes
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# int8 files need labelled faces; one that is there already, of the same weights, is kept by the export
bench: $(BENCH_STAMP)
	$(BIN)/kp export $(BUNDLE) --fp16 $(if $(CALIBRATION),--int8 $(addprefix --calibration ,$(CALIBRATION))) --engine never --out $(EXPORTED)
	@test -f $(EXPORTED)/model.int8.onnx || echo "no int8 file: it is left out; make bench CALIBRATION=faces.csv makes one"
	$(BIN)/python -m benchmarks.compare_engines --bundle $(EXPORTED)
	$(BIN)/python -m benchmarks.profile_batches --bundle $(EXPORTED)
	$(BIN)/python -m benchmarks.start --bundle $(EXPORTED)
	$(BIN)/python -m benchmarks.crop_path
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.scale

# on a machine with a CUDA GPU; what can't run there is listed with its reason
.PHONY: bench-gpu
bench-gpu: $(BENCH_STAMP)
	$(BIN)/kp export $(BUNDLE) --fp16 --engine never --out $(EXPORTED)
	-$(BIN)/kp plan $(EXPORTED) --precision fp16 --max-batch 256
	$(BIN)/python -m benchmarks.gpu --bundle $(EXPORTED)
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.scale

# the run-time on every Python from 3.10 to 3.14 that is here, with the oldest and the newest packages
test-pythons: $(STAMP)
	$(BIN)/nox

# the run-time on emulated aarch64; the default model's keypoints too, or BUNDLE's
test-aarch64: $(STAMP)
	PYTHON=$(BIN)/python scripts/test-aarch64 $(BUNDLE)

# a real NVIDIA Triton on this CPU, with the python backend alone; its Python needs an environment with numpy 1
TRITON_VENV := build/triton
TRITON_STAMP := $(TRITON_VENV)/.installed
.PHONY: test-triton
test-triton: $(TRITON_STAMP)
	KP_ASTRONAUT="$(ASTRONAUT)" KP_NUMPY_2="$(abspath $(VENV))" $(TRITON_VENV)/bin/python -m pytest tests/test_triton_server.py

$(TRITON_STAMP): pyproject.toml | $(STAMP)
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(TRITON_VENV)
	$(BIN)/uv pip install --quiet --python $(TRITON_VENV)/bin/python --editable ".[image,ort]" "numpy<2" onnx pytest \
		nvidia-pytriton==0.7.0 "tritonclient[http,grpc]"
	touch $@

# very many photos on a real Ray of this machine, some of whose processes are killed
RAY_VENV := build/ray
RAY_STAMP := $(RAY_VENV)/.installed
.PHONY: test-ray
test-ray: $(RAY_STAMP)
	$(RAY_VENV)/bin/python -m pytest tests/test_ray_batches.py

$(RAY_STAMP): pyproject.toml | $(STAMP)
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(RAY_VENV)
	$(BIN)/uv pip install --quiet --python $(RAY_VENV)/bin/python --editable ".[image,ort,cli,ray]" onnx pytest
	touch $@

# the wheels of the project and of its default model; torch is not needed
wheels: $(WHEEL_STAMP)
	PYTHONPATH=. $(WHEEL_VENV)/bin/python scripts/wheels.py --out dist

# all that a Jetson without internet installs: make wheelhouse TARGET=jetpack7
wheelhouse: $(WHEEL_STAMP)
	PYTHONPATH=. $(WHEEL_VENV)/bin/python scripts/wheelhouse.py --target $(TARGET) --out dist/$(TARGET)

# damaged and hostile files for everything that reads them; make fuzz CASES=1000 SEED=5
CASES ?= 100000
SEED ?= 0
fuzz: $(STAMP)
	$(BIN)/python scripts/fuzz.py --cases $(CASES) --seed $(SEED)

# load, infer, unload, over and over; make soak MINUTES=60 INFERENCES=0
MINUTES ?= 10
INFERENCES ?= 1000000
.PHONY: soak nightly
soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak --bundle engines/resnet18-68-lite --minutes $(MINUTES) --inferences $(INFERENCES)

# what takes too long for every change: hostile files, a soak, every Python and both ends of the packages' bounds
nightly: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" MINUTES=$(MINUTES) scripts/nightly

check: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

# the site of docs/, in build/site; docs-serve shows it at http://localhost:8000 and follows changes
.PHONY: docs docs-serve
docs: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/docs

docs-serve: $(STAMP)
	$(BIN)/zensical serve

$(STAMP): pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	touch $@

$(WHEEL_STAMP):
	python3 -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet "setuptools>=77" "uv>=0.6"
	touch $@

clean:
	rm -rf $(VENV) out runs build dist *.egg-info
