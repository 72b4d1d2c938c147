"""What hooks and replaced modules do to packed gradients: nothing. tests/attack/test_hooked_models.py has many more."""

import pytest
import torch
from torch import nn

import hooked
import tiny
from timm_qkformer.execution import execution_policy
from timm_qkformer.layers import packed
from timm_qkformer.operators import get_operator

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def scale(model):
    model.stages[0].blocks[0].attn.attn_neuron.register_forward_hook(lambda module, inputs, output: output * 0.6)


def replace(model):
    attn = model.stages[0].blocks[0].attn
    attn.attn_neuron = hooked.Scaled(attn.attn_neuron, 0.6)


def noise(model):
    attn = model.stages[0].blocks[0].attn
    attn.attn_neuron = nn.Sequential(attn.attn_neuron, nn.Dropout(0.5))


def counter(model):
    attn = model.stages[0].blocks[0].attn
    attn.attn_neuron = hooked.Noisy(attn.attn_neuron)


@pytest.mark.parametrize("change", [scale, replace, noise, counter])
def test_a_changed_neuron_of_attention_changes_packed_gradients_as_it_changes_plain_ones(change):
    model = tiny.tiny("test_qkformer")
    change(model)
    assert hooked.largest_difference(model, tiny.images(2, size=(16, 16))) < 1e-8


def test_hooks_on_all_modules_turn_packing_off():
    unit = tiny.lively(get_operator("qkta")(8, num_heads=2)).train()
    x = torch.ones(2, 1, 8, 4, 4, dtype=torch.float64)
    with execution_policy(packed=True):
        assert packed.is_active(unit, x)
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
        try:
            assert not packed.is_active(unit, x)
            unit(x)
        finally:
            handle.remove()
        assert packed.is_active(unit, x)
    computing = {module for module in unit.modules() if type(module) is not nn.Identity}
    assert computing <= set(seen)


def test_parameters_of_the_operator_itself_get_their_gradients():
    class Weighted(get_operator("qkta")(8, num_heads=2).__class__):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight = nn.Parameter(torch.tensor(1.5))

        def attend(self, q, k):
            return super().attend(q, k) * self.weight

    operator = tiny.lively(Weighted(8, num_heads=2), bias=(0.5, 2.0))
    x = torch.randint(0, 2, (3, 2, 8, 4, 4)).double()
    assert hooked.largest_difference(operator, x) < 1e-8
    assert hooked.gradients(operator, x, True)["weight"] is not None
