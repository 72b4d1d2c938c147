"""Flat models: parameter counts, checkpoints of their releases, and what every model does, on tiny ones."""

import json
import sys

import pytest
import timm
import torch

from golden import FLAT_CASES, SHARED
from timm_qkformer import deploy, quantize_weights
from timm_qkformer.analysis import energy
from timm_qkformer.execution import execution_policy
from timm_qkformer.layers import SpikingChain, SpikingPatchEmbed
from timm_qkformer.neurons import LIF, run_with_state
from tiny import images, tiny

PARAMS = {
    "spikformer_8_384": 16_816_024, "spikformer_8_512": 29_689_384, "spikformer_8_768": 66_338_632,
    "spikformer_4_384": 9_324_730, "spikformer_4_256": 4_155_178, "spikformer_2_384": 5_765_050,
    "spikformer_2_256_dvs": 2_566_666, "spikformer_4_384_cml": 9_324_730,
    "spikingformer_8_512": 29_689_384, "spikingformer_4_384": 9_320_122, "spikingformer_4_256": 4_152_106,
    "spikingformer_2_384": 5_762_746, "spikingformer_2_256_dvs": 2_566_666, "spikingformer_8_768_cml": 66_338_632,
    "sdt_8_384": 16_816_024, "sdt_6_512": 23_373_352, "sdt_8_512": 29_689_384, "sdt_10_512": 36_005_416,
    "sdt_8_768": 66_338_632, "sdt_2_512": 10_233_418, "sdt_2_256": 2_566_954, "sdt_2_256_dvs": 2_566_666,
    "sdt_2_256_gesture": 2_566_666,
}  # fmt: skip

TINY = [
    "test_tim",
    "test_semm",
    "test_autost",
    "test_a2os2a",
    "test_spikformer",
    "test_spikformer_cml",
    "test_spikingformer",
    "test_sdt",
    "test_sdt_dvs",
]


@pytest.mark.parametrize(("name", "params"), PARAMS.items())
def test_parameter_counts_are_those_of_what_the_releases_use(name, params):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


def release(case: str) -> dict[str, torch.Tensor]:
    path = SHARED / "golden" / f"{case}.json"
    if not path.exists():
        pytest.skip(f"golden cases are not here: {path} does not exist")
    spec = json.loads(path.read_text())["spec"]
    return {name: torch.empty(shape) for name, shape in spec}


@pytest.mark.parametrize("case", FLAT_CASES)
def test_every_release_loads_by_name_and_by_position(case):
    name, args = FLAT_CASES[case]
    model = timm.create_model(name, device="meta", **args)
    filter_fn = sys.modules[type(model).__module__].checkpoint_filter_fn
    checkpoint = release(case)
    loaded = filter_fn({"model": {f"module.{key}": value for key, value in checkpoint.items()}}, model)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in loaded.items()} == expected
    dead = [
        key
        for key in checkpoint
        if not any(value.data_ptr() == checkpoint[key].data_ptr() for value in loaded.values())
    ]
    assert all("norm" in key or key in ("pos_embed",) or "talking_heads" in key for key in dead)
    live = [value for key, value in checkpoint.items() if key not in dead]
    for held in (live, checkpoint.values()):
        moved = filter_fn({f"tensor_{i}": value for i, value in enumerate(held)}, model)
        assert moved.keys() == loaded.keys()
        assert all(moved[key].data_ptr() == loaded[key].data_ptr() for key in loaded)
    for name in dead[:3]:  # nothing is skipped: in its place and of its shape, or not at all
        place = list(checkpoint).index(name)
        strange = [(f"tensor_{i}", value) for i, value in enumerate(checkpoint.values())]
        changed = dict(strange) | {f"tensor_{place}": torch.empty(2, 3)}
        with pytest.raises(ValueError, match=rf"misshapen: tensor_{place} \[2, 3\] as {name}"):
            filter_fn(changed, model)
        with pytest.raises(ValueError, match=r"by position, misshapen: tensor_"):
            filter_fn(dict([*strange[:place], *strange[place + 1 :], strange[place]]), model)
        with pytest.raises(ValueError, match=rf"{len(strange) - 1} tensors cannot be matched by position with .* or "):
            filter_fn(dict([*strange[:place], *strange[place + 1 :]]), model)
    later = next(key for key in checkpoint if key.startswith("block.0.mlp"))
    misled = {f"x.{key}" if i else later: value for i, (key, value) in enumerate(checkpoint.items())}
    with pytest.raises(ValueError, match=rf"by position, in another's place: {later.partition('_')[0]}"):
        filter_fn(misled, model)
    first = next(key for key in checkpoint if "bn" in key)
    for other in (
        {**checkpoint, "block.0.attn.extra": torch.empty(1)},
        {k: checkpoint[k] for k in checkpoint if k != first},
    ):
        with pytest.raises(ValueError, match=f"extra|{first}"):
            filter_fn(other, model)


