"""Neuron modules: hyper-parameters, registry, copies, errors."""

import copy
import pickle

import pytest
import torch
from neuron_cases import CASES, DIAGONAL, currents, make, reference

from timm_qkformer.layers import register_mlp
from timm_qkformer.neurons import (
    LIF,
    IntegerLIF,
    NeuronSpec,
    ParametricLIF,
    ReLUNeuron,
    SpikingNeuron,
    get_neuron_layer,
    neuron_names,
    register_neuron,
)
from timm_qkformer.operators import register_operator


def test_defaults_are_the_releases():
    lif = LIF()
    assert (lif.tau, lif.v_threshold, lif.v_reset, lif.decay_input, lif.detach_reset) == (2.0, 1.0, 0.0, True, True)
    assert (lif.surrogate, lif.alpha) == ("sigmoid", 4.0)
    assert LIF(surrogate="atan").alpha == 2.0
    assert lif.spec(torch.float32) == NeuronSpec(0.5)


def test_one_step_of_several_spikes_is_as_many_steps_of_one():
    """What a convolution makes of a count is the sum of what it makes of so many spikes."""
    torch.manual_seed(0)
    currents_of = torch.nn.Conv2d(5, 6, 3, bias=False).double()
    counts = IntegerLIF(4)(2 * torch.randn(1, 3, 5, 8, 8, dtype=torch.float64))
    steps = torch.stack([(counts[0] > k).double() for k in range(4)])
    assert steps.unique().tolist() == [0.0, 1.0]
    torch.testing.assert_close(currents_of(counts[0]), sum(map(currents_of, steps)))


def test_integer_neurons_by_hand():
    x = torch.tensor([-3.0, 0.3, 0.5, 1.2, 2.7, 9.0], requires_grad=True)
    spikes = IntegerLIF(2, v_threshold=0.8)(x[None])
    assert spikes.tolist() == [[0.0, 0.0, 1.0, 2.0, 2.0, 2.0]]
    spikes.sum().backward()
    assert x.grad.tolist() == pytest.approx([0.0, 1.25, 1.25, 1.25, 0.0, 0.0])
    spikes, v = IntegerLIF(2).run(torch.tensor([[2.7], [0.0]]))
    assert spikes.flatten().tolist() == [2.0, 0.0]  # 0.7 stay, and half of them a step later
    assert v.tolist() == pytest.approx([0.35])


@pytest.mark.parametrize("case", DIAGONAL)
def test_copies_and_scripts(case):
    neuron, x = make(case), currents(4, 3, 7)
    expected = reference(case, neuron, x)[0]
    for other in (copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron)), torch.jit.script(neuron)):
        assert torch.equal(other(x), expected)
    half = x.to(torch.bfloat16)
    assert torch.equal(torch.jit.script(neuron.float())(half), neuron(half))


def test_hyper_parameters_may_be_changed():
    x = 3 * torch.rand(4, 2, 5)
    neuron = LIF()
    neuron.tau, neuron.v_threshold, neuron.v_reset = 1.5, 0.3, None
    assert "tau=1.5, v_threshold=0.3, v_reset=None" in repr(neuron)
    assert torch.equal(neuron(x), LIF(1.5, v_threshold=0.3, v_reset=None)(x))
    assert not torch.equal(neuron(x), LIF()(x))
    neuron.v_reset = -0.5
    assert torch.equal(neuron(x), LIF(1.5, v_threshold=0.3, v_reset=-0.5)(x))


def test_factory_kwargs():
    assert ParametricLIF(device="meta").w.is_meta
    assert ParametricLIF(dtype=torch.float64).w.dtype == torch.float64
    assert LIF(device="meta")(torch.empty(4, 2, device="meta")).shape == (4, 2)
    for case in CASES:
        assert make(case).training


def test_registry(monkeypatch):
    monkeypatch.setattr("timm_qkformer.neurons.modules._NEURONS", {"lif": LIF, "relu": ReLUNeuron})

    @register_neuron("deaf")
    class Deaf(LIF):
        levels = "ternary"

    assert neuron_names() == ["deaf", "lif", "relu"]
    assert get_neuron_layer("deaf") is Deaf
    assert get_neuron_layer(Deaf) is Deaf
    assert register_neuron("deaf")(Deaf) is Deaf  # a module may be imported again
    assert get_neuron_layer("deaf", {"tau": 3.0})(v_threshold=0.5, device=None, dtype=None).tau == 3.0
    with pytest.raises(ValueError, match="neuron 'lif' is registered already"):
        register_neuron("lif")(Deaf)
    with pytest.raises(TypeError, match=r"Linear must derive from .*SpikingNeuron"):
        register_neuron("linear")(torch.nn.Linear)
    with pytest.raises(TypeError, match=r"levels='two' is unknown.*binary.*real.*ternary"):
        register_neuron("two")(type("Two", (LIF,), {"levels": "two"}))
    with pytest.raises(NotImplementedError):
        SpikingNeuron()(torch.zeros(1, 2))


@pytest.mark.parametrize("register", [register_neuron, register_operator, register_mlp])
def test_what_is_registered_needs_a_name(register):
    with pytest.raises(TypeError, match=r"write @register_\w+\(NAME\) above the class"):

        @register  # without a name it would replace the class by a function
        class Nameless(LIF):
            pass

    for name in ("", "two words", "bell\a"):
        with pytest.raises(ValueError, match="a name has at least one character"):
            register(name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LIF(tau=0.5), "tau=0.5"),
        (lambda: LIF(tau=float("nan")), "tau=nan"),
        (lambda: ParametricLIF(init_tau=1.0), "init_tau=1.0"),
        (lambda: LIF(v_threshold=0.0), "v_threshold=0.0"),
        (lambda: LIF(v_threshold=1.0, v_reset=1.0), "v_reset=1.0"),
        (lambda: LIF(surrogate="relu"), r"surrogate='relu'.*atan.*sigmoid"),
        (lambda: LIF(alpha=0.0), "alpha=0.0"),
        (lambda: get_neuron_layer("izhikevich"), r"neuron='izhikevich'.*if.*lif.*plif"),
        (lambda: get_neuron_layer("lif", {"v_treshold": 0.5}), r"neuron_args={'v_treshold': 0.5}: .*v_treshold"),
        (lambda: get_neuron_layer("ilif", {"max_spikes": 0}), r"max_spikes=0 must be a whole number of at least 1"),
        (lambda: get_neuron_layer("if", {"tau": 2.0}), r"neuron_args={'tau': 2.0}: .*tau"),
        (lambda: get_neuron_layer("lif", {"tau": 0.5}), r"neuron_args={'tau': 0.5}: tau=0.5 must be"),
        (lambda: LIF()(torch.ones(4, 2, dtype=torch.int64)), "int64"),
        (lambda: LIF().run(torch.ones(4, 2, dtype=torch.int64)), "int64"),
        (lambda: LIF()(torch.ones(0, 2)), r"\[0, 2\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_parametric_neurons_have_vectors_which_fsdp_shards_and_take_the_scalars_of_older_files():
    neuron = ParametricLIF(3.0)
    assert neuron.w.shape == (1,)
    older = {"w": torch.tensor(0.25)}
    neuron.load_state_dict(older)
    assert neuron.w.item() == 0.25
    assert older["w"].dim() == 0
    neuron.load_state_dict({"w": torch.tensor(0.5)}, assign=True)
    assert (neuron.w.shape, neuron.w.item()) == ((1,), 0.5)
    neuron(currents(3, 2, 4)).sum().backward()
    assert neuron.w.grad.shape == (1,)
