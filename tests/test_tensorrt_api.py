"""Every TensorRT name and call in the project's code exists in the real bindings of 10.3.0 and 11.4.0.

The code is read, not run: names are followed from the module (`trt`) through classes, calls and
assignments; the classes of function arguments are told by their names (`SEEDS`). The names of the
bindings are those committed in tests/data, which a test compares with the real ones.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.real_tensorrt import ROOT, WHEELS, UnavailableError, committed_listing, real_listing
from tests.tensorrt_double import tensorrt_double

MODULE = "tensorrt"
SEEDS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "trt": MODULE,
    "tensorrt": MODULE,
}
"""What a name means in a file that uses TensorRT, unless an assignment says another."""


@dataclass(frozen=True)
class Use:
    """One use of a name: `owner` is the module, a class or an enum; `arguments` is None but for calls."""

    where: str
    owner: str
    name: str
    arguments: tuple[str | None, ...] | None = None
    defines: bool = False


class Reader(ast.NodeVisitor):
    """Collects the uses of TensorRT in one file."""

    def __init__(self, file: str, listing: dict[str, Any]) -> None:
        self.file, self.listing = file, listing
        self.known = dict(SEEDS)
        self.uses: set[Use] = set()
        self.asked: set[str] = set()

    def kind(self, node: ast.expr | None) -> str | None:
        """The class whose object an expression is; `type:X` for the class X itself."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.kind(node.value)
            if owner is None:
                return self.known.get(node.attr.lstrip("_"))
            return f"type:{node.attr}" if owner == MODULE and node.attr[0].isupper() else None
        if isinstance(node, ast.Call):
            called = self.kind(node.func)
            if called is not None and called.startswith("type:"):
                return called.removeprefix("type:")
            if isinstance(node.func, ast.Attribute):
                return self.returned(self.kind(node.func.value), node.func.attr)
        return None

    def returned(self, owner: str | None, method: str) -> str | None:
        for signature in self.listing["classes"].get(owner, {}).get(method, ()):
            result = signature.rpartition("-> ")[2]
            if result in self.listing["classes"]:
                return str(result)
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        found = self.kind(node.value)
        for target in node.targets:
            name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "").lstrip("_")
            if found is not None and name and not found.startswith("type:"):
                self.known[name] = found
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            owner = self.kind(base)
            if owner is not None and owner.startswith("type:"):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        names = tuple(argument.arg for argument in method.args.args[1:])
                        self.add(method, owner.removeprefix("type:"), method.name, names, defines=True)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        arguments = (*(None for _ in node.args), *(keyword.arg for keyword in node.keywords))
        if isinstance(node.func, ast.Name) and node.func.id == "hasattr" and isinstance(node.args[1], ast.Constant):
            self.asked.add(str(node.args[1].value))
        if not any(isinstance(argument, ast.Starred) for argument in node.args):
            called = self.kind(node.func)
            if called is not None and called.startswith("type:"):
                self.add(node, called.removeprefix("type:"), "__init__", arguments)
            elif isinstance(node.func, ast.Attribute) and (owner := self.kind(node.func.value)) is not None:
                unbound = owner.startswith("type:")  # as in `trt.ILogger.__init__(self)`
                self.add(node, owner.removeprefix("type:"), node.func.attr, arguments[unbound:])
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.kind(node.value)
        if owner is not None and not node.attr.startswith("__"):
            self.add(node, owner.removeprefix("type:"), node.attr)
        self.generic_visit(node)

    def add(
        self, node: ast.stmt | ast.expr, owner: str, name: str, arguments: Any = None, defines: bool = False
    ) -> None:
        self.uses.add(Use(f"{self.file}:{node.lineno}", owner, name, arguments, defines))


def problem(use: Use, listing: dict[str, Any]) -> str | None:
    """What a version of the bindings has against a use."""
    what = f"{use.where}: {use.owner}.{use.name}"
    if use.owner == MODULE:
        return None if use.name in listing["names"] else f"{what} does not exist"
    if use.owner in listing["enums"]:
        return None if use.name in listing["enums"][use.owner] or use.arguments else f"{what} does not exist"
    members = listing["classes"].get(use.owner)
    if members is None:
        return f"{what}: this class is not in CLASSES or ENUMS of tests/real_tensorrt.py; add it"
    if use.name not in members:
        return f"{what} does not exist"
    if use.arguments is None or not members[use.name]:
        return None
    signatures = [signature.rpartition("->")[0].strip() for signature in members[use.name]]
    if not any(fits(use, [part for part in text.split(", ") if part]) for text in signatures):
        return f"{what}({use.arguments}) fits none of {signatures}"
    return None


