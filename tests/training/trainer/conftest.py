import pytest
from tiny_runs import make_images

from timm_qkformer.training.trainer import engine


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of images to read only."""
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _no_curves(request, monkeypatch):
    """A picture at the end of each run would take longer than the run."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(engine, "draw_curves", lambda *_: None)
