"""Weights and training states on disk: what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kp_runtime.errors import BundleError, IntegrityError, KpError, SchemaError
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import (
    CHECKPOINT_NAME,
    SafetensorsIO,
    check_finite,
    check_start,
    has_begun,
    load_checkpoint,
    save_checkpoint,
)
from kp_train.model import KeypointNet


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "b", KeypointNet(64), Manifest(spec=ModelSpec("x", 64), training={"seed": 1}))
    return tmp_path / "b"


def test_weights_come_back_as_fp16_rounds_them(saved: Path) -> None:
    torch.manual_seed(0)
    net = KeypointNet(64)
    loaded, manifest = load_checkpoint(saved / CHECKPOINT_NAME)
    assert manifest.training == {"seed": 1}
    assert not loaded.training
    assert torch.equal(loaded.backbone.conv1.weight, net.backbone.conv1.weight.half().float())
    assert torch.equal(loaded.backbone.fc.bias, net.backbone.fc.bias)
    assert (saved / CHECKPOINT_NAME).stat().st_size < 23e6


def test_the_manifest_says_in_which_type_the_weights_are(saved: Path, tmp_path: Path) -> None:
    assert Manifest.read(saved).files[CHECKPOINT_NAME].precision == "fp16"
    save_checkpoint(tmp_path / "whole", KeypointNet(64), Manifest(spec=ModelSpec("x", 64)), half=False)
    assert Manifest.read(tmp_path / "whole").files[CHECKPOINT_NAME].precision == "fp32"


def test_weights_are_for_everybody_to_read(saved: Path) -> None:
    assert (saved / CHECKPOINT_NAME).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("left", [CHECKPOINT_NAME, "manifest.json"])
def test_no_run_begins_where_a_bundle_is_or_a_part_of_one(left: str, tmp_path: Path) -> None:
    (tmp_path / left).touch()
    with pytest.raises(KpError, match="already holds a bundle; name another folder with --out"):
        check_start(tmp_path, resume=False)


def test_weights_that_a_kill_left_without_their_manifest_are_written_over(saved: Path) -> None:
    """But not somebody else's."""
    (saved / "manifest.json").unlink()
    check_start(saved, resume=False)
    save_file({"w": torch.zeros(1)}, saved / CHECKPOINT_NAME)
    with pytest.raises(KpError, match="already holds a bundle; name another folder with --out"):
        check_start(saved, resume=False)


def test_the_same_weights_are_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    net, manifest = load_checkpoint(saved)
    for i in range(8):
        save_checkpoint(tmp_path / str(i), net, manifest)
    assert len({(tmp_path / str(i) / "checkpoint.safetensors").read_bytes() for i in range(8)}) == 1


def test_what_the_backbone_sees_is_kept(tmp_path: Path) -> None:
    manifest = Manifest(spec=ModelSpec("x", 64), training={"config": {"reduce": 2}})
    save_checkpoint(tmp_path / "b", KeypointNet(64, reduce=2), manifest)
    assert load_checkpoint(tmp_path / "b")[0].reduce == 2


def rewrite(bundle: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, bundle / CHECKPOINT_NAME)
    files = {CHECKPOINT_NAME: file_entry(bundle / CHECKPOINT_NAME, "checkpoint")}
    Manifest(spec=ModelSpec("x", 64), files=files).write(bundle)


def test_another_network_is_named_by_its_first_odd_tensor(saved: Path) -> None:
    tensors = load_file(saved / CHECKPOINT_NAME)
    rewrite(saved, tensors | {"fc.weight": torch.zeros(10, 512)})
    with pytest.raises(BundleError, match=r"fc.weight \(10x512 instead of 136x512\)"):
        load_checkpoint(saved)
    rewrite(saved, {k: v for k, v in tensors.items() if k != "bn1.bias"})
    with pytest.raises(BundleError, match=r"bn1.bias \(nothing instead of 64\)"):
        load_checkpoint(saved)


def test_a_cut_off_file_is_refused_before_it_is_read(saved: Path) -> None:
    path = saved / CHECKPOINT_NAME
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(IntegrityError, match="cut off"):
        load_checkpoint(saved)


def test_a_file_that_is_no_safetensors_is_refused(saved: Path) -> None:
    (saved / CHECKPOINT_NAME).write_bytes(b"not weights" * 100)
    files = {CHECKPOINT_NAME: file_entry(saved / CHECKPOINT_NAME, "checkpoint")}
    Manifest(spec=ModelSpec("x", 64), files=files).write(saved)
    with pytest.raises(IntegrityError, match="no safetensors file"):
        load_checkpoint(saved)


def test_a_changed_file_is_refused(saved: Path) -> None:
    path = saved / CHECKPOINT_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="sha256"):
        load_checkpoint(saved)


def test_no_checkpoint_there(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(BundleError, match="there is no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is no checkpoint"):
        load_checkpoint(saved / "manifest.json")
    with pytest.raises(BundleError, match="is not a bundle"):
        load_checkpoint(tmp_path)


def test_a_newer_manifest_is_refused(saved: Path) -> None:
    raw = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(raw | {"schema": 99}))
    with pytest.raises(SchemaError, match="schema 99"):
        load_checkpoint(saved)


