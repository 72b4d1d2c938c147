"""TIM, SEMM and AutoST against their releases, and A2OS2A against its equations."""

import json
import re

import pytest
import timm
import torch

from golden import SHARED, GoldenCase
from timm_qkformer import deploy
from timm_qkformer.analysis import firing_rates
from timm_qkformer.hub.checkpoints import read_checkpoint
from timm_qkformer.hub.infer import infer_architecture
from timm_qkformer.models import autost, semm, tim
from timm_qkformer.neurons import LIF, ReLUNeuron
from timm_qkformer.operators import get_operator
from timm_qkformer.operators.a2os2a import AdditionOnlyAttention
from tiny import NAMES, images, lively, tiny

# Golden cases keep such constants apart from the tensors.
pytestmark = pytest.mark.filterwarnings("ignore:the file is the release's, which stores its neurons' thresholds")

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
CASES = {
    "tim_cifar10dvs_2_256_t10": ("tim_2_256", tim, {}),
    "tim_cifar10dvs_2_256_t10_as_released": ("tim_2_256", tim, {"thresholds": (1.0, 1.0, 1.0)}),
    "semm_cifar10_4_384_t4_batch3": ("semm_4_384", semm, {}),
    "semm_imagenet_8_384_t4": ("semm_8_384", semm, {}),
    "autost_cifar10_4_256_t4_batch3": ("autost_4_256", autost, {}),
}


def load(case, golden, tensors=None, **kwargs):
    name, module, args = CASES[case]
    shape = golden.input.shape
    own = {"num_classes": golden.one_by_one.shape[1], "in_chans": shape[2] if len(shape) == 5 else shape[1]}
    model = timm.create_model(name, **{**own, **args, **kwargs}).double().eval()
    state = module.checkpoint_filter_fn(golden.checkpoint if tensors is None else tensors, model)
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_agrees_with_the_release(case):
    golden = GoldenCase(case)
    model = load(case, golden)
    assert sum(p.numel() for p in model.parameters()) == golden.params
    torch.testing.assert_close(model(golden.input), golden.one_by_one, **TOLERANCE)
    torch.testing.assert_close(model(golden.input[:1]), golden.one_by_one[:1], **TOLERANCE)
    torch.testing.assert_close(deploy(model)(golden.input), golden.one_by_one, **TOLERANCE)

    found = [layer.mean for layer in firing_rates(model, golden.input[:1]).layers if layer.is_neuron]
    expected = [rate if isinstance(rate, float) else sum(rate) / len(rate) for rate in golden.firing_rates.values()]
    if "semm" in case:  # experts fire one after the other there, side by side here
        expected = in_our_order(golden.firing_rates)
    assert found == pytest.approx(expected, abs=1e-9)

    if case == "semm_imagenet_8_384_t4":
        coupled = load(case, golden, batch_coupled=True)
        assert coupled(golden.input).shape == golden.batched.shape == (1, 1000)
        torch.testing.assert_close(coupled(golden.input), golden.batched, **TOLERANCE)
    else:
        torch.testing.assert_close(golden.batched, golden.one_by_one, **TOLERANCE)


def in_our_order(rates: dict[str, float]) -> list[float]:
    experts = range(4)
    order = ("k_lif", "v_lif", "router3", *(f"ff_list.{e}.unit_lif" for e in experts))
    order = (*order, *(f"lif_list.{e}" for e in experts))
    names = [name for name in rates if "block" not in name]
    blocks = dict.fromkeys(name.rsplit(".attn.")[0] for name in rates if ".attn." in name)
    for block in blocks:
        names += [f"{block}.attn.{part}" for part in (*order, "proj_lif")]
        names += [f"{block}.mlp.{part}_lif" for part in ("fc1", "dw", "fc2")]
    return [rates[name] if isinstance(rates[name], float) else sum(rates[name]) / len(rates[name]) for name in names]


def constants(case):
    stated = json.loads((SHARED / "golden" / f"{case}.json").read_text()).get("constants", {})
    return {name: torch.tensor(value) for name, value in stated.items()}


