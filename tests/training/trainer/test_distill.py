"""Distillation: a teacher's logits beside the labels, by timm's task."""

import pytest
import timm
import torch
from test_resume import compare
from tiny_runs import PLAIN, RECIPE, run
from torch.nn import functional as F

from timm_qkformer.hub.convert import convert
from timm_qkformer.training.trainer.distill import teacher_settings
from timm_qkformer.training.trainer.settings import Settings


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A converted folder of a network with rectifiers for neurons."""
    folder = tmp_path_factory.mktemp("teacher")
    args = {**RECIPE["model_kwargs"], "neuron": "relu", "time_steps": 1}
    result = run(data, folder, **PLAIN, model_kwargs=args)
    convert(result.folder / "last.pth.tar", folder / "converted")
    return f"local-dir:{folder / 'converted'}"


@pytest.fixture
def losses(monkeypatch):
    """Images and what timm's task made of them, for each training step."""
    found, real = [], timm.task.LogitDistillationTask.forward

    def forward(self, input, target):
        result = real(self, input, target)
        found.append((self, input, target, {name: value.detach() for name, value in result.items()}))
        return result

    monkeypatch.setattr(timm.task.LogitDistillationTask, "forward", forward)
    return found


def test_the_loss_is_the_labels_and_the_teacher_s(data, tmp_path, teacher, losses):
    given = {"mean": [0.2] * 3, "std": [0.5] * 3, "smoothing": 0.0}
    weights = {"distill_loss_weight": 0.75, "task_loss_weight": 0.25, "kd_temperature": 2.0}
    result = run(data, tmp_path, **{**PLAIN, **given, **weights}, kd_model_name=teacher)
    task, images, labels, found = losses[-1]
    expert = task.teacher.model
    assert not expert.training
    assert not any(p.requires_grad for p in expert.parameters())
    mean, std = (torch.tensor(expert.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        taught = expert((images * 0.5 + 0.2 - mean) / std)
    own = F.cross_entropy(found["output"], labels)
    student, goal = (F.log_softmax(logits / 2.0, 1) for logits in (found["output"], taught))
    theirs = 4.0 * (goal.exp() * (goal - student)).sum(1).mean()
    torch.testing.assert_close(found["loss"], 0.25 * own + 0.75 * theirs)
    saved = torch.load(result.folder / "last.pth.tar", weights_only=True)
    assert not any("teacher" in name for name in saved["state_dict"])
    assert saved["args"]["kd_model_name"] == teacher


def test_with_everything_on_a_resumed_run_is_the_same_bit_for_bit(data, tmp_path, teacher):
    more = {"model_ema": True, "quantize_weights": True, "time_steps_random": [1, 2], "amp_dtype": "bfloat16"}
    compare(data, tmp_path, 8, kd_model_name=teacher, amp=True, distill_loss_weight=0.9, **more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tet": 0.5}, "tet=0.5 is not part of distillation"),
        ({"kd_temperature": 0.0}, "kd_temperature=0.0 needs to be above 0"),
        ({"distill_loss_weight": -1.0}, "distill_loss_weight=-1.0 needs to be at least 0"),
        ({"kd_model_name": None, "task_loss_weight": 0.5}, "task_loss_weight=0.5 needs a teacher, kd_model_name"),
        ({"kd_distill_type": "feature"}, "kd_distill_type 'feature' is not supported: a teacher's logits"),
        ({"kd_model_name": "nothing"}, "model 'nothing' is unknown"),
        ({"kd_model_name": "test_qkformer_ms"}, "no pretrained weights"),
        ({"kd_model_name": "test_qkformer.digits"}, "knows 10 classes, the model has 3"),
        ({"model": "spiliformer_4_384"}, "SpiLiFormer declares a training loss of its own"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, data, tmp_path, teacher):
    with pytest.raises((ValueError, OSError), match=message):
        run(data, tmp_path, **{**PLAIN, "kd_model_name": teacher, **changes})
    assert not list(tmp_path.glob("run/*"))


def test_a_teacher_takes_nothing_of_the_student():
    settings = Settings(model="x", kd_model_name="y", num_classes=3, freeze=["stem"], model_kwargs={"a": 1}, drop=0.5)
    found = teacher_settings(settings)
    assert found == Settings(model="y", num_classes=3, pretrained=True)