def test_a_training_state_is_json_and_safetensors_and_comes_back_whole(tmp_path: Path) -> None:
    state = {
        "epoch": 3,
        "state_dict": {"a.b": torch.arange(6).reshape(2, 3)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        "nothing": None,
        "flags": [True, 1.5, "text"],
    }
    io = SafetensorsIO()
    io.save_checkpoint(state, tmp_path / "s.state")
    (tmp_path / "s.state.new" / "left by a run that was killed").mkdir(parents=True)
    io.save_checkpoint(state | {"epoch": 4}, tmp_path / "s.state")
    assert sorted(p.name for p in (tmp_path / "s.state").iterdir()) == ["tensors.safetensors", "tree.json"]
    back = io.load_checkpoint(tmp_path / "s.state")
    assert back["epoch"] == 4
    assert back["optimizer_states"][0]["param_groups"] == [{"betas": (0.9, 0.99)}]
    assert float(back["optimizer_states"][0]["state"][0]["step"]) == 5.0
    assert torch.equal(back["state_dict"]["a.b"], state["state_dict"]["a.b"])  # type: ignore[index]
    assert back["flags"] == [True, 1.5, "text"]
    assert [p.name for p in tmp_path.iterdir()] == ["s.state"]


def test_a_state_keeps_how_its_tensors_lie_in_memory(tmp_path: Path) -> None:
    """A fused optimiser pairs weights and moments by their place in memory."""
    plain = torch.arange(24.0).reshape(1, 2, 3, 4)
    last = plain.to(memory_format=torch.channels_last)
    SafetensorsIO().save_checkpoint({"moments": [plain, last]}, tmp_path / "s.state")
    back = SafetensorsIO().load_checkpoint(tmp_path / "s.state")["moments"]
    assert [m.stride() for m in back] == [plain.stride(), last.stride()]
    assert all(torch.equal(m, plain) for m in back)


def test_a_state_that_was_read_holds_its_file_no_more(tmp_path: Path) -> None:
    """A run on a CPU goes on with its very tensors, and replaces the file after each epoch."""
    SafetensorsIO().save_checkpoint({"moments": torch.ones(100000)}, tmp_path / "s.state")
    back = SafetensorsIO().load_checkpoint(tmp_path / "s.state")["moments"]
    file = tmp_path / "s.state" / "tensors.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert bool(back.all())


def test_a_kill_between_the_last_two_moves_loses_no_state(tmp_path: Path) -> None:
    io = SafetensorsIO()
    io.save_checkpoint({"epoch": 1}, tmp_path / "s.state")
    (tmp_path / "s.state").rename(tmp_path / "s.state.old")
    assert io.load_checkpoint(tmp_path / "s.state")["epoch"] == 1


def test_a_full_disk_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SafetensorsIO().save_checkpoint({"epoch": 1}, saved / "s.state")
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("kp_train.checkpoint.save_file", full)
    with pytest.raises(KpError, match="No space left on device"):
        save_checkpoint(saved, KeypointNet(64), Manifest(spec=ModelSpec("y", 64)))
    with pytest.raises(KpError, match="No space left on device"):
        SafetensorsIO().save_checkpoint({"epoch": 2}, saved / "s.state")
    assert before.items() <= {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}.items()


def test_two_kills_in_a_row_lose_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = SafetensorsIO()
    io.save_checkpoint({"epoch": 1}, tmp_path / "s.state")
    (tmp_path / "s.state").rename(tmp_path / "s.state.old")
    monkeypatch.setattr("kp_train.checkpoint.save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"epoch": 2}, tmp_path / "s.state")
    assert io.load_checkpoint(tmp_path / "s.state")["epoch"] == 1


def test_a_state_that_a_kill_left_beside_its_place_is_a_run_begun(tmp_path: Path) -> None:
    check_start(tmp_path, resume=False)
    with pytest.raises(KpError, match=r"nothing to resume .* it has no state/last\.state; leave out --resume"):
        check_start(tmp_path, resume=True)
    (tmp_path / "state" / "last.state.old").mkdir(parents=True)
    assert has_begun(tmp_path)
    check_start(tmp_path, resume=True)
    with pytest.raises(KpError, match="already holds a run; add --resume"):
        check_start(tmp_path, resume=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    net = torch.nn.Linear(2, 2)
    check_finite(net, 0.1)
    with torch.no_grad():
        net.weight[0, 0] = value
    with pytest.raises(KpError, match=r"not finite; lower --lr \(was 0\.1\)"):
        check_finite(net, 0.1)
    normed = torch.nn.BatchNorm2d(2)
    normed.running_var[0] = value
    with pytest.raises(KpError, match="not finite"):
        check_finite(normed, 0.1)


def test_weights_that_fp16_does_not_hold() -> None:
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.bias[0] = 1e5  # vectors stay as fp32
        check_finite(net, 0.1)
        net.weight[0, 0] = 1e5
    with pytest.raises(KpError, match="not finite"):
        check_finite(net, 0.1)