def with_constants(case, tensors):
    """A case's tensors and constants in the order of the release's file: neurons stand behind what they are named for,
    others behind the neurons before them, and TIM's behind its convolution."""
    names, place = list(tensors), 0
    order = {name: (place, -1) for place, name in enumerate(names)}
    for i, name in enumerate(constants(case)):
        neuron = re.sub(r"\.(threshold|act_fun\.alpha)$", "", name)
        layers = re.escape(neuron).replace("router3", "router[12]").replace("in_lif", "interactor")
        layers = re.sub(r"lif(\d?)$", r"(bn|conv|linear)\1", layers)
        place = max([i for i, other in enumerate(names) if re.match(rf"{layers}\.", other)], default=place)
        order[name] = place, i
    return {name: (tensors | constants(case))[name] for name in sorted(order, key=order.__getitem__)}


def strange(tensors):
    return {f"t{i}": tensor for i, tensor in enumerate(tensors.values())}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_by_name_whatever_the_order_and_by_position_whatever_the_names(case):
    golden = GoldenCase(case)
    expected = load(case, golden)
    unused = ("norm1", "norm2") if "imagenet" not in case else (".k_bn.", ".v_bn.")
    kept = {
        name: tensor
        for name, tensor in golden.checkpoint.items()
        if not case.startswith(("tim", "semm_imagenet")) or not any(part in name for part in unused)
    }
    files = [dict(sorted(golden.checkpoint.items())), {"state_dict": golden.checkpoint}]
    for tensors in (kept, golden.checkpoint):
        files += [strange(tensors), strange(with_constants(case, tensors))]
    for file in files:
        model = load(case, golden, file)
        assert str(model) == str(expected)
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in expected.state_dict().items())


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("autost")])
def test_constants_count_where_names_are_unknown(case):
    golden = GoldenCase(case)
    stored = with_constants(case, golden.checkpoint)
    names = list(stored)
    place = names.index("block.0.mlp.fc1_lif.threshold")
    with pytest.raises(ValueError, match=r"other thresholds than the model's 1: block\.0\.mlp\.fc1_lif 0\.25"):
        load(case, golden, {**strange(stored), f"t{place}": torch.tensor(0.25)})
    names[place : place + 2] = names[place + 2 : place + 4]
    with pytest.raises(ValueError, match="tensors cannot be matched by position with"):
        load(case, golden, strange({name: stored[name] for name in names}))
    if case.startswith("tim"):
        model = load(case, golden, strange(stored), thresholds=(0.7, 0.8, 0.9))
        assert model._model_args["thresholds"] == ((1.0, 1.0, 1.0) if "released" in case else (0.3, 0.5, 0.5))


@pytest.mark.parametrize("case", ["tim_cifar10dvs_2_256_t10", "tim_cifar10dvs_2_256_t10_as_released"])
def test_the_stored_threshold_counts(case):
    golden = GoldenCase(case)
    constants = json.loads((SHARED / "golden" / f"{case}.json").read_text())["constants"]
    stored = golden.checkpoint | {name: torch.tensor(value) for name, value in constants.items()}
    model = load(case, golden, stored, thresholds=(0.7, 0.8, 0.9))
    with pytest.warns(UserWarning, match="holds none: the model keeps its own"):
        asked = load(case, golden)
    assert str(model) == str(asked)
    assert model._model_args["thresholds"] == ((1.0, 1.0, 1.0) if "released" in case else (0.3, 0.5, 0.5))
    stored["block.0.attn.q_lif.threshold"] = torch.tensor(0.25)
    with pytest.raises(ValueError, match=r"other thresholds than the model's 1: block\.0\.attn\.q_lif 0\.25"):
        load(case, golden, stored)
    del stored["block.0.attn.q_lif.threshold"]
    stored["block.1.attn.attn_lif.threshold"] = torch.tensor(0.25)
    with pytest.raises(ValueError, match="other thresholds each"):
        load(case, golden, stored)


