"""Run other libraries on this package's models and write what they did to docs/compatibility.md.

`make clients` installs them first. Each client is a function that raises or returns a few words; one that is not
installed is left out of the table. Arguments are names of clients to run; the others' rows stay. TIMM_SCRIPTS names a
folder with train.py and validate.py of timm's repository, which are in no package.
"""

import importlib.metadata
import io
import os
import subprocess
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


def converted(folder: str) -> nn.Module:
    """The shipped CIFAR-10 model, in a folder that `convert` wrote.

    Those of timm 1.0.31's own `save_for_hf` hold the number of classes twice, which transformers 5.24 refuses.
    """
    from timm_qkformer.hub import convert

    model = timm.create_model("qkformer_hst3_192.cifar10", pretrained=True).eval()
    source = Path(timm_qkformer.__file__).parent / "models/weights/qkformer_hst3_192.cifar10.safetensors"
    convert(source, Path(folder), force=True)
    return model


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
    adapted.train()(x).sum().backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
    return "works"


def _one_step(model: nn.Module, x: Tensor) -> tuple[Tensor, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)), optimizer


@client("accelerate", "accelerate", "`prepare`, a step with gradients, `unwrap_model`")
def accelerate() -> str:
    from accelerate import Accelerator

    model, x = model_and_images()
    expected = model(x)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model.train())
    loss, optimizer = _one_step(prepared, x)
    accelerator.backward(loss)
    optimizer.step()
    own = accelerator.unwrap_model(prepared)
    assert own is model
    assert not torch.equal(own.eval()(x), expected)
    return "works"


@client("fastai", "fastai", "`Learner.fit` for one epoch, `get_preds`")
def fastai() -> str:
    import fastai.callback.all  # noqa: F401, gives learners `no_bar`
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat

    model, _ = model_and_images()
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    loaders = DataLoaders.from_dsets(data, data, bs=4, device=torch.device("cpu"), num_workers=0)
    learner = Learner(loaders, model, loss_func=CrossEntropyLossFlat())
    with learner.no_bar(), learner.no_logging(), tempfile.TemporaryDirectory() as folder:
        learner.path = Path(folder)
        learner.fit(1, 1e-3)
        found = learner.get_preds()[0]
    return same(found, model.eval()(data.tensors[0]).softmax(1))


@client(
    "segmentation_models_pytorch",
    "segmentation-models-pytorch",
    "DeepLabV3+ and PAN with `output_stride=16`, DeepLabV3 with 8; FPN, Unet, UPerNet; all with `pooled_levels=1`",
)
def segmentation() -> str:
    import segmentation_models_pytorch as smp

    x = torch.randn(2, 3, 128, 128)  # PAN halves the last map three times more
    strides = {"DeepLabV3Plus": 16, "PAN": 16, "DeepLabV3": 8, "FPN": None, "Unet": None, "UPerNet": None}
    for name, stride in strides.items():
        keep = {} if stride is None else {"encoder_output_stride": stride}
        net = getattr(smp, name)("tu-test_qkformer", encoder_weights=None, classes=3, pooled_levels=1, **keep)
        y = net(x)
        assert y.shape == (2, 3, 128, 128), (name, y.shape)
        y.sum().backward()
    smp.Unet("tu-test_qkformer", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 8, 4))(x)
    return "works; without `pooled_levels`, with `encoder_depth=4`"


@client("torchvision detection", "torchvision", "RetinaNet on a pyramid of three maps and a pooled one: losses, boxes")
def detection() -> str:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork

    class Backbone(nn.Module):
        out_channels = 16

        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model("test_qkformer", features_only=True, pooled_levels=1)
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return self.fpn({str(i): level for i, level in enumerate(self.body(x))})

    sizes = tuple((16 * 2**i,) for i in range(4))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4)
    net = RetinaNet(Backbone(), num_classes=2, anchor_generator=anchors, min_size=64, max_size=64)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = net([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    found = net.eval()([torch.rand(3, 64, 64)])
    assert set(found[0]) == {"boxes", "labels", "scores"}
    return "works"


@client("Lightning Trainer", "lightning", "two epochs of `fit`, `predict`, a checkpoint that loads")
def lightning_trainer() -> str:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = timm.create_model("test_qkformer", num_classes=10, time_steps=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    loader = torch.utils.data.DataLoader(data, 4)
    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)
        found = torch.cat(trainer.predict(module, loader))
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        again = Module.load_from_checkpoint(f"{folder}/last.ckpt", map_location="cpu").eval()
        return same(again(data.tensors[0]), found)


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


@client(
    "transformers Auto classes",
    "transformers",
    "image model and processor of a folder that `convert` wrote",
)
def transformers_auto() -> str:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    with tempfile.TemporaryDirectory() as folder:
        model = converted(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    x = processor(Image.new("RGB", (32, 32), "green"), return_tensors="pt")
    return same(loaded(**x).logits, model(x["pixel_values"]))


@client("transformers Trainer", "transformers", "two steps of `train`, `predict`, with such a folder")
def transformers_trainer() -> str:
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        converted(folder)
        model = AutoModelForImageClassification.from_pretrained(folder)
        arguments = TrainingArguments(
            f"{folder}/run", per_device_train_batch_size=4, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        result = trainer.train()
        logits = torch.from_numpy(trainer.predict(data).predictions)
    assert result.global_step == 2
    with torch.no_grad():
        return same(logits, model.eval()(torch.stack([item["pixel_values"] for item in data])).logits)


@client("transformers pipeline", "transformers", "image-classification, with a folder that `convert` wrote")
def transformers_pipeline() -> str:
    from PIL import Image
    from transformers import pipeline

    with tempfile.TemporaryDirectory() as folder:
        model = converted(folder)
        answer = pipeline("image-classification", folder)(Image.new("RGB", (40, 40)))
    names = model.pretrained_cfg["label_names"]
    return "works, with class names" if answer[0]["label"] in names else f"works; classes are {answer[0]['label']}, ..."


def _script(name: str, *arguments: object) -> str:
    """Run one of the scripts of timm's repository, which are in no package."""
    scripts = os.environ.get("TIMM_SCRIPTS", "")
    if not (Path(scripts) / name).is_file():
        raise LeftOutError(f"TIMM_SCRIPTS is not a folder with {name} of timm's repository")
    command = [sys.executable, str(Path(scripts) / name), *map(str, arguments)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise AssertionError(done.stdout.strip().splitlines()[-1])
    return done.stdout


@client("timm train.py and validate.py", "timm", "one epoch on a folder of 24 images, then its checkpoint")
def timm_scripts() -> str:
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, count in (("train", 16), ("validation", 8)):
            for i in range(count):
                path = folder / "data" / split / "ab"[i % 2] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), ("red", "blue")[i % 2]).save(path)
        small = ["--model", "test_qkformer", "--num-classes", 2, "--img-size", 32, "--device", "cpu", "--workers", 0]
        run = ["--epochs", 1, "--warmup-epochs", 0, "-b", 4, "--output", folder / "out", "--experiment", "run"]
        _script("train.py", folder / "data", *small, *run)
        checkpoint = folder / "out/run/last.pth.tar"
        out = _script("validate.py", folder / "data", *small, "-b", 4, "--checkpoint", checkpoint)
        assert "top1" in out
    return "works"


class LeftOutError(Exception):
    """A client that cannot run here, and why."""


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
        except LeftOutError as reason:
            print(f"{name}: left out: {reason}", flush=True)
            continue
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
