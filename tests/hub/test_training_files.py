"""Weights that authors published as training dicts on the Hub: SpiLiFormer's, from download to logits."""

import io
from pathlib import Path

import pytest
import timm
import torch
from hub_client import logits_of
from hub_server import Fault, Repo

from release import spiliformer_release_state_dict
from training_dict import training_checkpoint

REPO, FILE = "me/spili", "checkpoint_T2.pth"


def training_file(model, **args) -> bytes:
    buffer = io.BytesIO()
    torch.save(training_checkpoint(spiliformer_release_state_dict(model), model="SpiLiFormer_10_768", **args), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = timm.create_model("test_spiliformer", num_classes=10, time_steps=2)
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            value.normal_(0.3, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def content(model):
    return training_file(model, time_step=2)


@pytest.fixture
def on_hub(server, content):
    server.repos[REPO] = Repo()
    server.repos[REPO].commit({FILE: content})
    overlay = {"hf_hub_id": REPO, "hf_hub_filename": FILE, "num_classes": 10}
    return {"pretrained_cfg_overlay": overlay, "num_classes": 10, "time_steps": 2}


def kept_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("models--*/snapshots/*/*") if path.suffix == ".safetensors")


def test_the_training_file_is_read_once(server, client, on_hub, model, content, tmp_path):
    expected = {"logits": logits_of(model)}
    assert client.load("test_spiliformer", cache_dir=tmp_path, **on_hub) == expected
    (kept,) = kept_files(tmp_path)
    assert kept.name == "checkpoint_T2.safetensors"
    assert kept.stat().st_size < 0.45 * len(content)
    blob = kept.with_name(FILE).resolve()
    blob.write_bytes(b"never read again")
    server.log.clear()
    assert client.load("test_spiliformer", cache_dir=tmp_path, **on_hub) == expected
    assert server.log == []
    kept.with_name(FILE).unlink()  # 830 MB that are not needed any more
    assert client.load("test_spiliformer", cache_dir=tmp_path, **on_hub) == expected
    assert server.log == []
    assert not list(tmp_path.glob("**/*.partial"))


def test_the_model_says_where_its_weights_come_from(monkeypatch, tmp_path, model, content):
    from timm_qkformer.models import loading, training_files

    (tmp_path / FILE).write_bytes(content)
    monkeypatch.setattr(loading, "_ask_hub", lambda *args: None)
    monkeypatch.setattr(training_files, "hf_hub_download", lambda *args, **kwargs: str(tmp_path / FILE))
    overlay = {"hf_hub_id": REPO, "hf_hub_filename": FILE, "num_classes": 10}
    kwargs = {"pretrained_cfg_overlay": overlay, "num_classes": 10, "time_steps": 2, "cache_dir": tmp_path}
    loaded = timm.create_model("test_spiliformer", pretrained=True, **kwargs).eval()
    assert logits_of(loaded) == logits_of(model)
    assert loaded.pretrained_cfg["hf_hub_filename"] == FILE
    assert "file" not in loaded.pretrained_cfg
    assert "state_dict" not in loaded.pretrained_cfg

    def refuse(*args):
        raise PermissionError("read-only")

    (tmp_path / "checkpoint_T2.safetensors").unlink()
    monkeypatch.setattr(training_files, "save_file", refuse)
    again = timm.create_model("test_spiliformer", pretrained=True, **kwargs).eval()
    assert logits_of(again) == logits_of(model)
    assert "state_dict" not in again.pretrained_cfg


def assert_helpful(outcome, *words):
    assert outcome.get("type") == "WeightsError", outcome
    for part in (f"Hub repository {REPO}/{FILE}", "create_model('test_spiliformer'", "timm-qkformer convert", *words):
        assert part in outcome["error"]


def test_faults_on_the_way(server, client, on_hub, model, tmp_path):
    def load():
        return client.load("test_spiliformer", cache_dir=tmp_path, **on_hub)

    for fault, words in (
        (Fault("/resolve/", status=404), "nothing at that address (404)"),
        (Fault("/resolve/", status=503), "the server failed (503)"),
        (Fault("/resolve/", delay=3.0), "did not answer in time"),
        (Fault(FILE, "GET", flip=True), "was not kept"),
    ):
        server.faults[:] = [fault]
        assert_helpful(load(), words)
        assert kept_files(tmp_path) == []
    server.faults[:] = [Fault(FILE, "GET", cut=300_000, times=1)]  # the client tries again where it was cut
    assert load() == {"logits": logits_of(model)}


def test_no_network(server, client, on_hub, tmp_path):
    server.faults.append(Fault("", cut=1))
    outcome = client.load("test_spiliformer", cache_dir=tmp_path, **on_hub)
    assert outcome["type"] == "WeightsError", outcome


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize("kind", ["page", "harmful", "another model"])
def test_wrong_files(server, client, on_hub, tmp_path, kind):
    buffer = io.BytesIO()
    if kind == "page":
        buffer.write(b"<!DOCTYPE html>")
    else:
        torch.save({"model": {"head.weight": torch.ones(2)}, "args": Harmful() if kind == "harmful" else None}, buffer)
    server.repos[REPO].commit({FILE: buffer.getvalue()})
    outcome = client.load("test_spiliformer", cache_dir=tmp_path, **on_hub)
    if kind == "another model":
        assert "Missing key" in outcome["error"]
    else:
        assert_helpful(outcome, "cannot be read as a checkpoint")
        assert kept_files(tmp_path) == []


@pytest.mark.slow
def test_full_size_under_the_real_name(server, client, tmp_path):
    """The released layout and size, 830 MB, from the tag's own repository."""
    torch.manual_seed(5)
    model = timm.create_model("spiliformer_10_768").eval()
    content = training_file(model)
    assert 820e6 < len(content) < 850e6
    server.repos["KirinZheng/SpiLiFormer"] = Repo()
    server.repos["KirinZheng/SpiLiFormer"].commit({"checkpoint_spiliformer_T4_224.pth": content})
    for _ in range(2):
        assert client.load("spiliformer_10_768.t4_in1k", cache_dir=tmp_path) == {"logits": logits_of(model)}
    assert len(server.requests("GET", "T4_224.pth")) == 1


def test_tags():
    for tag, (file, size, steps) in {
        "t1_in1k": ("T1_224", 224, 1),
        "t4_in1k": ("T4_224", 224, 4),
        "t4_ft288_in1k": ("T4_288", 288, 4),
        "t4_ft384_in1k": ("T4_384", 384, 4),
    }.items():
        model = timm.create_model(f"spiliformer_10_768.{tag}", device="meta")
        cfg = model.pretrained_cfg
        assert (cfg["hf_hub_id"], cfg["hf_hub_filename"]) == (
            "KirinZheng/SpiLiFormer",
            f"checkpoint_spiliformer_{file}.pth",
        )
        assert (cfg["input_size"], model.time_steps) == ((3, size, size), steps)
        assert f"spiliformer_10_768.{tag}" in timm.list_pretrained()
    assert timm.get_pretrained_cfg("spiliformer_10_768").tag == "t4_in1k"