def test_convert_infers_models_and_their_thresholds(tmp_path):
    for case, (name, _, args) in CASES.items():
        golden = GoldenCase(case)
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in golden.checkpoint.items()}
        tensors = with_constants(case, tensors)
        for file, asked in ((tensors, None), (strange(tensors), name)):
            torch.save({"model": file}, tmp_path / "file.pth")
            found = infer_architecture(read_checkpoint(tmp_path / "file.pth"), asked)
            assert (found.model, found.also_fits) == (name, [])
            if name == "tim_2_256":
                assert found.model_args == {"thresholds": args.get("thresholds", (0.3, 0.5, 0.5))}


def test_constants_of_experts():
    case = "semm_cifar10_4_384_t4_batch3"
    golden = GoldenCase(case)
    constants = json.loads((SHARED / "golden" / f"{case}.json").read_text())["constants"]
    stored = golden.checkpoint | {name: torch.tensor(value) for name, value in constants.items()}
    load(case, golden, stored)
    stored["block.0.attn.lif_list.2.threshold"] = torch.tensor(2.0)
    with pytest.raises(ValueError, match=r"lif_list\.2 2"):
        load(case, golden, stored)


PARAMS = {
    ("tim_2_256", 10): 2_568_746,
    ("tim_2_256", 51): 2_579_283,
    ("tim_2_256", 101): 2_592_133,
    ("semm_4_384", 10): 7_739_242,
    ("semm_4_384", 100): 7_773_892,
    ("semm_8_384", 1000): 16_041_976,
    ("semm_8_512", 1000): 27_540_360,
    ("semm_8_768", 1000): 60_065_704,
    ("autost_4_256", 10): 4_155_209,
    ("autost_4_384", 10): 9_324_761,
    ("a2os2a_8_512", 1000): 29_689_384,
    ("a2os2a_10_512", 1000): 36_005_416,
    ("a2os2a_2_512", 10): 10_233_418,
    ("a2os2a_2_512", 100): 10_279_588,
    ("a2os2a_2_256", 10): 2_566_954,
    ("a2os2a_2_256", 100): 2_590_084,
}


@pytest.mark.parametrize(("name", "classes"), PARAMS)
def test_parameters(name, classes):
    model = timm.create_model(name, num_classes=classes, in_chans=2 if name.startswith("tim") else 3, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name, classes]


@torch.inference_mode()
def test_addition_only_attention_follows_its_equations():
    torch.manual_seed(1)
    mixer = lively(get_operator("a2os2a")(16, num_heads=2, value_neuron={"v_threshold": 0.7, "tau": 1.5}))
    x = (torch.rand(4, 2, 16, 3, 3) < 0.4).double()
    q, k, v = (unit.currents(x).flatten(3).unflatten(2, [2, 8]) for unit in (mixer.q, mixer.k, mixer.v))
    q, k = LIF()(q), k.clamp(min=0)
    u, values = torch.zeros_like(v[0]), []
    for step in v:
        u = u + (step - u) / 1.5
        values.append(u.sign() * (u.abs() >= 0.7))
        u = u * (u.abs() < 0.7)
    v = torch.stack(values)
    assert {float(value) for value in v.unique()} == {-1.0, 0.0, 1.0}
    attention = torch.einsum("tbhdn,tbhdm->tbhnm", q, k)
    expected = LIF()(torch.einsum("tbhnm,tbhdm->tbhdn", attention, v))
    expected = mixer.proj(expected.flatten(2, 3).unflatten(3, [3, 3]))
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=0)


def test_addition_only_attention_in_any_model():
    model = timm.create_model("test_qkformer", attn=("qkta", "qkta", "a2os2a"), num_classes=5)
    mixer = model.stages[2].blocks[0].attn
    assert isinstance(mixer.k.neuron, ReLUNeuron)
    assert mixer.v.output_range.bits == 2  # ternary
    assert mixer.k.output_range.bits is None
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    own = timm.create_model("test_a2os2a", operator_args={"a2os2a": {"attn_threshold": 0.25}})
    assert own.stages[0].blocks[0].attn.attn_neuron.v_threshold == 0.25


