"""The papers' spellings of registered models."""

import argparse

import pytest
import timm
import torch

from timm_qkformer.hub.checkpoints import read_checkpoint
from timm_qkformer.hub.infer import infer_architecture
from timm_qkformer.hub.loading import load_model
from timm_qkformer.models.aliases import ALIASES, current_name

SPELLINGS = {
    "Spikformer-8-512": "spikformer_8_512",
    "Spikformer-2-256": "spikformer_2_256_dvs",
    "Spikingformer-4-384": "spikingformer_4_384",
    "CML-Spikingformer-8-768": "spikingformer_8_768_cml",
    "SDT-2-256": "sdt_2_256",
    "Spike-driven-Transformer-10-512": "sdt_10_512",
    "HST-10-768": "qkformer_hst10_768",
    "QKFormer-10-384": "qkformer_hst10_384",
    "MS-QKFormer-10-384": "qkformer_hst10_384_ms",
    "Max-Former-10-512": "maxformer_10_512",
    "SpiLiFormer-10-768": "spiliformer_10_768",
    "A2OS2A-8-512": "a2os2a_8_512",
    "SEMM-4-384": "semm_4_384",
    "TIM-2-256": "tim_2_256",
    "AutoST-4-256": "autost_4_256",
    "Maxformer-10-768": "maxformer_10_768",
    "spikformer_2_256": "spikformer_2_256_dvs",
    "spikingformer_2_256": "spikingformer_2_256_dvs",
    "spikformer_2_256_cml": "spikformer_2_256_dvs_cml",
    "Spikformer-2-256-DVS": "spikformer_2_256_dvs",
    "SDT-2-256-DVS": "sdt_2_256_dvs",
    "SDT-2-256-Gesture": "sdt_2_256_gesture",
    "Spikformer-8-512+CML": "spikformer_8_512_cml",
    "Spikformer-CML-8-512": "spikformer_8_512_cml",
    "CML-Spikformer-2-256": "spikformer_2_256_dvs_cml",
    "CML-Spikingformer-2-256-DVS": "spikingformer_2_256_dvs_cml",
}


def test_spellings_of_the_papers():
    assert SPELLINGS.items() <= ALIASES.items()
    assert all(timm.is_model(alias) and timm.is_model(name) for alias, name in ALIASES.items())
    assert not set(ALIASES) & set(timm.list_models())
    assert current_name("SpiLiFormer-10-768.t1_in1k") == "spiliformer_10_768.t1_in1k"
    assert current_name("local-dir:Spikformer-8-512") == "local-dir:Spikformer-8-512"


@pytest.mark.parametrize("alias", ["SpiLiFormer-10-768.t1_in1k", "SDT-2-256", "Spikformer-4-384", "spikformer_2_256"])
def test_timm_takes_them_and_says_what_they_are_called(alias):
    name = current_name(alias)
    with pytest.warns(UserWarning, match=f"{alias.partition('.')[0]} to current {name.partition('.')[0]}"):
        model = timm.create_model(alias, num_classes=10, device="meta")
    same = timm.create_model(name, num_classes=10, device="meta")
    assert model.time_steps == same.time_steps
    assert model.pretrained_cfg == same.pretrained_cfg
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [(k, v.shape) for k, v in same.state_dict().items()]


@pytest.mark.filterwarnings("error")
def test_our_own_commands_take_them(tmp_path):
    assert load_model("TIM-2-256", random=True).name == "tim_2_256"
    model = timm.create_model("sdt_2_256", num_classes=3)
    args = argparse.Namespace(model="SDT-2-256")
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "x.pth")
    found = infer_architecture(read_checkpoint(tmp_path / "x.pth"))
    assert (found.model, found.also_fits) == ("sdt_2_256", [])
