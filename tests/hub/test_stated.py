"""What a checkpoint or a folder states: taken, or refused by name; never exchanged for something else in silence."""

import argparse
import json

import pytest
import timm
import torch
from PIL import Image

from timm_qkformer import cli
from timm_qkformer.hub import CheckpointError, convert, publish, verify
from timm_qkformer.hub.folder import check_folder
from timm_qkformer.hub.loading import load_model
from timm_qkformer.hub.publish import PublishError

SMALL = {"embed_dims": [8, 16, 32], "depths": [1, 1, 1], "time_steps": 2}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return timm.create_model("test_qkformer", num_classes=3, **SMALL).eval()


def written(path, model, name="test_qkformer", kwargs=None, trainer=None, **args):
    """A checkpoint as a training of timm's train.py or this package's writes it."""
    content = {"state_dict": model.state_dict(), "arch": name, "epoch": 0}
    content["args"] = argparse.Namespace(model=name, model_kwargs=SMALL if kwargs is None else kwargs, **args)
    if trainer is not None:
        content["trainer"] = trainer
    torch.save(content, path)
    return path


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


class TestArguments:
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"neuron": "my_neuron"}, "my_neuron"),
            ({"depths": [-1, 1, 1]}, "depths=|0 to 512"),
            ({"depths": "many"}, "test_qkformer"),
            ({"depths": [1, [10**6], 1]}, "test_qkformer|1048576|numbers up to"),
            ({"time_steps": 2**70}, "time_steps="),
            ({"time_steps": 10**9}, "time_steps=1000000000"),
            ({"time_steps": "4"}, "time_steps='4'"),
            ({"num_heads": 0}, "test_qkformer"),
            ({"mlp_ratio": float("inf")}, "mlp_ratio=inf: a finite number"),
            ({"global_pool": 7}, "test_qkformer"),
            ({"no_such_argument": 1}, "no_such_argument"),
            ({"pretrained": True}, "pretrained"),
            ({"attn": {"a": {"b": {"c": {"d": {"e": 1}}}}}}, "model_kwargs"),
        ],
    )
    def test_a_named_model_is_never_exchanged_for_another(self, bad, message, trained, tmp_path):
        path = written(tmp_path / "x.pth", timm.create_model("test_qkformer", num_classes=3), kwargs=bad)
        for take in (lambda: convert(path, tmp_path / "out"), lambda: load_model(str(path))):
            with pytest.raises(ValueError, match=message):
                take()
        assert not (tmp_path / "out").exists()

    def test_the_entry_arch_names_it_too_and_tags_do_not_matter(self, tmp_path):
        model = timm.create_model("test_qkformer_ms", num_classes=3)
        torch.save({"state_dict": model.state_dict(), "arch": "test_qkformer_ms"}, tmp_path / "x.pth")
        assert convert(tmp_path / "x.pth", tmp_path / "a").model == "test_qkformer_ms"
        written(tmp_path / "y.pth", model, "test_qkformer_ms.mine", {})
        assert load_model(str(tmp_path / "y.pth")).name == "test_qkformer_ms"

    def test_another_librarys_model_is_refused_by_name(self, tmp_path):
        path = written(tmp_path / "x.pth", timm.create_model("test_qkformer", num_classes=3), "test_vit", {})
        with pytest.raises(CheckpointError, match="names the model test_vit, which is none of this package's"):
            convert(path, tmp_path / "out")
        assert convert(path, tmp_path / "out", model="test_qkformer").model == "test_qkformer"

    def test_where_several_fit_a_warning_says_so(self, tmp_path, caplog):
        torch.save(timm.create_model("test_qkformer", num_classes=3).state_dict(), tmp_path / "x.pth")
        assert load_model(str(tmp_path / "x.pth")).name == "test_qkformer"
        assert "the same tensors fit test_qkformer_ms" in caplog.text
        report = convert(tmp_path / "x.pth", tmp_path / "out").report
        assert any(line.startswith("warning: the same tensors fit test_qkformer_ms") for line in report)

    @pytest.mark.parametrize(
        ("key", "wrap"),
        [("state_dict", "model."), ("model_state_dict", "net."), ("net", "module.model."), ("model", "_orig_mod.")],
    )
    def test_what_others_wrap_a_model_in(self, wrap, key, tmp_path):
        state = {
            f"{wrap}{name}": t for name, t in timm.create_model("test_qkformer", num_classes=3).state_dict().items()
        }
        if wrap == "module.model.":
            state["n_averaged"] = torch.tensor(7)
        torch.save({key: state, "epoch": 1}, tmp_path / "x.pth")
        loaded = load_model(str(tmp_path / "x.pth")).model
        assert torch.equal(loaded.head.weight, state[f"{wrap}head.weight"])


