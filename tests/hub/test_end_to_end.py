"""From a server to logits, with the real clients: by url, by hub id, from the cache, through faults, offline."""

import hashlib
import socket

import pytest
import timm
import torch
from hub_client import Client, logits_of
from hub_server import Fault, Repo

from release import release_state_dict
from timm_qkformer.hub import convert

TINY = "me/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def expected(tiny_model):
    return logits_of(tiny_model)


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    convert(tiny_checkpoint, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def on_hub(server, converted):
    server.repos[TINY] = Repo()
    server.repos[TINY].commit(converted)
    return {"pretrained_cfg_overlay": {"hf_hub_id": TINY, "num_classes": 10}, "num_classes": 10, "time_steps": 2}


@pytest.fixture
def at_url(server, tiny_checkpoint):
    server.files["tiny.pth"] = tiny_checkpoint.read_bytes()
    overlay = {"url": f"{server.url}/files/tiny.pth", "num_classes": 10}
    return {"pretrained_cfg_overlay": overlay, "num_classes": 10, "time_steps": 2}


def overlay_url(kwargs, url):
    return {**kwargs, "pretrained_cfg_overlay": {**kwargs["pretrained_cfg_overlay"], "url": url}}


def assert_helpful(outcome, *words):
    """The error names what was tried, the reason, and the other ways; the original exception is its cause."""
    assert outcome.get("type") == "WeightsError", outcome
    ways = ("create_model('test_qkformer'", "file='checkpoint.pth'", "timm-qkformer convert", "local-dir:")
    for part in (*words, *ways):
        assert part in outcome["error"]
    assert outcome["cause"] != "NoneType"


@pytest.fixture(params=["url", "hub"])
def origin(request, server):
    """How a model is asked for, the file's name, a part of each address, and what an error calls the place."""
    if request.param == "url":
        return request.getfixturevalue("at_url"), "tiny.pth", "tiny.pth", "/files/tiny.pth"
    return request.getfixturevalue("on_hub"), WEIGHTS, "/resolve/", f"Hub repository {TINY} at {server.url}"


class TestBoth:
    def test_second_call_comes_from_the_cache(self, server, client, origin, expected, tmp_path):
        kwargs, file, _, _ = origin
        for _ in range(2):
            assert client.load("test_qkformer", cache_dir=tmp_path, **kwargs) == {"logits": expected}
            assert len(server.requests("GET", file)) == 1
        assert file == WEIGHTS or [path.name for path in tmp_path.iterdir()] == [file]

    @pytest.mark.parametrize(
        ("status", "words"),
        [
            (401, "wants to know who asks (401)"),
            (403, "access is forbidden (403)"),
            (404, "nothing at that address (404)"),
            (429, "too many requests (429)"),
            (500, "the server failed (500)"),
            (503, "the server failed (503)"),
        ],
    )
    def test_refusals_have_their_sentence(self, server, client, origin, tmp_path, status, words):
        kwargs, _, address, place = origin
        server.faults.append(Fault(address, status=status))
        assert_helpful(client.load("test_qkformer", cache_dir=tmp_path, **kwargs), place, words)

    def test_silence(self, server, client, origin, tmp_path):
        kwargs, _, address, _ = origin
        server.faults.append(Fault(address, delay=3.0))
        assert_helpful(client.load("test_qkformer", cache_dir=tmp_path, **kwargs), "did not answer in time")


class TestUrl:
    def test_default_cache_is_that_of_torch_hub(self, server, client, at_url, expected):
        assert client.load("test_qkformer", **at_url) == {"logits": expected}
        assert (client.home / "torch" / "hub" / "checkpoints" / "tiny.pth").exists()

    def test_broken_transfer_is_resumed_where_it_broke(self, server, client, at_url, expected, tmp_path):
        server.faults.append(Fault("tiny.pth", cut=700_000, times=2))
        assert client.load("test_qkformer", cache_dir=tmp_path, **at_url) == {"logits": expected}
        assert server.requests("GET", "tiny.pth") == ["", "bytes=700000-", "bytes=1400000-"]

    def test_file_that_changed_in_between_is_taken_anew(self, server, client, at_url, expected, tmp_path):
        whole = server.files["tiny.pth"]
        server.files["tiny.pth"] = b"x" * 500
        server.faults.append(
            Fault("tiny.pth", cut=100, times=1, after=lambda: server.files.update({"tiny.pth": whole}))
        )
        assert client.load("test_qkformer", cache_dir=tmp_path, **at_url) == {"logits": expected}

    def test_transfer_that_keeps_breaking_leaves_nothing(self, server, client, at_url, expected, tmp_path):
        server.faults.append(Fault("tiny.pth", cut=1000))
        outcome = client.load("test_qkformer", cache_dir=tmp_path, **at_url)
        assert_helpful(outcome, "tiny.pth", "broke off after", "was not kept")
        assert not list(tmp_path.iterdir())
        server.faults.clear()
        assert client.load("test_qkformer", cache_dir=tmp_path, **at_url) == {"logits": expected}

    def test_wrong_hash_is_refused(self, server, client, at_url, expected, tmp_path):
        content = server.files["tiny.pth"]
        name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        server.files[name] = content
        named = overlay_url(at_url, f"{server.url}/files/{name}")
        server.faults.append(Fault(name, flip=True, times=1))
        assert_helpful(client.load("test_qkformer", cache_dir=tmp_path, **named), "has the sha256", "was not kept")
        assert not list(tmp_path.iterdir())
        assert client.load("test_qkformer", cache_dir=tmp_path, **named) == {"logits": expected}

    def test_refused_connections(self, server, client, at_url, tmp_path):
        nobody = overlay_url(at_url, "http://127.0.0.1:9/tiny.pth")
        assert_helpful(client.load("test_qkformer", cache_dir=tmp_path, **nobody), "no connection")

    def test_something_else_than_a_checkpoint(self, server, client, at_url, tmp_path):
        server.files["tiny.pth"] = b"<!DOCTYPE html>" * 100
        assert_helpful(client.load("test_qkformer", cache_dir=tmp_path, **at_url), "cannot be read as a checkpoint")
        assert not list(tmp_path.iterdir())


class TestHub:
    def test_hub_name_brings_its_own_arguments(self, server, client, on_hub, expected, tmp_path):
        assert client.load(f"hf-hub:{TINY}", cache_dir=tmp_path) == {"logits": expected}
        one_step = client.load(f"hf-hub:{TINY}", cache_dir=tmp_path, time_steps=1)
        assert one_step["logits"] != expected

    def test_transformers_loads_it(self, server, client, on_hub, expected):
        pytest.importorskip("transformers")
        assert client.transformers_logits(TINY) == expected

    def test_broken_transfer_is_repeated(self, server, client, on_hub, expected, tmp_path):
        server.faults.append(Fault(WEIGHTS, "GET", cut=300_000, times=1))
        assert client.load("test_qkformer", cache_dir=tmp_path, **on_hub) == {"logits": expected}
        assert len(server.requests("GET", WEIGHTS)) == 2

    def test_wrong_hash_is_refused(self, server, client, on_hub, expected, tmp_path):
        server.faults.append(Fault(WEIGHTS, "GET", flip=True, times=1))
        outcome = client.load("test_qkformer", cache_dir=tmp_path, **on_hub)
        assert_helpful(outcome, "has the sha256", "was not kept")
        assert client.load("test_qkformer", cache_dir=tmp_path, **on_hub) == {"logits": expected}
        assert len(server.requests("GET", WEIGHTS)) == 2

    def test_missing_repository(self, server, client, on_hub, tmp_path):
        server.repos.clear()
        assert_helpful(client.load("test_qkformer", cache_dir=tmp_path, **on_hub), "(404)")

    def test_pending_weights_say_so(self, server, client):
        outcome = client.load("qkformer_hst10_384.in1k")
        assert outcome["type"] == "WeightsError"
        ours = "timm-qkformer/qkformer_hst10_384.in1k"
        for words in (ours, "(404)", "not been uploaded yet", "timm-qkformer publish"):
            assert words in outcome["error"]

    def test_a_hub_that_cannot_be_reached_is_asked_once(self, server, tmp_path):
        """huggingface_hub's own retries, which another request would begin, take half a minute."""
        with socket.socket() as taken:  # not listening: connections are refused
            taken.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{taken.getsockname()[1]}"
            alone = Client(HF_ENDPOINT=address, HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET="1")
            try:
                outcome = alone.load("qkformer_hst10_384.in1k")
            finally:
                alone.close()
        assert outcome["type"] == "WeightsError"
        assert "no connection" in outcome["error"]
        assert "not been uploaded yet" in outcome["error"]
        assert outcome["naps"] == 0

    def test_offline(self, server, client, on_hub, expected, tmp_path):
        assert client.load("test_qkformer", cache_dir=tmp_path / "warm", **on_hub) == {"logits": expected}
        server.log.clear()
        offline = Client(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
        try:
            assert offline.load("test_qkformer", cache_dir=tmp_path / "warm", **on_hub) == {"logits": expected}
            assert offline.load(f"hf-hub:{TINY}", cache_dir=tmp_path / "warm")["type"] == "LocalEntryNotFoundError"
            outcome = offline.load("test_qkformer", cache_dir=tmp_path / "cold", **on_hub)
            assert_helpful(outcome, "HF_HUB_OFFLINE=1")
        finally:
            offline.close()
        assert server.log == []


class TestPublish:
    @pytest.fixture
    def folder(self, converted, tmp_path):
        (tmp_path / "folder").mkdir()
        for name, content in converted.items():
            (tmp_path / "folder" / name).write_bytes(content)
        return tmp_path / "folder"

    def test_uploads_what_it_shows_and_reads_it_back(self, server, client, folder, converted, expected, tmp_path):
        (folder / "notes.txt").write_text("mine")
        code, out, err = client.cli("publish", str(folder), TINY, "--private", answer="y")
        assert (code, server.repos[TINY].private) == (0, True), err
        assert server.repos[TINY].files("main") == converted
        assert f"{TINY} at {server.url} (new, private)" in out
        for name, content in converted.items():
            line = next(line for line in out.splitlines() if line.strip().startswith(name))
            assert f"{len(content):,} bytes" in line
            assert hashlib.sha256(content).hexdigest()[:16] in line
            assert server.requests("GET", name)  # read back
        assert "uploaded, read back and compared" in out
        assert client.load(f"hf-hub:{TINY}", cache_dir=tmp_path) == {"logits": expected}

    def test_says_what_it_replaces(self, server, client, folder, converted):
        server.repos[TINY] = Repo()
        server.repos[TINY].commit({**converted, "README.md": b"old", "other.bin": b"kept"})
        code, out, _ = client.cli("publish", str(folder), TINY, "--yes")
        assert code == 0
        assert "replaces one of 3 bytes" in out
        assert out.count("already there") == 2
        assert server.repos[TINY].files("main") == {**converted, "other.bin": b"kept"}
        assert not server.requests("PUT", "/upload/")  # the weights were there

    @pytest.mark.parametrize(
        ("answer", "words"), [("n", "not confirmed"), ("", "not confirmed"), (None, "not a terminal")]
    )
    def test_uploads_nothing_without_a_yes(self, server, client, folder, answer, words):
        code, _, err = client.cli("publish", str(folder), TINY, answer=answer)
        assert code == 2
        assert words in err
        assert err.startswith("timm-qkformer: error: ")
        assert not server.repos

    def test_difference_after_the_upload_is_an_error(self, server, client, folder):
        server.faults.append(Fault(WEIGHTS, "GET", flip=True))
        code, out, err = client.cli("publish", str(folder), TINY, "--yes")
        assert code == 2
        assert "holds another model.safetensors than was uploaded" in err
        assert "compared" not in out

    @pytest.mark.parametrize("status", [401, 403, 500])
    def test_refusals_have_their_sentence(self, server, client, folder, status):
        server.faults.append(Fault("/api/repos/create", status=status))
        code, _, err = client.cli("publish", str(folder), TINY, "--yes")
        assert code == 2
        assert f"({status})" in err
        assert "Traceback" not in err

    def test_public_repository_stays_as_it_is(self, server, client, folder):
        server.repos[TINY] = Repo()
        code, _, err = client.cli("publish", str(folder), TINY, "--yes", "--private")
        assert code == 2
        assert "exists and is public" in err

    def test_folders_that_are_not_fit(self, server, client, folder, tmp_path):
        for prepare, words in [
            (lambda: (folder / WEIGHTS).write_bytes(b"broken"), "does not load with timm"),
            (lambda: (folder / "README.md").unlink(), "has no README.md"),
        ]:
            prepare()
            code, _, err = client.cli("publish", str(folder), TINY, "--yes")
            assert code == 2
            assert words in err
        assert not server.log


def test_real_name_from_checkpoint_to_pretrained(server, client, tmp_path):
    """What a holder of the authors' weights and then everyone else does, with the real architecture and name."""
    torch.manual_seed(4)
    model = timm.create_model("qkformer_hst10_384", num_classes=1000).eval()
    torch.save({"model": release_state_dict(model)}, tmp_path / "checkpoint.pth")
    name = "timm-qkformer/qkformer_hst10_384.in1k"
    code, out, err = client.cli("convert", str(tmp_path / "checkpoint.pth"), str(tmp_path / "out"), "--tag", "in1k")
    assert code == 0, err
    assert "qkformer_hst10_384" in out
    code, _, err = client.cli("publish", str(tmp_path / "out"), name, "--yes")
    assert code == 0, err
    server.log.clear()
    server.faults.append(Fault(WEIGHTS, "GET", cut=25_000_000, times=1))
    outcome = client.load("qkformer_hst10_384.in1k", cache_dir=tmp_path / "cache")
    assert outcome == {"logits": logits_of(model)}
    assert server.requests("GET", WEIGHTS) == ["", f"bytes={20 << 20}-"]  # the client writes 10 MiB at a time
