"""Which convolutions of a deployed model add spikes up, and which multiply matrices."""

import pytest
import timm
import torch

import timm_qkformer
from timm_qkformer.execution import calibration
from timm_qkformer.execution.calibration import BreakEven
from timm_qkformer.inference import products

pytestmark = pytest.mark.usefixtures("event_kernels")

PRECISIONS = ["fp32", "bf16", "int8"]


def make(name="test_qkformer"):
    model = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))  # statistics under which neurons fire
    return model.eval()


@pytest.fixture
def calibrated(monkeypatch):
    """Makes events pay below this density, for every kind of product."""

    def set_to(most):
        monkeypatch.setattr(products, "_BIG", 0)
        monkeypatch.setattr(products, "break_even", lambda kind, typical, timed: BreakEven(most))

    return set_to


@pytest.mark.filterwarnings("ignore:precision=")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("most", "expected"), [(0.0, "dense"), (1.0, "events")])
def test_auto_takes_what_is_faster_here(precision, most, expected, calibrated):
    calibrated(most)
    model, x = make(), torch.randn(2, 3, 32, 32)
    fast = timm_qkformer.deploy(model, precision)
    assert set(fast.products.values()) == {expected}
    torch.testing.assert_close(fast(x), timm_qkformer.deploy(model, precision, products=expected)(x))


@pytest.mark.filterwarnings("ignore:precision=")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_images_say_which_layers_are_sparse(precision, calibrated):
    model, x = make(), torch.randn(2, 3, 32, 32)
    every = timm_qkformer.deploy(model, precision, products="events")
    found = products.densities(every, x)
    assert found.keys() == every.products.keys()
    middle = max(found.values()) / 2
    calibrated(middle)
    fast = timm_qkformer.deploy(model, precision, images=x)
    assert fast.products == {name: "events" if density < middle else "dense" for name, density in found.items()}
    assert set(fast.products.values()) == {"events", "dense"}
    torch.testing.assert_close(fast(x), every(x))  # in fp32, sums of another order; here no neuron is that close
    together, alone = fast.forward_features(x), fast.forward_features(x[:1])
    assert torch.equal(together[:1], alone)
    again = timm_qkformer.deploy(model, precision, products=fast.products)
    assert again.products == fast.products
    assert torch.equal(again(x), fast(x))


def test_densities_are_shares_of_what_is_not_zero():
    model = timm_qkformer.deploy(make(), products="events")
    with torch.no_grad():
        x = torch.zeros(1, 3, 32, 32)
        found = products.densities(model, x)
    assert all(0.0 <= density <= 1.0 for density in found.values())
    assert all(layer.seen is None for layer in products.projections(model).values())


def test_small_models_are_not_worth_measuring(monkeypatch):
    monkeypatch.setattr(products, "break_even", lambda *args: pytest.fail("measured"))
    assert set(timm_qkformer.deploy(make()).products.values()) == {"events"}


def test_each_precision_and_kernel_is_measured_as_it_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setenv(calibration.ENVIRONMENT_VARIABLE, str(tmp_path / "calibration.json"))
    monkeypatch.setattr(products, "_BIG", 0)
    small = (((2, 1, 4, 4, 16), 16), ((2, 1, 4, 4, 32), 32))
    monkeypatch.setattr(products, "_TIMED", {1: small, 3: small})
    model = make()
    for precision in PRECISIONS:
        timm_qkformer.deploy(model, precision)
    threads = torch.get_num_threads()
    expected = {
        f"deployed {precision}, {side}x{side}, {threads} threads" for precision in PRECISIONS for side in (1, 3)
    }
    assert set(calibration.known()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "is missing"),
        ({"head": "dense"}, "head' is no convolution|is missing"),
    ],
)
def test_choices_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        timm_qkformer.deploy(make(), products=given)


def test_choices_of_other_values_are_refused():
    model = make()
    given = dict.fromkeys(timm_qkformer.deploy(model).products, "dense")
    given[next(iter(given))] = "sparse"
    with pytest.raises(ValueError, match=r"""\]='sparse' must be "events" or "dense\""""):
        timm_qkformer.deploy(model, products=given)


def test_images_are_for_auto():
    with pytest.raises(ValueError, match='images are what products="auto" chooses by'):
        timm_qkformer.deploy(make(), products="dense", images=torch.zeros(1, 3, 32, 32))
