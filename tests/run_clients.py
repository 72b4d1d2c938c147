"""Run other libraries on this package's models and write what they did to docs/compatibility.md.

`make clients` installs them first. Each client is a function that raises or returns a few words; one that is not
installed is left out of the table. Arguments are names of clients to run; the others' rows stay.
"""

import importlib.metadata
import io
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import timm_qkformer
from timm_qkformer.models import ATTRIBUTION_LAYER, FX_LEAF_MODULES, PEFT_TARGET_MODULES

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
HEAD = """# Compatibility

Other libraries on models of this package, unmodified. `make clients` installs them, runs each (`tests/run_clients.py`)
and writes this page; it is slow and no part of CI.

| client | version | what it did | verdict |
|---|---|---|---|
"""
CLIENTS: dict[str, tuple[str, str, Callable[[], str]]] = {}


def client(name: str, distribution: str, what: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def add(run: Callable[[], str]) -> Callable[[], str]:
        CLIENTS[name] = (distribution, what, run)
        return run

    return add


def model_and_images(name: str = "test_qkformer", **kwargs: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, time_steps=2, **kwargs).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.in_chans, 32, 48)}
    for module in model.modules():  # lively enough that deep neurons fire
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.0, 2.0)
            nn.init.uniform_(module.bias, 0.2, 1.2)
    return model, torch.randn(2, 3, 32, 32)


def same(found: Tensor, expected: Tensor) -> str:
    difference = float((found - expected).abs().max())
    if difference > 1e-3:
        raise AssertionError(f"differs by {difference:.2g}")
    return "works"


@client("timm features_only", "timm", "feature maps of all stages")
def timm_features() -> str:
    maps = timm.create_model("test_qkformer", features_only=True)(torch.randn(2, 3, 32, 32))
    assert all(m.dim() == 4 for m in maps)
    return "works"


@client("torchvision create_feature_extractor", "torchvision", "the readout's map, traced by FX")
def torchvision_fx() -> str:
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = model_and_images()
    extractor = create_feature_extractor(model, ["readout"], tracer_kwargs={"leaf_modules": list(FX_LEAF_MODULES)})
    return same(extractor(x)["readout"], model.forward_features(x))


@client("torch.jit.trace", "torch", "saved, loaded, another batch and size")
def jit_trace() -> str:
    model, x = model_and_images()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x, check_trace=False), file)
    file.seek(0)
    y = torch.randn(3, 3, 48, 40)
    return same(torch.jit.load(file)(y), model(y))


@client("torch.jit.script", "torch", "another batch and size")
def jit_script() -> str:
    model, _ = model_and_images()
    y = torch.randn(3, 3, 48, 40)
    return same(torch.jit.script(model)(y), model(y))


@client("torch.export", "torch", "any batch")
def torch_export() -> str:
    model, x = model_and_images("test_sdt")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    return same(program(x[:1].repeat(3, 1, 1, 1)), model(x[:1].repeat(3, 1, 1, 1)))


def _onnx(**kwargs: object) -> str:
    import onnxruntime

    model, x = model_and_images("test_sdt")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (x,), file, input_names=["x"], verbose=False, **kwargs)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        y = torch.randn(3, 3, 48, 40)
        return same(torch.from_numpy(session.run(None, {"x": y.numpy()})[0]), model(y))


@client("torch.onnx.export, dynamo=False", "onnxruntime", "another batch and size in onnxruntime")
def onnx_torchscript() -> str:
    return _onnx(dynamo=False, dynamic_axes={"x": {0: "batch", 2: "height", 3: "width"}})


@client("torch.onnx.export, dynamo=True", "onnxscript", "another batch and size in onnxruntime")
def onnx_dynamo() -> str:
    return _onnx(dynamo=True, dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),))


