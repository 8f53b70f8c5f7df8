"""The cards of the shipped models say what their manifests say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kp_runtime.manifest import Manifest
from scripts import model_card

BUNDLES = sorted(path.parent for path in (Path(__file__).resolve().parents[1] / "engines").glob("*/parity.json"))


@pytest.mark.parametrize("bundle", BUNDLES, ids=[bundle.name for bundle in BUNDLES])
def test_the_card_s_tables_are_the_manifest_s(bundle: Path) -> None:
    text = (bundle / model_card.CARD).read_text(encoding="utf-8")
    parity = json.loads((bundle / "parity.json").read_text(encoding="utf-8"))
    assert text == model_card.filled(text, Manifest.read(bundle), parity), (
        "run: python -m scripts.model_card engines/resnet*"
    )
