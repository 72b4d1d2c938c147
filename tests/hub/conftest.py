import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parent))

from hub_client import Client
from hub_server import HubServer

from release import release_state_dict
from training_dict import training_checkpoint


@pytest.fixture(scope="session")
def tiny_model():
    """A tiny model with T = 2 whose tensors all differ from a fresh model's."""
    torch.manual_seed(1)
    model = timm.create_model("test_qkformer", num_classes=10, time_steps=2)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                value.normal_(0.1, 0.3)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    """The tiny model as the authors' training would have saved it."""
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint-199.pth"
    torch.save(training_checkpoint(release_state_dict(tiny_model), time_step=2, input_size=64), path)
    return path


@pytest.fixture(scope="session")
def _server():
    server = HubServer()
    server.start()
    yield server
    server.shutdown()


@pytest.fixture
def server(_server):
    """A Hub with nothing on it."""
    _server.reset()
    return _server


@pytest.fixture(scope="session")
def client(_server, tmp_path_factory):
    """A user's process that talks to it."""
    home = tmp_path_factory.mktemp("home")
    client = Client(
        HF_ENDPOINT=_server.url,
        HF_HOME=str(home),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_ETAG_TIMEOUT="1",
        HF_HUB_DOWNLOAD_TIMEOUT="1",
        HF_TOKEN="hf_for_tests",
        TORCH_HOME=str(home / "torch"),
        OMP_NUM_THREADS="1",
    )
    yield client
    client.close()