def _own(suffix: str, format: str) -> str:
    model, _ = model_and_images("test_qkformer_ms")
    with tempfile.TemporaryDirectory() as folder:
        result = timm_qkformer.export(model, Path(folder) / f"model{suffix}", format, step=True)
    if result.same_top1 != result.samples:
        raise AssertionError(f"{result.same_top1} of {result.samples} answers are the model's")
    return "works"


@client("onnxruntime", "onnxruntime", "`timm-qkformer export --step`, 16 samples, same top-1")
def own_onnx() -> str:
    return _own(".onnx", "onnx")


@client("OpenVINO", "openvino", "`timm-qkformer export --step`, 16 samples, same top-1")
def own_openvino() -> str:
    return _own(".xml", "openvino") + " in float32; its default precision may change spikes"


@client("captum LayerGradCam", "captum", "the readout; each sample as if alone")
def captum() -> str:
    from captum.attr import LayerGradCam

    model, x = model_and_images()
    cam = LayerGradCam(model, model.get_submodule(ATTRIBUTION_LAYER))
    return same(cam.attribute(x, target=1)[1:], cam.attribute(x[1:], target=1)) + "; not on stages"


@client("pytorch-grad-cam", "grad-cam", "the readout; one map a sample")
def grad_cam() -> str:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = model_and_images()
    with GradCAM(model=model, target_layers=[model.get_submodule(ATTRIBUTION_LAYER)]) as cam:
        assert cam(input_tensor=x, targets=[ClassifierOutputTarget(1)] * 2).shape == (2, 32, 32)
    return "works; not on stages"


@client("spikingjelly OutputMonitor", "spikingjelly", "records of all neurons")
def spikingjelly_monitor() -> str:
    from spikingjelly.activation_based import monitor

    model, x = model_and_images()
    neuron = timm_qkformer.neurons.SpikingNeuron
    watch = monitor.OutputMonitor(model, neuron)
    model(x)
    assert len(watch.records) == sum(isinstance(m, neuron) for m in model.modules())
    return "works, with `neurons.SpikingNeuron`"


@client("peft LoRA", "peft", "adapters on `PEFT_TARGET_MODULES`, one backward pass")
def peft_lora() -> str:
    from peft import LoraConfig, get_peft_model

    model, x = model_and_images()
    adapted = get_peft_model(model, LoraConfig(target_modules=PEFT_TARGET_MODULES, r=4))
    adapted(x).sum().backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
    return "works"


@client("Lightning to_torchscript", "lightning", "traced and called again")
def lightning_script() -> str:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    model, x = model_and_images()
    return same(Module(model).eval().to_torchscript(method="trace", example_inputs=x)(x), model(x))


@client("transformers pipeline", "transformers", "image-classification on the shipped CIFAR-10 model's folder")
def transformers_pipeline() -> str:
    from PIL import Image
    from timm.models import save_for_hf
    from transformers import pipeline

    model = timm.create_model("qkformer_hst3_192.cifar10", pretrained=True).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder)
        answer = pipeline("image-classification", folder)(Image.new("RGB", (40, 40)))
    names = model.pretrained_cfg["label_names"]
    return "works, with class names" if answer[0]["label"] in names else f"works; classes are {answer[0]['label']}, ..."


def main(chosen: list[str]) -> int:
    rows = _rows_of(PAGE.read_text()) if PAGE.exists() else {}
    failed = 0
    for name, (distribution, what, run) in CLIENTS.items():
        if chosen and name not in chosen:
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed", flush=True)
            continue
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdict = run()
        except Exception as error:
            traceback.print_exc()
            verdict, failed = (
                f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}",
                failed + 1,
            )
        rows[name] = f"| {name} | {distribution} {version} | {what} | {verdict} |"
        print(f"{rows[name]}  {time.perf_counter() - start:.0f} s", flush=True)
    PAGE.write_text(HEAD + "\n".join(rows[name] for name in CLIENTS if name in rows) + "\n")
    return failed


def _rows_of(text: str) -> dict[str, str]:
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return {row.split("|")[1].strip(): row for row in rows}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
