# The two commands of the README: make demo, make test. Both make .venv first.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ASTRONAUT = $$($(BIN)/python -c "import skimage, pathlib; print(pathlib.Path(skimage.__file__).parent / 'data' / 'astronaut.png')")

.PHONY: demo test check clean

demo: $(STAMP)
	$(BIN)/kp export engines/resnet18-68 --fp16 --out out/resnet18-68
	$(BIN)/kp predict "$(ASTRONAUT)" --model out/resnet18-68 --out out --drawn out/demo.jpg --times

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

$(STAMP): pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out runs build *.egg-info