class TestLabels:
    def test_own_weights_have_own_names_and_no_licence(self, tmp_path):
        model = timm.create_model("qkformer_hst3_192", num_classes=10, depths=[1, 1, 1], embed_dims=[8, 16, 32])
        kwargs = {"depths": [1, 1, 1], "embed_dims": [8, 16, 32]}
        names = [f"mushroom {i}`" for i in range(10)]
        path = written(tmp_path / "x.pth", model, "qkformer_hst3_192", kwargs, {"class_names": names})
        convert(path, tmp_path / "out")
        config = config_of(tmp_path / "out")
        assert config["label_names"] == names
        assert not {"license", "label_names"} & config["pretrained_cfg"].keys()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "license: unknown" in card
        assert "(mushroom 0_, mushroom 1_" in card
        convert(written(path, model, "qkformer_hst3_192", kwargs), tmp_path / "out", force=True)
        assert (
            "airplane"
            not in (tmp_path / "out" / "config.json").read_text() + (tmp_path / "out" / "README.md").read_text()
        )
        convert(path, tmp_path / "out", force=True, tag="cifar10")
        assert "apache" not in (tmp_path / "out" / "config.json").read_text()

    def test_a_tags_own_file_keeps_them(self, tmp_path):
        source = timm.get_pretrained_cfg("qkformer_hst3_192.cifar10").file
        done = convert(type(tmp_path)(source), tmp_path / "out", model="qkformer_hst3_192")
        config = config_of(tmp_path / "out")
        assert (done.tag, config["label_names"][9]) == ("cifar10", "truck")
        assert config["pretrained_cfg"]["license"] == "apache-2.0"


DATA = {"input_size": [3, 33, 47], "crop_pct": 0.5, "interpolation": "bilinear", "mean": [0.5], "std": [0.25]}


class TestData:
    def test_a_folder_sees_what_the_checkpoint_saw(self, trained, tmp_path):
        path = written(tmp_path / "x.pth", trained, **DATA)
        convert(path, tmp_path / "out")
        expected = timm.data.resolve_data_config(DATA, model=trained)
        for source in (path, tmp_path / "out"):
            config = timm.data.resolve_model_data_config(load_model(str(source)).model)
            assert json.dumps({key: config[key] for key in expected}) == json.dumps(expected)

    @pytest.mark.parametrize(
        ("args", "size"),
        [
            ({"dataset": "events/nmnist"}, (34, 34)),
            ({"dataset": "events/folder", "event_sensor_size": [26, 34], "img_size": 99}, (26, 34)),
            ({"dataset": "events/folder", "input_size": [2, 20, 30]}, (20, 30)),
        ],
    )
    def test_clips_too(self, args, size, tmp_path):
        model = timm.create_model("test_qkformer", num_classes=3, in_chans=2, **SMALL)
        path = written(tmp_path / "x.pth", model, **args)
        convert(path, tmp_path / "out")
        for source in (path, tmp_path / "out"):
            config = timm.data.resolve_model_data_config(load_model(str(source)).model)
            assert config["input_size"] == (2, *size)
            assert [*config["mean"], *config["std"]] == [0.0, 0.0, 1.0, 1.0]


def poisoned(config, where, value):
    *path, last = where.split(".")
    for key in path:
        config = config[key]
    config[last] = value


