"""The app: what it shows of a file; and, marked slow, a server with Gradio's own client."""

import ast
import json
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from PIL import Image

pytest.importorskip("matplotlib")

from timm_qkformer import cli
from timm_qkformer.analysis.inputs import ModelInputs
from timm_qkformer.app.look import EXIT, Models, look_at
from timm_qkformer.streaming import ExitRule, anytime

MODEL = "qkformer_hst3_192.cifar10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A frog, a recording, and files that are neither."""
    folder = tmp_path_factory.mktemp("files")
    with Image.open(files("timm_qkformer") / "training/demo/cifar10.png") as sheet:
        sheet.crop((192, 0, 224, 32)).save(folder / "frog.png")
    rng = np.random.default_rng(0)
    t, x, y = np.sort(rng.integers(0, 1000, 500)), rng.integers(0, 34, 500), rng.integers(0, 34, 500)
    np.savez(folder / "events.npz", t=t, x=x, y=y, p=rng.integers(0, 2, 500))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("hello")
    return folder


def test_a_look_at_a_photograph(folder, monkeypatch):
    loaded = Models()[MODEL]
    cfg = {**loaded.model.pretrained_cfg, "notes": ("anytime: confidence 0.6, T = 4",)}
    monkeypatch.setattr(loaded.model, "pretrained_cfg", cfg)
    seen = look_at(loaded, folder / "frog.png")
    assert max(seen.answer, key=seen.answer.get) == "frog"
    assert seen.probabilities.shape == (4, 10)
    assert np.allclose(seen.probabilities.sum(1), 1.0)
    answers = seen.probabilities.argmax(1).tolist()
    assert all(answer == answers[-1] for answer in answers[seen.settled - 1 :])
    assert seen.settled == 1 or answers[seen.settled - 2] != answers[-1]
    assert len(seen.attention) == 2
    assert "µJ" in seen.summary

    logits, steps = anytime(loaded.model)(ModelInputs(loaded.model).read(folder / "frog.png").x)
    assert seen.exit_step == steps.item()
    assert np.allclose(seen.probabilities[seen.exit_step - 1], logits[0].softmax(0), atol=1e-5)
    early = seen.names[logits.argmax()]
    assert seen.sentence == (
        f"**frog**, from time step {seen.settled} of 4 on. Anytime inference (confidence of at least 0.6) stops after "
        f"step {seen.exit_step} with {early}."
    )
    never = replace(seen, rule=ExitRule("entropy", 0.0), exit_step=4)
    assert never.sentence.endswith("Anytime inference (entropy of at most 0) takes them all.")
    assert replace(seen, probabilities=seen.probabilities[-1:]).sentence == "**frog**, in a single time step."


@pytest.mark.slow
def test_a_look_at_a_recording(folder):
    seen = look_at(Models()["qkformer_hst3_128.nmnist"], folder / "events.npz", (34, 34))
    assert seen.probabilities.shape == (8, 10)
    assert seen.rule == EXIT


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("broken.png", MODEL, "broken.png"),
        ("notes.txt", MODEL, "neither an image nor a recording"),
        ("events.npz", MODEL, "takes 3 channels, not 2"),
        ("frog.png", "qkformer_hst3_128.nmnist", "takes 2 channels"),
    ],
)
def test_files_that_do_not_suit(folder, name, model, message):
    with pytest.raises((OSError, ValueError), match=message):
        look_at(Models()[model], folder / name, (34, 34))


def test_models_that_are_not_offered():
    assert Models().names[:2] == ["qkformer_hst2_224.cifar10", MODEL]  # the page begins with a model of pictures
    with pytest.raises(ValueError, match="not offered here"):
        Models()["../secret"]


def test_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert cli.main(["app"]) == 2
    assert "pip install 'timm-qkformer[app]'" in capsys.readouterr().err


