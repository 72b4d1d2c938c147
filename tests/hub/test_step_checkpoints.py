"""Checkpoints of STEP (github.com/Fancyssc/STEP) in BrainCog's layout: names like the releases', and constants."""

import argparse
import re
import sys

import pytest
import timm
import torch

from release import in_release_order, release_state_dict
from timm_qkformer.hub import CheckpointError, convert, read_checkpoint
from timm_qkformer.hub.infer import infer_architecture


def with_constants(tensors):
    """A threshold and a surrogate's slope for the neurons behind each batch norm, and for attention's before `proj`."""
    out = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(.*\.\w*(?:ssa|attn)\.)proj_(?:conv|linear)\.weight", name):
            attention = f"{found[1]}attn_lif"
            out |= {f"{attention}.threshold": torch.tensor(0.5), f"{attention}.act_fun.alpha": torch.tensor(4.0)}
        out[name] = tensor
        if found := re.fullmatch(r"(.*?)_?bn(\d?)\.num_batches_tracked", name):
            neuron = f"{found[1]}_lif{found[2]}"
            out |= {f"{neuron}.threshold": torch.tensor(1.0), f"{neuron}.act_fun.alpha": torch.tensor(4.0)}
    return out


def step_qkformer(model):
    names = in_release_order(release_state_dict(model, "cifar")).items()
    return with_constants({re.sub(r"mlp\.mlp([12])_(conv|bn)", r"mlp.fc_\2\1", name): value for name, value in names})


def step_spikformer(model):
    """`proj_conv`, `proj_conv1`, ..., Linear layers in the blocks, nothing that is never used."""
    out, last = {}, len(model.stages[0].embed.main)
    for name, value in model.state_dict().items():
        parts = name.split(".")
        layer, rest = parts[-2:]
        if parts[0] == "head":
            out[name] = value
        elif parts[0] == "stem":
            out[f"patch_embed.proj_{layer}.{rest}"] = value
        elif parts[2] == "embed":
            number = int(parts[4]) + 1 if parts[3] == "main" else last + 1
            out[f"patch_embed.{f'proj_{layer}{number}' if number <= last else f'rpe_{layer}'}.{rest}"] = value
        else:
            kind = "linear" if layer == "conv" else layer
            matrix = value[:, :, 0, 0] if value.ndim == 4 else value
            out[f"block.{parts[3]}.{parts[4]}.{parts[5]}_{kind}.{rest}"] = matrix
    return with_constants(in_release_order(out))


@pytest.fixture(
    params=[("qkformer_hst4_384", step_qkformer), ("spikformer_4_384", step_spikformer)], ids=["qk", "spik"]
)
def released(request):
    name, spell = request.param
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100).eval()
    for key, value in model.state_dict().items():
        if key.endswith("bn.bias"):
            value.normal_(0.4, 0.3)
    return name, model, spell(model)


def test_recognised_by_name_with_its_own_answers(released, tmp_path):
    name, model, tensors = released
    args = argparse.Namespace(model=f"{name.partition('_')[0]}_cifar", step=2, num_heads=8 if "qk" in name else 12)
    torch.save({"arch": args.model, "state_dict": tensors, "args": args}, tmp_path / "x.pth.tar")
    done = convert(tmp_path / "x.pth.tar", tmp_path / "out")
    assert (done.model, done.model_args["time_steps"]) == (name, 2)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    model.set_time_steps(2)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert model(x).std() > 0


def test_strictly(released):
    name, _, tensors = released
    neuron = next(key for key in tensors if key.endswith("k_lif.threshold"))
    attention = next(key for key in tensors if key.endswith("attn_lif.threshold"))
    mlp = next(key for key in tensors if "mlp" in key and key.endswith(".bias"))
    for change, said in (
        ({neuron: torch.tensor(0.7)}, f"{neuron.removesuffix('.threshold')} 0.7"),
        ({attention: torch.tensor(1.0)}, f"{attention.removesuffix('.threshold')} 1;"),
        ({"block.9.attn.w": torch.zeros(1)}, "block.9.attn.w"),
        ({mlp: None}, "missing"),
    ):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        model = timm.create_model(name, device="meta", num_classes=100)
        with pytest.raises(ValueError, match=re.escape(said)):
            filter_of(name)({"state_dict": changed}, model)


def filter_of(name):
    return sys.modules[timm.models.model_entrypoint(name).__module__].checkpoint_filter_fn


def test_by_position(released):
    name, _, tensors = released
    model = timm.create_model(name, device="meta", num_classes=100)
    expected = filter_of(name)(tensors, model)
    strange = {f"t{i}": tensor for i, tensor in enumerate(tensors.values())}
    found = filter_of(name)(strange, model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    place = next(i for i, key in enumerate(tensors) if key.endswith("attn_lif.threshold"))
    with pytest.raises(ValueError, match=r"other thresholds than the model's 0\.5: \S+attn_lif 1;"):
        filter_of(name)({**strange, f"t{place}": torch.tensor(1.0)}, model)


def test_thresholds_of_its_training_are_given(tmp_path):
    model = timm.create_model("qkformer_hst4_384", num_classes=10)
    tensors = step_qkformer(model)
    halved = {k: v / 2 if k.endswith("threshold") and "attn" not in k else v for k, v in tensors.items()}
    torch.save({"state_dict": halved}, tmp_path / "x.pth")
    file, given = read_checkpoint(tmp_path / "x.pth"), {"neuron_args": {"v_threshold": 0.5}}
    with pytest.raises(CheckpointError, match="other thresholds than the model's 1"):
        infer_architecture(file, "qkformer_hst4_384")
    assert infer_architecture(file, "qkformer_hst4_384", model_args=given).model_args == given
