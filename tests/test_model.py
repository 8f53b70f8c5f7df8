"""The network: one grey channel, 136 outputs, the target's units, starting weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18

from kp_runtime.errors import KpError
from kp_train.model import KeypointNet, load_backbone_weights


def test_the_contract_of_the_network() -> None:
    net = KeypointNet(64).eval()
    assert net.backbone.conv1.weight.shape == (64, 1, 7, 7)
    assert net.backbone.fc.out_features == 136
    white = torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)
    assert net.normalise(white, torch.float32).unique().tolist() == [1]
    out = net(torch.zeros(3, 1, 64, 64, dtype=torch.uint8))
    assert out.shape == (3, 68, 2)
    assert out.dtype == torch.float32


def test_the_target_is_the_original_projects_at_224() -> None:
    xy = torch.rand(2, 68, 2) * 224
    torch.testing.assert_close(KeypointNet(224).encode(xy), (xy.flatten(1) - 100) / 50)


def test_reduce_averages_before_the_backbone() -> None:
    torch.manual_seed(0)
    large, small = KeypointNet(128, reduce=2).eval(), KeypointNet(64).eval()
    torch.nn.init.normal_(large.backbone.fc.weight, std=0.05)
    small.backbone.load_state_dict(large.backbone.state_dict())
    crops = torch.randint(0, 64, (2, 1, 64, 64), dtype=torch.uint8) * 4
    doubled = crops.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    with torch.no_grad():
        torch.testing.assert_close(large.raw(doubled), small.raw(crops), atol=1e-4, rtol=0)
        # pixel centres: the first pixel of the small crop covers the first two of the large one
        torch.testing.assert_close(large(doubled), small(crops) * 2 + 0.5, atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [64, 112, 224])
def test_decode_undoes_encode(size: int) -> None:
    net, xy = KeypointNet(size), torch.rand(2, 68, 2) * size
    torch.testing.assert_close(net.decode(net.encode(xy)), xy, atol=1e-4, rtol=0)


def test_the_same_place_has_the_same_target_at_every_size() -> None:
    middle = [KeypointNet(size).encode(torch.full((1, 68, 2), (size - 1) / 2)) for size in (64, 112, 224)]
    torch.testing.assert_close(middle[0], middle[2])
    torch.testing.assert_close(middle[1], middle[2])


def test_an_untrained_network_answers_about_the_mean_face() -> None:
    torch.manual_seed(0)
    net = KeypointNet(64)
    mean = torch.rand(68, 2) * 64
    net.start_from_mean(mean)
    with torch.no_grad():
        net.backbone.fc.weight.zero_()
    torch.testing.assert_close(net.eval()(torch.zeros(1, 1, 64, 64, dtype=torch.uint8))[0], mean, atol=1e-3, rtol=0)


def test_colour_filters_of_a_torchvision_file_are_summed(tmp_path: Path) -> None:
    colour = resnet18()
    torch.save(colour.state_dict(), tmp_path / "resnet18.pth")
    net = KeypointNet(64)
    file = tmp_path / "resnet18.pth"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_backbone_weights(net, str(file)) == {"weights": "resnet18.pth", "weights_sha256": sha256}
    summed = colour.conv1.weight.sum(dim=1, keepdim=True) / 0.226
    torch.testing.assert_close(net.backbone.conv1.weight, summed)
    torch.testing.assert_close(net.backbone.layer1[0].conv1.weight, colour.layer1[0].conv1.weight)


@pytest.mark.parametrize("asked", ["imagenet", "auto"])
def test_what_a_network_begins_at_is_said_by_its_name(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on with `--weights imagenet` must know that it began at them."""
    colour = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: dict(colour))
    net = KeypointNet(64)
    assert load_backbone_weights(net, asked) == {"weights": "imagenet"}
    torch.testing.assert_close(net.backbone.layer1[0].conv1.weight, colour["layer1.0.conv1.weight"])


def test_weights_that_can_not_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    with pytest.raises(KpError, match="use --weights none"):
        load_backbone_weights(KeypointNet(64), "imagenet")
    assert load_backbone_weights(KeypointNet(64), "auto") == {"weights": "none"}
    assert "training from scratch" in caplog.text
    with pytest.raises(KpError, match=r"missing\.pth can't be had"):
        load_backbone_weights(KeypointNet(64), str(tmp_path / "missing.pth"))
    whole = resnet18().state_dict()
    for other in (
        {"other": torch.zeros(1)},
        torch.zeros(3),
        {"conv1.weight": 1},
        {"conv1.weight": torch.zeros(64, 3)},
        {"conv1.weight": whole["conv1.weight"]},
        whole | {"layer5.weight": torch.zeros(1)},
        whole | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
    ):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(KpError, match="no torchvision ResNet-18"):
            load_backbone_weights(KeypointNet(64), str(tmp_path / "other.pth"))


def test_a_file_of_weights_runs_no_code(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"conv1.weight": Code()}, tmp_path / "a.pth")
    with pytest.raises(KpError, match=r"a\.pth can't be had here"):
        load_backbone_weights(KeypointNet(64), str(tmp_path / "a.pth"))
    assert not (tmp_path / "ran").exists()
