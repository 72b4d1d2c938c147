import pytest
from tiny_runs import StopError, make_images

from timm_qkformer.training.trainer import curves
from timm_qkformer.training.trainer import run as run_module


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of images to read only."""
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _no_curves(request, monkeypatch):
    """A picture at the end of each run would take longer than the run."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(curves, "draw_curves", lambda *_: None)


@pytest.fixture
def stop_after(monkeypatch):
    """Break off after so many updates, as if nothing could be done any more."""

    def arrange(updates):
        real = run_module.Progress.update
        seen = []

        def update(self, *args):
            real(self, *args)
            seen.append(None)
            if len(seen) > updates:
                raise StopError

        monkeypatch.setattr(run_module.Progress, "update", update)
        return lambda: monkeypatch.setattr(run_module.Progress, "update", real)

    return arrange