def test_the_space_is_this_page():
    """A Hugging Face Space reads its settings from the head of README.md."""
    space = Path(__file__).parents[1] / "space"
    head = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert head["sdk"] == "gradio"
    assert int(str(head["sdk_version"]).split(".")[0]) >= 6  # as the extra asks for
    code = ast.parse((space / head["app_file"]).read_text())
    imported = {node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
    assert imported == {"timm_qkformer.app.look", "timm_qkformer.app.page"}
    assert (space / "requirements.txt").read_text().split() == ["timm-qkformer[app]"]


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio")
    from timm_qkformer.app.page import serve

    return serve(Models(), wait=False)


def ask(address, path, model=MODEL):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    return client.predict(handle_file(path), model, 34, 34, api_name="/look")


@pytest.mark.slow
def test_a_user_uploads_and_sees(address, folder):
    said, label, steps, summary, *pictures = ask(address, folder / "frog.png")
    assert said.startswith("**frog**, from time step")
    assert label["label"] == "frog"
    assert steps["plot"].startswith("data:image/")
    assert "synaptic operations" in summary
    assert all(picture["plot"].startswith("data:image/") for picture in pictures)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["broken.png", "notes.txt"])
def test_a_bad_file_gets_a_message_without_the_servers_paths(address, folder, name):
    with pytest.raises(Exception, match=name) as error:
        ask(address, folder / name)
    assert "Traceback" not in str(error.value)
    assert str(Path("/tmp")) + "/" not in str(error.value)


@pytest.mark.slow
def test_two_users_at_once(address, folder):
    answers = {}

    def use(path, model):
        answers[path.name] = ask(address, path, model)[0]

    both = [(folder / "frog.png", MODEL), (folder / "events.npz", "qkformer_hst3_128.nmnist")]
    threads = [threading.Thread(target=use, args=pair) for pair in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert answers["frog.png"].startswith("**frog**")
    assert "of 8 on" in answers["events.npz"]


@contextmanager
def chromium():
    """A browser that nobody sees. Needs Chromium and selenium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.mark.slow
def test_in_a_browser(address, folder):
    """Upload, result, a bad file; nothing is asked of any other host."""
    with chromium() as browser:
        browser.get(address)
        _upload_and_look(browser, folder / "frog.png")
        _wait_for_text(browser, "Anytime inference")
        assert "frog, from time step" in _text(browser)
        until = time.monotonic() + 60
        while sum(_is_drawn(picture) for picture in browser.find_elements("css selector", "img")) < 4:
            assert time.monotonic() < until, "pictures by step, of two layers of attention, and the raster"
            time.sleep(0.2)
        browser.get(address)
        _upload_and_look(browser, folder / "notes.txt")
        _wait_for_text(browser, "neither an image nor a recording")
        assert "Traceback" not in _text(browser)
        sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        hosts = {urlsplit(url).hostname for url in urls if url.startswith("http")}
        assert hosts == {urlsplit(address).hostname}


@pytest.mark.slow
def test_two_browsers_at_once(address, folder):
    """Each of two users sees the answer to the own file."""
    with chromium() as one, chromium() as other:
        for browser in (one, other):
            browser.get(address)
        _upload_and_look(one, folder / "frog.png")
        _upload_and_look(other, folder / "broken.png")
        _wait_for_text(one, "from time step")
        _wait_for_text(other, "is not a readable image")
        assert "frog" in _text(one)
        assert "from time step" not in _text(other)
        assert "is not a readable image" not in _text(one)


def _is_drawn(picture):
    return (picture.get_attribute("src") or "").startswith("data:image") and picture.get_property("naturalWidth") > 100


def _text(browser):
    return browser.find_element("tag name", "body").text


def _wait_for_text(browser, text):
    until = time.monotonic() + 120
    while text not in _text(browser):
        assert time.monotonic() < until, _text(browser)
        time.sleep(0.2)


def _upload_and_look(browser, path):
    _first(browser, "input[type=file]").send_keys(str(path))
    _wait_for_text(browser, path.stem)
    _first(browser, "button", "look").click()


def _first(browser, selector, text=None):
    """An element with this text, if one is given, once it is there: the page builds itself bit by bit."""
    stale = pytest.importorskip("selenium.common.exceptions").StaleElementReferenceException
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with suppress(stale):
            for element in browser.find_elements("css selector", selector):
                if text is None or element.text.strip() == text:
                    return element
        time.sleep(0.2)
    raise AssertionError(f"no {selector} {text or ''} in: {_text(browser)}")
