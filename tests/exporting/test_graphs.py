"""Exported graphs take any batch and size, and answer as the model does."""

import io
import sys
import warnings
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from timm_qkformer import deploy
from timm_qkformer.cli import main
from timm_qkformer.exporting import export, formats, initial_state, read_metadata
from tiny import tiny

FAMILIES = ["test_qkformer_ms", "test_maxformer", "test_semm", "test_a2os2a", "test_autost", "test_spiliformer"]


def small(name: str, events: bool = False, **kwargs):
    model = tiny(name, time_steps=2, **({"in_chans": 2} if events else {}), **kwargs).float()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.in_chans, 32, 48)}
    return model


def input_of(model, batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, *([2] if model.in_chans == 2 else []), model.in_chans, height, width)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_qkformer", "test_sdt_dvs", *FAMILIES])
def test_onnx_of_torchscript_takes_any_batch_and_size(name, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, file = small(name, events=name.endswith("dvs")), str(tmp_path / "model.onnx")
    clip = 1 if model.in_chans == 2 else 0
    axes = {"x": {0: "batch", clip + 2: "height", clip + 3: "width"}, "y": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(model, (input_of(model, 2, 32, 32),), file, dynamo=False, dynamic_axes=axes, **names)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for x in (input_of(model, 3, 48, 40), input_of(model, 1, 32, 32)):
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["test_qkformer", "test_sdt_dvs"])
def test_onnx_of_torch_export_takes_any_batch_and_size(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, file = small(name, events=name.endswith("dvs")), str(tmp_path / "model.onnx")
    clip = 1 if model.in_chans == 2 else 0
    shapes = (dict.fromkeys((0, clip + 2, clip + 3), torch.export.Dim.DYNAMIC),)
    torch.onnx.export(model, (input_of(model, 2, 32, 32),), file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = input_of(model, 3, 48, 40)
    with torch.no_grad():
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "error::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["test_sdt", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES)])
def test_traces_are_saved_and_have_gradients(name):
    model, file = small(name), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, input_of(model, 2, 32, 32), check_trace=False), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x = input_of(model, 3, 48, 40)
    torch.testing.assert_close(loaded(x), model(x))
    loaded(x).sum().backward()
    model(x).sum().backward()
    gradients = dict(loaded.named_parameters())
    for path, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[path].grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=path)


CASES = [
    ("onnx", "test_sdt", True, False),
    *(
        pytest.param(form, name, step, events, marks=pytest.mark.slow)
        for form, name, step, events in [
            ("openvino", "test_qkformer", True, False),
            ("openvino", "test_sdt_dvs", False, True),
            ("onnx", "test_qkformer_ms", True, False),
            ("onnx", "test_maxformer", True, False),
            ("onnx", "test_maxformer", False, False),
            ("onnx", "test_sdt_dvs", True, True),
            ("onnx", "test_tim", False, False),
            ("torch", "test_sdt", False, False),
        ]
    ),
]


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize(("form", "name", "step", "events"), CASES)
def test_exported_files_answer_as_the_model(form, name, step, events, tmp_path):
    for module in {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"), "torch": ()}[form]:
        pytest.importorskip(module)
    model = small(name, events)
    path = tmp_path / f"model{ {'onnx': '.onnx', 'openvino': '.xml', 'torch': '.pt2'}[form] }"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = export(model, path, form, step=step)
    assert result.same_top1 == result.samples == 16
    assert result.largest_difference < 1e-2
    metadata = read_metadata(path)
    assert metadata == result.metadata
    assert (metadata["time_steps"], metadata["num_classes"]) == (2, 7)
    assert bool(metadata["state"]) == step
    assert {file.suffix for file in tmp_path.iterdir()} == ({".xml", ".bin"} if form == "openvino" else {path.suffix})
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(FileExistsError, match="force"):
        export(model, path, form)


def test_a_state_at_rest_has_the_shapes_of_its_frames():
    metadata = {"state": [{"name": "v", "dims": ["batch", 8, "height_4", "width_4"], "dtype": "float32"}]}
    metadata["state"].append({"name": "a", "dims": ["batch", 4, 1, "tokens_4"], "dtype": "float32"})
    state = initial_state(metadata, 3, 33, 20)
    assert [value.shape for value in state.values()] == [(3, 8, 9, 5), (3, 4, 1, 45)]
    assert not any(np.any(value) for value in state.values())
    with pytest.raises(ValueError, match="no step"):
        initial_state({"state": []}, 1, 32, 32)


def test_what_cannot_be_exported_is_refused_by_name(tmp_path, capsys):
    model = small("test_sdt")
    with pytest.raises(ValueError, match="export the original"):
        export(deploy(model), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="batch_coupled"):
        export(small("test_qkformer", batch_coupled=True), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"ends in \.onnx"):
        export(model, tmp_path / "model.xml")
    with pytest.raises(ValueError, match="format='tflite'"):
        export(model, tmp_path / "model.tflite", "tflite")
    (tmp_path / "model.pt2").write_text("mine")
    assert main(["export", "test_sdt", "--random", "--format", "torch", "--output", str(tmp_path / "model.pt2")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "model.pt2").read_text() == "mine"


def test_a_first_step_unlike_the_others_has_no_step_graph(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="export it as a clip"):
        export(small("test_tim"), tmp_path / "model.onnx", step=True)
    assert not list(tmp_path.iterdir())


def test_an_exit_rule_of_the_config_goes_along():
    from timm_qkformer.exporting.export import _metadata
    from timm_qkformer.exporting.graphs import clip_graph

    model = small("test_sdt")
    model.pretrained_cfg["notes"] = ("trained here", "anytime: confidence 0.8, T = 4")
    metadata = _metadata(model, {"input_size": (3, 32, 48)}, clip_graph(model, (32, 48)), False, None)
    assert metadata["exit"] == {"exit": "confidence", "threshold": 0.8}


def test_openvino_is_asked_for_float32_when_it_saves_and_when_it_runs(tmp_path, monkeypatch):
    """Its defaults, weights of 16 bits and arithmetic of fewer, flip spikes."""
    openvino = MagicMock()
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setattr(formats, "_write_onnx", lambda graph, metadata, path: path.touch())
    form = formats.FORMATS["openvino"]
    form.write(MagicMock(), "{}", tmp_path / "model.xml")
    form.load(tmp_path / "model.xml", ["x"])
    assert openvino.save_model.call_args.kwargs["compress_to_fp16"] is False
    assert openvino.Core().compile_model.call_args.args[2] == {"INFERENCE_PRECISION_HINT": "f32"}
