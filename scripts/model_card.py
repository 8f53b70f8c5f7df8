"""Fills a model card's tables from the bundle's manifest and parity report.

    python -m scripts.model_card engines/resnet18-68 …

What stands between the two markers of MODEL_CARD.md is made; the text around them is written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.command import markdown_table, with_made_part
from kp_cli.report import one_line_errors
from kp_runtime.files import write_file
from kp_runtime.manifest import Manifest

CARD = "MODEL_CARD.md"
BEGIN = "<!-- begin: made by scripts/model_card.py -->"
END = "<!-- end: made by scripts/model_card.py -->"
REGIONS = ("jaw", "brows", "nose", "eyes", "mouth")


def filled(text: str, manifest: Manifest, parity: list[dict[str, Any]]) -> str:
    """The card's text with new tables.

    Raises:
        InputError: the text lacks the markers.
    """
    tables = [*_accuracy(manifest), *_groups(manifest), *_robustness(manifest), *_parity(parity), *_sources(manifest)]
    return with_made_part(text, BEGIN, END, "\n\n".join(tables))


def _accuracy(manifest: Manifest) -> Iterator[str]:
    columns = ["faces", "number", "missed by the detector", "NME", "median", "95%", "AUC at 8%", "failures over 8%",
               "SmoothL1 as the original", *REGIONS]  # fmt: skip
    rows = []
    for name, a in manifest.accuracy.items():
        nme, interval = f"{a['nme']:.2%}", a.get("nme_interval")
        share = [nme + " ({:.2f} to {:.2f})".format(*(100 * end for end in interval)) if interval else nme]
        share += [f"{a[key]:.2%}" for key in ("median", "p95")]
        rest = [f"{a['auc']:.3f}", f"{a['failures']:.2%}", f"{a['smooth_l1']:.5f}"]
        regions = [f"{a['regions'][region]:.2%}" for region in REGIONS]
        rows.append([name, a["faces"], a["missed"], *share, *rest, *regions])
    yield markdown_table(columns, rows)


def _groups(manifest: Manifest) -> Iterator[str]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    names = [name for name, a in manifest.accuracy.items() if "groups" in a and "held-out people" not in name]
    for name in names:
        for g in manifest.accuracy[name]["groups"]:
            span = f"{g['low']:g} or more" if g["high"] is None else f"{g['low']:g} to {g['high']:g}"
            found.setdefault((g["by"], span), {})[name] = f"{g['nme']:.2%} ({g['faces']})"
    if found:
        yield "By size and turn: NME, and how many faces. The turn is 0 for a frontal face, 1 for a profile."
        yield markdown_table(
            ["", "", *names], [[*key, *(cells.get(name, "") for name in names)] for key, cells in found.items()]
        )


def _robustness(manifest: Manifest) -> Iterator[str]:
    rows = []
    for name, a in manifest.accuracy.items():
        if steady := a.get("robustness"):
            rise = (steady["jitter_nme"] - steady["nme"]) * 100
            enlarged = [f"{steady['enlarged'][key]:.2%}" for key in steady["enlarged"]]
            rows.append([name, f"{rise:+.2f} points", *enlarged, f"{steady['mirrored']:.2%}"])
    if rows:
        yield (
            "Shown otherwise: how far the NME rises with boxes 10% off in place and size, and how far points move, in "
            "eye distances, when the photo is enlarged or mirrored."
        )
        yield markdown_table(["faces", "boxes 10% off", "2 times", "4 times", "8 times", "mirrored"], rows)


def _parity(parity: list[dict[str, Any]]) -> Iterator[str]:
    if parity:
        rows = [
            [
                f"`{p['file']}`",
                p["origin"],
                p["faces"],
                *(f"{p[key]:.3f}" for key in ("p50_px", "p99_px", "max_px")),
                "" if p["rise"] is None else f"{p['rise']:+.3f}",
                "" if p.get("score") is None else f"{p['score']:.4f}",
            ]
            for p in parity
        ]
        yield (
            "How far the files are from PyTorch: in pixels of the crop, the rise of the NME in points, the farthest "
            "lost score:"
        )
        yield markdown_table(["file", "faces", "number", "p50 px", "p99 px", "max px", "rise", "score"], rows)


def _sources(manifest: Manifest) -> Iterator[str]:
    rows = [
        [f"`{s['name']}`", s["faces"], s["trained_on"], f"{s['weight']:g}", f"`{s['sha256'][:16]}…`"]
        for s in manifest.training["sources"]
    ]
    yield "What the last run was trained on:"
    yield markdown_table(["source", "faces", "trained on", "weight", "sha256 of its labels"], rows)


def main() -> None:
    """Fills the cards of the bundles that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    for bundle in parser.parse_args().bundles:
        report = bundle / "parity.json"
        parity = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
        card = bundle / CARD
        text = filled(card.read_text(encoding="utf-8"), Manifest.read(bundle), parity)
        write_file(card, text)


if __name__ == "__main__":
    with one_line_errors("model_card"):
        main()