def test_neurons_of_event_models_leak_as_the_release_has_it_unless_asked_not_to():
    def taus(**kwargs):
        model = timm.create_model("spikingformer_2_256_dvs", device="meta", **kwargs)
        return {m.tau for m in model.modules() if isinstance(m, LIF)}

    assert taus() == {1.5}
    assert taus(neuron_args={"tau": 3.0}) == {3.0}
    assert taus(neuron="if") == set()


@pytest.mark.parametrize("name", TINY)
def test_deployed_in_steps_and_scripted(name):
    model, x = tiny(name, time_steps=3), images(2, size=(16, 16))
    quantize_weights(model)
    with torch.no_grad():
        expected = model(x)
        for precision in ("fp32", "bf16", "int8"):
            torch.testing.assert_close(deploy(model, precision)(x), expected, rtol=1e-6, atol=1e-6, msg=precision)
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-10, atol=1e-10)
        spikes = model.stem(x, 3)
        state, steps = None, []
        for step in spikes.split(1):
            out, state = run_with_state(model.stages, step, state=state)
            steps.append(out)
        assert torch.equal(torch.cat(steps), model.stages(spikes))
    assert expected.std() > 0
    layers = energy(model, x).layers
    assert [layer.path for layer in layers if layer.input == "pixels"] == ["stem.conv"]


@pytest.mark.parametrize("name", TINY)
def test_packed_training_has_the_gradients_of_autograd(name):
    model, x = tiny(name, time_steps=2).train(), images(2, size=(16, 16))
    found = []
    for packed in (True, False):
        with execution_policy(packed=packed, neurons="eager"):
            found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_spikformer", {"patch_embed": "speds"}),
        ("test_qkformer", {"patch_embed": "sps"}),
        ("test_qkformer_ms", {"patch_embed": "sps"}),
        ("test_qkformer", {"patch_embed": "sps_events"}),
        ("test_qkformer", {"attn": "sdsa"}),
        ("test_spikformer", {"attn": "sdsa"}),
    ],
)
def test_embeddings_and_attention_are_exchanged(name, args):
    model, x = tiny(name, time_steps=2, **args), images(2)
    with torch.no_grad():
        torch.testing.assert_close(deploy(model)(x), model(x), rtol=0, atol=1e-9)
    assert len(timm.create_model(name, features_only=True, **args).feature_info) == len(model.stages)


@pytest.mark.parametrize(
    ("name", "exchanged", "own"),
    [
        *(("qkformer_" + size, "sps", None) for size in ("hst10_384", "hst10_384_ms", "hst4_384", "hst3_192")),
        *((name, "sps", None) for name in ("qkformer_hst2_256", "spiliformer_10_768", "spiliformer_4_384")),
        ("spikformer_8_384", "speds", "qkformer_hst10_384"),
        ("spikformer_4_384", "speds", "qkformer_hst4_384"),
        ("spikformer_2_256_dvs", "speds", "qkformer_hst2_256"),
        ("spikformer_2_256_dvs_cml", "speds", "qkformer_hst2_256"),
    ],
)
def test_exchanged_embeddings_have_the_strides_of_the_models_own(name, exchanged, own):
    def strides(name, **kwargs):
        model = timm.create_model(name, device="meta", **kwargs)
        return [info["reduction"] for info in model.feature_info], [stage.embed for stage in model.stages]

    found, embeds = strides(name, patch_embed=exchanged)
    assert found == strides(own or name)[0]
    assert found[-1] == strides(name)[0][-1]
    assert {type(embed) for embed in embeds} == {SpikingChain if exchanged == "sps" else SpikingPatchEmbed}


def test_sps_has_the_convolutions_of_the_models_own_embedding():
    def shapes(**kwargs):
        stages = timm.create_model("qkformer_hst2_256", device="meta", **kwargs).stages
        return [[conv.conv.weight.shape for conv in stage.embed.main] for stage in stages]

    assert shapes(patch_embed="sps") == shapes()
    stem = timm.create_model("qkformer_hst10_384", device="meta", patch_embed="sps").stem
    assert stem.pool_spikes


def test_embeddings_of_another_stride_are_refused():
    with pytest.raises(ValueError, match=r"speds='cifar' must be one of .'imagenet', 'events'., .*pools='1111'"):
        timm.create_model("test_spikformer", patch_embed="speds", pools="1111", speds="cifar")
