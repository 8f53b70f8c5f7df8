from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cryptography")
pytest.importorskip("typer")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from kp_export.pack import pack_bundle
from kp_export.plan_bundle import add_plan
from kp_export.sign import new_key, sign_bundle
from kp_runtime import load
from kp_runtime.backend_ort import OrtCpuBackend
from kp_runtime.center_detector import CenterDetector
from kp_runtime.detector_by_name import detector_name, load_detector
from kp_runtime.errors import (
    BackendError,
    BundleError,
    InputError,
    IntegrityError,
    KpError,
    KpWarning,
    MissingExtraError,
    SignatureError,
)
from kp_runtime.manifest import Manifest
from kp_runtime.signing import PREFIX
from kp_runtime.tuned import Tuned, write_tuned
from kp_train.synthetic import write_csv_source
from tests.models import SIZE, tiny_bundle
from tests.test_cli import kp
from tests.test_export import known_graph, small_checkpoint

MODEL = "model.fp32.onnx"
ENGINES = Path(__file__).resolve().parents[1] / "engines"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key pairs ours and theirs."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        new_key(folder / f"{name}.pem")
    return folder


@pytest.fixture
def signed(bundle: Path, keys: Path, tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    sign_bundle(copied, keys / "ours.pem")
    return copied


@pytest.fixture
def public(keys: Path) -> Path:
    return keys / "ours.pub.pem"


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def test_signed_bundle_loads_with_every_form_of_the_key(signed: Path, public: Path) -> None:
    key = serialization.load_pem_public_key(public.read_bytes())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    for given in (public, str(public), public.read_bytes(), raw):
        model = load(signed, threads=1, public_key=given)
        assert model.backend.infer(np.zeros((1, 1, SIZE, SIZE), np.uint8)).shape == (1, 68, 2)
    assert load(signed / MODEL, threads=1, public_key=public).spec == model.spec
    assert load(signed, threads=1).spec == model.spec


def test_the_signature_is_plain_ed25519_of_prefix_and_manifest(signed: Path, public: Path) -> None:
    signature = (signed / "manifest.sig").read_bytes()
    assert len(signature) == 64
    key = serialization.load_pem_public_key(public.read_bytes())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    key.verify(signature, PREFIX + (signed / "manifest.json").read_bytes())  # raises when it does not hold


def test_unsigned(bundle: Path, public: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle, tmp_path / "a bundle")
    told = r"is not signed, and a public key was given; get the signed bundle, or sign it with: kp sign '.*/a bundle' "
    with pytest.raises(SignatureError, match=told):
        load(bundle, public_key=public)


def test_tuned_settings_do_without_no_signature(bundle: Path, public: Path, tmp_path: Path) -> None:
    sha256 = Manifest.read(bundle).files[MODEL].sha256
    settings = write_tuned(Tuned(str(bundle), MODEL, sha256, "ort-cpu", 1, 1, None, {}), tmp_path / "tuned.json")
    with pytest.raises(SignatureError, match="is not signed, and a public key was given"):
        load(tuned=settings, public_key=public)


def test_wrong_key(signed: Path, keys: Path) -> None:
    with pytest.raises(SignatureError, match="the manifest was changed, or another key signed it"):
        load(signed, public_key=keys / "theirs.pub.pem")


def test_changed_manifest(signed: Path, public: Path) -> None:
    edit(signed / "manifest.json", b'"margin": 1.3', b'"margin": 1.4')
    assert load(signed, threads=1).spec.margin == 1.4
    with pytest.raises(SignatureError, match="the manifest was changed"):
        load(signed, public_key=public)


def test_a_blank_more_is_a_change(signed: Path, public: Path) -> None:
    (signed / "manifest.json").write_bytes((signed / "manifest.json").read_bytes() + b" ")
    with pytest.raises(SignatureError, match="the manifest was changed"):
        load(signed, public_key=public)


def test_the_signature_is_looked_at_before_the_manifest(signed: Path, public: Path) -> None:
    (signed / "manifest.json").write_bytes(b"no JSON")
    with pytest.raises(SignatureError, match="the manifest was changed"):
        load(signed, public_key=public)


def test_manifest_exchanged_after_it_was_verified(signed: Path, public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was verified is what is parsed: the file is read once."""
    import kp_runtime.manifest

    check = kp_runtime.manifest.check_signature

    def check_then_change(*args: object) -> None:
        check(*args)  # type: ignore[arg-type]
        edit(signed / "manifest.json", b'"margin": 1.3', b'"margin": 4.0')

    monkeypatch.setattr(kp_runtime.manifest, "check_signature", check_then_change)
    assert load(signed, threads=1, public_key=public).spec.margin == 1.3


@pytest.mark.parametrize("name", [MODEL, "golden.npz"])
def test_changed_file(name: str, signed: Path, public: Path) -> None:
    data = bytearray((signed / name).read_bytes())
    data[len(data) // 2] ^= 1
    (signed / name).write_bytes(data)
    with pytest.raises(IntegrityError, match="the file was changed"):
        load(signed, public_key=public)


def test_file_exchanged_for_one_that_the_manifest_now_names(signed: Path, public: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", size=96)
    for name in (MODEL, "golden.npz", "manifest.json"):
        shutil.copy(other / name, signed / name)
    assert load(signed, threads=1).spec.size == 96
    with pytest.raises(SignatureError, match="the manifest was changed"):
        load(signed, public_key=public)


def test_file_exchanged_after_it_was_hashed(signed: Path, public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was hashed is what the engine opens."""
    read = Manifest.read_file

    def read_then_change(self: Manifest, folder: Path, name: str) -> bytes:
        data = read(self, folder, name)
        (Path(folder) / name).write_bytes(b"other")
        return data

    monkeypatch.setattr(Manifest, "read_file", read_then_change)
    crops = np.zeros((1, 1, SIZE, SIZE), np.uint8)
    assert load(signed, threads=1, public_key=public).backend.infer(crops).shape == (1, 68, 2)


def test_a_second_session_is_made_of_the_same_file_or_not_at_all(signed: Path) -> None:
    manifest = Manifest.read(signed)
    backend = OrtCpuBackend(signed / MODEL, manifest.spec, 2, read=lambda: manifest.read_file(signed, MODEL))
    (signed / MODEL).write_bytes(b"other")
    with pytest.warns(KpWarning, match=r"no longer fed side by side: .*model\.fp32\.onnx has 5 bytes"):
        backend.warmup(4)  # each way of feeding has its turn
    assert "side by side" not in backend.batch_times()[4]


def test_file_that_no_manifest_names_is_never_used(signed: Path, public: Path) -> None:
    shutil.copy(signed / MODEL, signed / "model.int8.onnx")  # what ONNX Runtime would rather have
    assert load(signed, threads=1, public_key=public).backend.report.file == MODEL
    with pytest.raises(BundleError, match=r"has no file model\.int8\.onnx"):
        load(signed / "model.int8.onnx", public_key=public)
    with pytest.raises(BackendError, match="has no int8 file"):
        load(signed, precision="int8", public_key=public)


def test_signature_of_another_bundle(signed: Path, keys: Path, public: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", margin=1.5)
    sign_bundle(other, keys / "ours.pem")
    shutil.copy(other / "manifest.sig", signed)
    with pytest.raises(SignatureError, match="the manifest was changed"):
        load(signed, public_key=public)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 64, b"x" * 65, b"x" * 100_000])
def test_no_signature_at_all(content: bytes, signed: Path, public: Path) -> None:
    (signed / "manifest.sig").write_bytes(content)
    with pytest.raises(SignatureError, match=r"manifest\.sig"):
        load(signed, public_key=public)


def test_signature_that_is_a_link(signed: Path, public: Path, tmp_path: Path) -> None:
    (signed / "manifest.sig").rename(tmp_path / "elsewhere")
    (signed / "manifest.sig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match=r"manifest\.sig can't be read \(it is a symbolic link\)"):
        load(signed, public_key=public)


def test_without_cryptography(signed: Path, public: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    message = r"needs the package cryptography, which is not installed; run: pip install 'kp-edge\[sign\]'"
    with pytest.raises(MissingExtraError, match=message):
        load(signed, public_key=public)
    with pytest.raises(MissingExtraError, match=message):
        new_key(tmp_path / "key.pem")
    assert load(signed, threads=1).spec.name == "tiny"


def test_keys_that_are_none(signed: Path, tmp_path: Path, keys: Path) -> None:
    rsa_key = rsa.generate_private_key(65537, 1024 * 2)
    pem = rsa_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = rsa_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "rsa.pem").write_bytes(pem)
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pass")
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    for given, message in (
        (b"", "the public key is no public key in PEM"),
        (b"x" * 31, "the public key is no public key in PEM"),
        (public, "the public key is no Ed25519 key"),
        (tmp_path / "none.pem", r"the key .*none\.pem can't be read: No such file"),
        ("a\0b", "can't be read: embedded null byte"),
        (keys / "ours.pem", r"ours\.pem is no public key in PEM"),
        (5, "public_key must be a path, as text or of pathlib; got int"),
    ):
        with pytest.raises(InputError, match=message):
            load(signed, public_key=given)  # type: ignore[arg-type]
    for name, message in (
        ("rsa.pem", "is no Ed25519 key; make one with: kp sign --new-key"),
        ("locked.pem", r"is no private key in PEM without a passphrase: give the \.pem that kp sign --new-key wrote$"),
        ("none.pem", "can't be read: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            sign_bundle(signed, tmp_path / name)


def test_private_key_is_for_its_owner_and_never_overwritten(tmp_path: Path) -> None:
    public = new_key(tmp_path / "release.pem")
    assert public == tmp_path / "release.pub.pem"
    assert stat.S_IMODE((tmp_path / "release.pem").stat().st_mode) == 0o600
    before = (tmp_path / "release.pem").read_bytes()
    public_before = public.read_bytes()
    with pytest.raises(KpError, match=r"release\.pub\.pem is there already, and a key is never overwritten"):
        new_key(tmp_path / "release.pem")
    public.unlink()
    with pytest.raises(KpError, match=r"release\.pem is there already, and a key is never overwritten"):
        new_key(tmp_path / "release.pem")
    assert (tmp_path / "release.pem").read_bytes() == before
    assert not public.exists()
    assert b"PRIVATE" in before
    assert b"PRIVATE" not in public_before
    with pytest.raises(KpError, match=r"can't write the key .*: No such file"):
        new_key(tmp_path / "no folder" / "release.pem")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("fails", [0, 1], ids=["private", "public"])
def test_a_key_that_can_not_be_written_leaves_no_half_behind(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, opened = [], os.open

    def open_(file: Path, flags: int, mode: int) -> int:
        made.append(opened(file, flags, mode))
        return opened("/dev/full", os.O_WRONLY) if len(made) == fails + 1 else made[-1]

    with monkeypatch.context() as full:
        full.setattr(os, "open", open_)
        with pytest.raises(KpError, match=r"can't write the key .*: No space left on device"):
            new_key(tmp_path / "release.pem")
    os.close(made[-1])
    assert not list(tmp_path.iterdir())
    assert new_key(tmp_path / "release.pem").stat().st_size


def test_a_bundle_that_is_not_whole_is_not_signed(bundle: Path, keys: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (copied / MODEL).write_bytes(b"other")
    with pytest.raises(IntegrityError, match="is cut off or was replaced"):
        sign_bundle(copied, keys / "ours.pem")
    assert not (copied / "manifest.sig").exists()


def test_commands_sign_and_show(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    key, public = tmp_path / "release.pem", tmp_path / "release.pub.pem"
    status, out, _ = kp(capsys, "inspect", copied)
    assert (status, out.splitlines()[-1]) == (0, "signature: none")
    status, out, _ = kp(capsys, "sign", "--new-key", key)
    assert (status, out) == (0, f"{key}: keep it to yourself\n{public}: give it to the devices\n")
    status, out, _ = kp(capsys, "sign", copied, "--key", key)
    assert (status, out) == (0, f"{copied / 'manifest.sig'}\n")
    status, out, _ = kp(capsys, "inspect", copied)
    assert out.splitlines()[-1] == "signature: there is one, not checked: kp inspect --public-key KEY.pub.pem"
    status, out, _ = kp(capsys, "inspect", copied, "--public-key", public, "--json")
    assert (status, json.loads(out)["signature"]) == (0, "of the key that was given")
    edit(copied / "manifest.json", b'"margin": 1.3', b'"margin": 1.4')
    status, out, err = kp(capsys, "inspect", copied, "--public-key", public)
    assert (status, out) == (1, "")
    assert err.startswith("kp: ")
    assert "is no signature of this manifest" in err


def test_a_detector_is_signed_shown_and_asked_for_like_a_model(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = keys / "ours.pub.pem", keys / "theirs.pub.pem"
    detector = tmp_path / "detector"
    pack_bundle(ENGINES / "face-detector", detector, ["fp32"])
    assert {path.name for path in detector.iterdir()} == {"manifest.json", "model.fp32.onnx", "golden.npz"}
    with pytest.raises(SignatureError, match="is not signed"):
        load_detector(f"own={detector}", public_key=ours)
    assert kp(capsys, "sign", detector, "--key", keys / "ours.pem")[0] == 0
    status, out, _ = kp(capsys, "inspect", detector, "--public-key", ours)
    assert status == 0
    assert "face-detector: finds faces of 22 to 72 px" in out
    assert detector_name("auto", checkout=detector, public_key=ours) == f"own={detector}"
    assert isinstance(load_detector(f"own={detector}", public_key=ours), CenterDetector)
    with pytest.raises(SignatureError, match="another key signed it"):
        load_detector(f"own={detector}", public_key=theirs)


@pytest.mark.parametrize("words", [(), ("bundle",), ("--key", "a.pem"), ("bundle", "--new-key", "a.pem")])
def test_sign_wants_one_of_two_things(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = kp(capsys, "sign", *words)
    assert (status, err) == (1, "kp: give a bundle and --key PRIVATE.pem, or --new-key PATH alone\n")


@pytest.mark.parametrize("command", [("predict",), ("filter", "--effect", "hat"), ("run",)], ids=lambda c: c[0])
def test_commands_ask_for_the_signatures_of_model_and_detector(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], bundle: Path, signed: Path, public: Path,
    astronaut: Path, tmp_path: Path,
) -> None:  # fmt: skip
    detector = ENGINES / "face-detector"
    words = (*command, astronaut, "--out", tmp_path / "out", "--public-key", public)
    for model, unsigned in ((bundle, bundle), (signed, detector)):
        status, _, err = kp(capsys, *words, "--model", model, "--detector", f"own={detector}")
        assert (status, err.startswith(f"kp: the bundle {unsigned} is not signed, and a public key was given")) == (
            1,
            True,
        )


def test_pack_leaves_no_stale_signature_and_says_so(
    capsys: pytest.CaptureFixture[str], signed: Path, public: Path, tmp_path: Path
) -> None:
    slim = tmp_path / "slim"
    status, _, err = kp(capsys, "pack", signed, "--out", slim, "--precision", "fp32")
    assert status == 0
    assert f"{slim} has a new manifest and no signature of it; sign it: kp sign {slim} --key PRIVATE.pem" in err
    assert not (slim / "manifest.sig").exists()
    load(signed, threads=1, public_key=public)
    status, _, err = kp(capsys, "pack", signed, "--out", signed, "--precision", "fp32")
    assert (status, "no signature of it" in err) == (0, True)
    assert not (signed / "manifest.sig").exists()


def test_a_failed_change_keeps_the_signature(signed: Path, public: Path) -> None:
    with pytest.raises(BundleError, match="has no model of precision int8"):
        pack_bundle(signed, signed, ["int8"])
    with pytest.raises(BackendError, match=r"has no model\.fp16\.onnx to build the plan from"):
        add_plan(signed, "fp16")
    load(signed, threads=1, public_key=public)


def test_every_new_manifest_takes_the_signature_away(signed: Path) -> None:
    Manifest.read(signed).write(signed)
    assert not (signed / "manifest.sig").exists()


def test_eval_record_takes_the_signature_away_and_says_so(
    capsys: pytest.CaptureFixture[str], signed: Path, tmp_path: Path
) -> None:
    data = write_csv_source(tmp_path, people=2)
    status, _, err = kp(capsys, "eval", signed / MODEL, "--data", data, "--json")
    assert (status, err) == (0, "")
    assert (signed / "manifest.sig").exists()
    status, _, err = kp(capsys, "eval", signed / MODEL, "--data", data, "--json", "--record", "drawn")
    assert (status, "has a new manifest and no signature of it" in err) == (0, True)
    assert not (signed / "manifest.sig").exists()


def test_export_and_verify_say_what_became_of_the_signature(
    capsys: pytest.CaptureFixture[str], keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_export.bundle.onnx_from_checkpoint", known_graph)
    run = small_checkpoint(tmp_path / "run")
    sign_bundle(run, keys / "ours.pem")
    status, _, err = kp(capsys, "export", run, "--engine", "never")
    assert (status, f"{run} has a new manifest and no signature of it" in err) == (0, True)
    sign_bundle(run, keys / "ours.pem")
    status, out, _ = kp(capsys, "verify", run)
    assert (status, out.splitlines()[-1]) == (
        0,
        "signature: there is one, not checked: kp inspect --public-key KEY.pub.pem",
    )
