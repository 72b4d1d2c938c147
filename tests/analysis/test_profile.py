"""The profile: one pass, tables, JSON, a page of HTML that stands for itself, and the command."""

import base64
import json
import re
from dataclasses import fields
from html.parser import HTMLParser

import pytest
import timm
import torch
from PIL import Image

from timm_qkformer import cli
from timm_qkformer.analysis import energy, firing_rates
from timm_qkformer.analysis.inputs import file_data, noise_data
from timm_qkformer.analysis.profile import html_report, profile, text_report
from tiny import images, tiny


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = tiny("test_qkformer")
    x = images(3)
    result = profile(model, x.split(2), name="some <model>", weights="of my own", data_name="noise", batch_size=5)
    return model, x, result


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        pixels = torch.randint(0, 256, (70, 80, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        path = tmp_path / "pictures" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "pictures"


def test_one_pass_gives_what_single_measurements_give(measured):
    model, x, result = measured
    assert result.rates == firing_rates(model, x)
    assert result.energy == energy(model, x)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.speed.batch_size == 5  # of three samples: the first ones again
    assert result.speed.per_second > 0
    assert result.peak_bytes > sum(p.nbytes for p in model.parameters())
    assert repr(result).startswith("Profile(some <model>, of my own, on noise: FiringRates(mean 0.")
    assert "\n" not in repr(result)


def test_rates_of_neurons_that_fire_several_times_are_shares_of_the_spikes_that_could_be():
    torch.manual_seed(0)
    model, x, counted = tiny("test_qkformer", neuron="ilif", neuron_args={"max_spikes": 3}), images(2), []
    hook = model.stem.neuron.register_forward_hook(lambda module, args, spikes: counted.append(spikes))
    with torch.no_grad():
        model(x)
    hook.remove()
    rate = firing_rates(model, x)["stem.neuron"]
    assert counted[0].max() > 1
    assert rate.mean == pytest.approx(counted[0].mean().item() / 3)
    assert rate.neurons == counted[0][0, 0].numel()


def test_a_generator_is_read_once(measured):
    model, x, result = measured
    assert profile(model, iter(x)).rates == result.rates


def test_json_has_every_number(measured):
    content = json.loads(json.dumps(measured[2].to_dict()))
    assert content["rates"]["layers"][0]["step_means"] == list(measured[2].rates.layers[0].step_means)
    assert content["energy"]["pj"] == measured[2].energy.pj
    assert set(content) == {field.name for field in fields(measured[2])}


def test_table(measured):
    text = text_report(measured[2])
    layer = measured[2].rates["stages.0.blocks.0.attn.q.neuron"]
    (line,) = (line for line in text.splitlines() if line.endswith(layer.path))
    assert line.startswith("stage 1, block 1")
    assert f"{layer.mean:.4f}" in line
    assert "random" not in text


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.pictures, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.pictures.append(value)

    def handle_data(self, data):
        self.text += data


def test_page_stands_for_itself(measured):
    from timm_qkformer.analysis.drawing import draw_energy, draw_rates

    result = measured[2]
    text = html_report(result, {"Rates": draw_rates(result.rates), "Energy & more": draw_energy(result.energy)})
    page = Page(text)
    assert len(page.pictures) == 2
    for source in page.pictures:
        prefix = "data:image/png;base64,"
        assert source.startswith(prefix)
        assert base64.b64decode(source.removeprefix(prefix)).startswith(b"\x89PNG")
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", re.sub(r'src="[^"]*"', "", text))
    assert "some <model>: profile" in page.text
    assert "Energy & more" in page.text
    assert all(layer.path in page.text for layer in result.rates.layers)


@pytest.mark.parametrize("args", [{"batch_size": 0}, {"rounds": 1}])
def test_bad_arguments(args):
    with pytest.raises(ValueError, match="must be at least 1, rounds="):
        profile(tiny("test_qkformer"), images(1), **args)


def test_noise_says_what_it_is():
    name, samples = noise_data(timm.create_model("test_maxformer"), 2)
    assert "2 images of random noise" in name
    assert "no real images" in name
    first = [x.clone() for x in samples]
    assert [x.shape for x in first] == [(1, 3, 64, 64)] * 2
    assert all(map(torch.equal, first, noise_data(timm.create_model("test_maxformer"), 2)[1]))
    events = timm.create_model("qkformer_hst2_256", device="meta", time_steps=5)
    name, samples = noise_data(events, 1)
    clip = next(samples)
    assert "no real recordings" in name
    assert clip.shape == (1, 5, 2, 128, 128)
    assert torch.equal(clip, clip.round())


def test_files_as_the_model_takes_them(folder):
    model = timm.create_model("test_maxformer")
    name, samples = file_data(model, folder)
    assert name == "5 files of pictures"
    assert [x.shape for x in samples] == [(1, 3, 64, 64)] * 5
    name, samples = file_data(model, folder, limit=2)
    assert name == "2 of 5 files of pictures, drawn at random"
    assert len(list(samples)) == 2
    with pytest.raises(ValueError, match="limit=0"):
        file_data(model, folder, limit=0)


def test_command(folder, tmp_path, capsys):
    files = [str(tmp_path / "new" / name) for name in ("profile.json", "profile.html")]
    args = ["profile", "test_qkformer", "--random", "--data", str(folder), "--json", files[0], "--html", files[1]]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert out.startswith("NOTE: The weights are random")
    assert "5 files of pictures" in out
    content = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert content["rates"]["samples"] == 5
    assert content["is_random"]
    page = Page((tmp_path / "new" / "profile.html").read_text())
    assert "The weights are random" in page.text
    assert len(page.pictures) == 5  # two charts, two layers' masks, queries and keys
    # Nothing is overwritten.
    assert cli.main(args) == 2
    assert "exist already" in capsys.readouterr().err


def test_command_with_weights_of_a_file(tmp_path, capsys):
    model = timm.create_model("test_qkformer", time_steps=2)
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    args = ["profile", "test_qkformer", "--checkpoint", str(tmp_path / "trained.pth"), "--time-steps", "2"]
    assert cli.main([*args, "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "NOTE" not in out
    assert "weights of trained.pth" in out
    assert "1 images of random noise" in out
    assert "T = 2" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuchmodel"], "'nosuchmodel' is neither a registered model"),
        (["test_qkformer", "--data", "nowhere"], "nowhere does not exist"),
        (["test_qkformer", "--limit", "0"], "samples=0 must be at least 1"),
        (["test_qkformer", "--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["test_qkformer", "--device", "nothing"], "device='nothing' cannot be used: "),
        (["test_qkformer", "--time-steps", "0"], "time_steps=0"),
    ],
)
def test_command_refuses_in_one_line(args, message, capsys):
    assert cli.main(["profile", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