def test_arguments_of_operators_by_name_in_any_case_and_besides_the_models_own():
    model = timm.create_model("test_a2os2a", operator_args={"A2OS2A": {"attn_threshold": 0.25}})
    assert model.stages[0].blocks[0].attn.attn_neuron.v_threshold == 0.25
    pooling = timm.create_model("test_sdt_dvs", operator_args={"SDSA": {"qkv_bias": True}}).stages[0].blocks[0].attn
    assert pooling.dvs_mode
    assert pooling.q.conv.bias is not None
    tim = timm.create_model("test_tim", operator_args={"TIM": {"thresholds": (0.2, 0.4, 0.6), "alpha": 0.25}})
    assert tim.stages[0].blocks[0].attn.interaction.alpha == 0.25
    assert tim.stages[0].blocks[0].attn.interaction.in_neuron.v_threshold == 0.2
    tim.set_thresholds((0.3, 0.5, 0.5))
    again = timm.create_model("test_tim", **tim._model_args)
    assert again.stages[0].blocks[0].attn.interaction.in_neuron.v_threshold == 0.3
    assert again.stages[0].blocks[0].attn.interaction.alpha == 0.25


@pytest.mark.parametrize("name", NAMES)
def test_every_model_takes_arguments_of_operators(name):
    argument = "mixer" if "maxformer" in name else "attn"
    args = {argument: "a2os2a", "operator_args": {"a2os2a": {"value_neuron": {"v_threshold": 0.5}}}}
    model = timm.create_model(name, **args)
    assert {m.v.neuron.v_threshold for m in model.modules() if isinstance(m, AdditionOnlyAttention)} == {0.5}


@pytest.mark.parametrize("wrong", [(float("inf"), 1, 1), (1, 1, 0), (1, 1, float("nan")), (1, 1), 0.5])
def test_wrong_thresholds_change_none(wrong):
    model = timm.create_model("test_tim")
    with pytest.raises(ValueError, match="thresholds="):
        model.set_thresholds(wrong)
    attn = model.stages[0].blocks[0].attn
    neurons = (attn.interaction.in_neuron, attn.interaction.out_neuron, attn.attn_neuron)
    assert [neuron.v_threshold for neuron in neurons] == [0.3, 0.5, 0.5]


@torch.inference_mode()
def test_interaction_with_another_number_of_tokens():
    """Weights for other maps are interpolated; those for its own are its own; the sum over tokens keeps its size."""
    from timm_qkformer.operators.tim import TemporalInteraction

    torch.manual_seed(0)
    interaction = TemporalInteraction(16).double()
    weight, bias = interaction.weights(16)
    assert weight is interaction.weight
    assert bias is interaction.bias
    torch.nn.init.constant_(interaction.weight, 0.5)
    for tokens in (4, 64, 12):
        weight, bias = interaction.weights(tokens)
        assert weight.shape == (tokens, tokens, 5)
        torch.testing.assert_close(weight.sum(1), torch.full((tokens, 5), 8.0, dtype=torch.float64))
        assert bias.shape == (tokens,)


@torch.inference_mode()
def test_the_router_is_misread_where_the_release_does():
    right, wrong = (get_operator("experts")(16, expert_dim=4, router_misread=m) for m in (False, True))
    r = torch.arange(4 * 6).view(1, 1, 1, 4, 6)  # [T, B, 1, experts, tokens]
    assert right.routes(r)[0, 0, 1, 0, 2] == 1 * 6 + 2
    assert wrong.routes(r)[0, 0, 1, 0, 2] == 2 * 4 + 1


@pytest.mark.parametrize("name", ["test_tim", "test_semm", "test_autost", "test_a2os2a"])
@torch.inference_mode()
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    model, x = tiny(name), images(3)
    alone = torch.cat([model(one[None]) for one in x])
    assert not torch.allclose(alone[0], alone[1])
    torch.testing.assert_close(alone, model(x), rtol=1e-12, atol=1e-12)