def fits(use: Use, parameters: list[str]) -> bool:
    names = [parameter.rstrip("?") for parameter in parameters]
    arguments = use.arguments or ()
    if use.defines:
        return list(arguments) == names
    positional = sum(argument is None for argument in arguments)
    keywords = {argument for argument in arguments if argument is not None}
    needed = {parameter for parameter in parameters[positional:] if not parameter.endswith("?")}
    return positional <= len(names) and keywords <= set(names[positional:]) and needed <= keywords


def read(source: str, file: str, listing: dict[str, Any]) -> Reader:
    reader = Reader(file, listing)
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    if names & {"trt", "tensorrt"}:
        for _ in range(3):  # until what is assigned late is known early
            reader.uses.clear()
            reader.visit(tree)
    return reader


def problems_in(source: str, version: str, file: str = "code.py") -> list[str]:
    listing = committed_listing(version)
    reader = read(source, file, listing)
    checked = [(use, problem(use, listing)) for use in sorted(reader.uses, key=str)]
    return list(dict.fromkeys(text for use, text in checked if text is not None and use.name not in reader.asked))


def project_files() -> list[Path]:
    packages = ("kp_runtime", "kp_train", "kp_export", "kp_cli")
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("version", WHEELS)
def test_names_in_the_project_exist(version: str) -> None:
    found = [
        text
        for path in project_files()
        for text in problems_in(path.read_text(encoding="utf-8"), version, str(path.relative_to(ROOT)))
    ]
    assert not found, "\n".join(found)


def test_the_reader_finds_what_the_builder_uses() -> None:
    source = (ROOT / "kp_export" / "plan_builder.py").read_text(encoding="utf-8")
    uses = {(use.owner, use.name) for use in read(source, "plan_builder.py", committed_listing("10.3.0")).uses}
    assert uses >= {
        ("tensorrt", "Builder"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("BuilderFlag", "TF32"),
        ("Builder", "build_serialized_network"),
        ("Builder", "num_DLA_cores"),
        ("IBuilderConfig", "set_timing_cache"),
        ("IBuilderConfig", "profiling_verbosity"),
        ("IOptimizationProfile", "set_shape"),
        ("ITimingCache", "serialize"),
        ("ITensor", "shape"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "create_engine_inspector"),
        ("IExecutionContext", "set_input_shape"),
        ("EngineInspector", "execution_context"),
    }


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", 0, 1),
        ("trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE", 1, 0),
        ("builder = trt.Builder(logger)\nbuilder.platform_has_fast_fp16", 0, 1),
        ("b = trt.Builder(logger)\nn = b.create_network(flags=1)\nn.nothing()", 1, 1),
        ("trt.Builder()", 1, 1),
        ("b = trt.Builder(logger=1)\nb.create_network(0, 1)", 1, 1),
        ("b = trt.Builder(1)\nb.build_serialized_network(network=1, konfig=2)", 1, 1),
        ("class L(trt.ILogger):\n    def log(self, level, msg): ...", 1, 1),
        ("engine.device_memory_size\nprint(trt)", 0, 1),
        ("if hasattr(engine, 'device_memory_size'):\n    engine.device_memory_size\nprint(trt)", 0, 0),
        ("trt.Nothing", 1, 1),
        ("config.anything", 0, 0),
    ],
)
def test_the_reader_finds_what_is_wrong(code: str, old: int, new: int) -> None:
    assert [len(problems_in(code, version)) for version in WHEELS] == [old, new]


@pytest.mark.parametrize("version", WHEELS)
def test_committed_names_are_the_real_bindings_names(version: str) -> None:
    try:
        real = real_listing(version)
    except UnavailableError as error:
        pytest.skip(f"the real bindings of TensorRT {version} can't be had here: {error}")
    assert real == committed_listing(version), "run: python -m tests.real_tensorrt"


def plays(taken: list[str], signature: str) -> bool:
    """Whether the double's arguments are the real ones, but for some at the end that may be left out."""
    real = [part for part in signature.rpartition("->")[0].strip().split(", ") if part]
    return taken == [part.rstrip("?") for part in real[: len(taken)]] and all(
        p.endswith("?") for p in real[len(taken) :]
    )


@pytest.mark.parametrize("version", WHEELS)
def test_the_double_has_only_real_names(version: str) -> None:
    trt, listing = tensorrt_double(version), committed_listing(version)
    for name, members in listing["classes"].items():
        played = vars(trt).get(name)
        for member, value in vars(played.__mro__[1]).items() if played is not None else ():
            assert member.startswith("_") or member in members, f"{name}.{member}"
            if inspect.isfunction(value) and member in members and members[member]:
                taken = list(inspect.signature(value).parameters)[1:]
                assert any(plays(taken, signature) for signature in members[member]), f"{name}.{member}{taken}"
    with pytest.raises(AttributeError):
        _ = trt.NoSuchName
    with pytest.raises(AttributeError):
        trt.Builder(None).platform_is_fast = True
    assert hasattr(trt.BuilderFlag, "FP16") == (version == "10.3.0")
