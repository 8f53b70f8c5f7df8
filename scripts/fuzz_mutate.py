"""Damage: valid bytes, texts and JSON documents, changed a little or made hostile."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

__all__ = ["hostile_number", "hostile_value", "mutated_bytes", "mutated_document", "mutated_json", "mutated_text"]

_INTEGERS = (
    0, 1, -1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, -(2**63),
)  # fmt: skip
_FLOATS = (0.0, -0.0, 0.5, 1e-320, 1e-30, 1e30, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "", " ", "0", "nan", "a" * 5000, "a\0b", "\n", "../x", "..", "/etc/passwd", "C:\\x", "a\\b", "a/b", "\ud800",
    "\u202eexe", "%s%n", "{0}", "<script>", "manifest.json", "1e999", "-1", "é" * 300, "1.2.3", "x.y",
)  # fmt: skip


def hostile_number(rng: random.Random) -> float:
    """A number that is seldom expected."""
    return rng.choice(_INTEGERS if rng.random() < 0.5 else _FLOATS) if rng.random() < 0.8 else rng.uniform(-1e4, 1e4)


def hostile_value(rng: random.Random) -> Any:
    """A value of any JSON type."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2):
        return hostile_number(rng)
    if kind in (3, 4):
        return rng.choice(_TEXTS)
    if kind == 5:
        return rng.choice(([], {}, [[]], [None] * 1000, {"": None}, [1.5] * 50))
    if kind == 6:
        deep: Any = 0
        for _ in range(rng.choice((5, 31, 40, 200))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return 10 ** rng.choice((20, 400, 4000))


def mutated_json(rng: random.Random, document: Any) -> Any:
    """A copy with one to three values replaced, removed, renamed, doubled or swapped."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        owners = [value for value in _containers(document) if value]
        if not owners:
            return hostile_value(rng)
        owner = rng.choice(owners)
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        key = rng.choice(keys)
        action = rng.randrange(6)
        if action <= 2:
            owner[key] = hostile_value(rng)
        elif action == 3:
            del owner[key]
        elif action == 4 and isinstance(owner, dict):
            owner[str(rng.choice(_TEXTS))] = owner.pop(key)
        else:
            owner[key] = copy.deepcopy(owner[rng.choice(keys)])
    return document


def mutated_document(rng: random.Random, document: Any) -> bytes:
    """A JSON file's bytes: mostly damaged in its values, sometimes in its text."""
    text = json.dumps(mutated_json(rng, document) if rng.random() < 0.8 else document).encode()
    if rng.random() < 0.02:
        depth = rng.choice((100, 10_000, 200_000))
        return text.replace(b"1", b"[" * depth, 1) + b"]" * rng.choice((0, depth))
    if rng.random() < 0.02:
        return text.replace(b"1", b"9" * rng.choice((5, 400, 5000, 100_000)), 1)
    return mutated_bytes(rng, text) if rng.random() < 0.2 else text


def mutated_text(rng: random.Random, text: str, separators: str) -> bytes:
    """A text file's bytes with some words replaced by hostile ones, lost, doubled, or cut."""
    separator = rng.choice(separators)
    words = text.split(separator)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(words))
        action = rng.randrange(5)
        if action <= 1:
            words[at] = str(hostile_value(rng))[:5000]
        elif action == 2:
            del words[at]
        elif action == 3:
            words[at:at] = words[at : at + rng.choice((1, 10, 100))] * rng.choice((1, 10))
        else:
            words[at] = ""
        words = words or [""]
    data = separator.join(words).encode("utf-8", "surrogatepass")
    return mutated_bytes(rng, data) if rng.random() < 0.2 else data


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four flips, cuts, insertions, doublings, or numbers overwritten."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((1, 2, 4, 8, 64, 500))
        action = rng.randrange(8)
        if action <= 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            del out[at:]
        elif action == 3:
            del out[at : at + length]
        elif action == 4:
            out[at:at] = rng.randbytes(length)
        elif action == 5:
            out[at:at] = out[at : at + length]
        elif action == 6:
            out[at : at + length] = bytes([rng.choice((0, 0xFF, 0x7F, 0x80))]) * length
        else:
            size = rng.choice((2, 4, 8))
            number = int(rng.choice(_INTEGERS)) % (1 << 8 * size)
            out[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(out)


def _containers(value: Any) -> list[Any]:
    """All dicts and lists of a document, each as often as its depth is small."""
    found, level = [], [value]
    while level:
        level = [v for v in level if isinstance(v, (dict, list))]
        found += level[:200]
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return found