ODD = (
    ("architecture", "nothing"), ("architecture", 3), ("pretrained_cfg", []), ("pretrained_cfg.unknown", 1),
    ("pretrained_cfg.hf_hub_id", "me/other"), ("pretrained_cfg.input_size", [3, 10**9, 4]),
    ("pretrained_cfg.mean", "x"), ("pretrained_cfg.interpolation", 5), ("pretrained_cfg.crop_pct", 0),
    ("pretrained_cfg.std", [0.0]), ("model_args", [1]), ("model_args.depths", [10**6, 1, 1]),
    ("model_args.depths", [400, 1, 1]), ("model_args.embed_dims", [2**19, 2**20, 2**20]),
    ("model_args.neuron", "x\x1b[31m"), ("model_args.time_steps", 10**9), ("model_args.in_chans", "3"),
    ("model_args.checkpoint_path", "/etc/passwd"), ("num_classes", -1), ("num_classes", 10**9),
    ("num_classes", 4), ("label_names", 7),
)  # fmt: skip


class TestFolders:
    def test_an_odd_config_is_one_line(self, trained, tmp_path, capsys):
        folder = tmp_path / "out"
        convert(written(tmp_path / "x.pth", trained), folder)
        check_folder(folder)
        honest = (folder / "config.json").read_text()
        for where, value in ODD:
            config = json.loads(honest)
            poisoned(config, where, value)
            (folder / "config.json").write_text(json.dumps(config))
            assert cli.main(["profile", str(folder)]) == 2, where
            err = capsys.readouterr().err
            assert "config.json: " in err
            assert "\x1b" not in err

    @pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, "null", "\x00", '{"architecture": 1e999}'])
    def test_what_is_no_config(self, text, tmp_path):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: "):
            load_model(str(tmp_path))
        with pytest.raises(ValueError, match=r"config\.json: "):
            verify(str(tmp_path), tmp_path)

    def test_links_are_not_published(self, trained, tmp_path):
        convert(written(tmp_path / "x.pth", trained), tmp_path / "out")
        (tmp_path / "secret").write_text("key")
        (tmp_path / "out" / "README.md").unlink()
        (tmp_path / "out" / "README.md").symlink_to(tmp_path / "secret")
        with pytest.raises(PublishError, match=r"README\.md is a link to .*secret"):
            publish(tmp_path / "out", "me/model", confirm=lambda plan: pytest.fail(plan))


class TestNames:
    def test_unknown_tags_are_one_line(self, tmp_path, capsys):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        name = "qkformer_hst3_192.foo"
        for line in (
            ["profile", name],
            ["visualize", name, str(tmp_path / "a.png")],
            ["verify", name, "--data", str(tmp_path)],
            ["validate", name, "--data-dir", str(tmp_path), "--device", "cpu"],
            ["train", "--model", name, "--data-dir", str(tmp_path), "--device", "cpu", "--output", str(tmp_path)],
        ):
            assert cli.main(line) == 2
            assert (
                "has no pretrained tag 'foo'; those that it has: qkformer_hst3_192.cifar10" in capsys.readouterr().err
            )

    def test_control_characters_stay_in_the_file(self, trained, tmp_path, capsys):
        state = {**trained.state_dict(), "evil\x1b[2J\nerror": torch.zeros(1)}
        torch.save(state, tmp_path / "x\x1b.pth")
        assert cli.main(["convert", str(tmp_path / "x\x1b.pth"), str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert "\x1b" not in err
        assert err.count("\n") == 1
        with pytest.raises(ValueError, match="tag='a`b' needs to be"):
            convert(tmp_path / "x\x1b.pth", tmp_path / "out", tag="a`b")
        written(tmp_path / "`x`\n# y.pth", trained)
        convert(tmp_path / "`x`\n# y.pth", tmp_path / "out")
        assert "**File:** `'x'\\n# y.pth`, " in (tmp_path / "out" / "README.md").read_text()

    def test_four_channels_are_not_images(self, tmp_path):
        model = timm.create_model("test_qkformer", num_classes=3, in_chans=4, **SMALL)
        convert(written(tmp_path / "x.pth", model), tmp_path / "out")
        for i in range(3):
            (tmp_path / "data" / str(i)).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / str(i) / "a.png")
        with pytest.raises(ValueError, match="takes 4 channels, images have 1 or 3"):
            verify(str(tmp_path / "out"), tmp_path / "data", workers=0, quiet=True)

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main(["--version"])
        assert end.value.code == 0
        assert f"torch {torch.__version__.partition('+')[0]}" in capsys.readouterr().out
