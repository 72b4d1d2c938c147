"""Distillation: a teacher's logits are learned beside the labels (Hinton et al. 2015, arXiv 1503.02531).

The task is timm's. The teacher is any pretrained timm model of the same classes, such as the same network with
rectifiers for neurons, converted to a folder: `--kd-model-name local-dir:FOLDER`.
"""

from collections.abc import Mapping
from typing import Any

from timm.task import LogitDistillationTask
from torch import nn

from .settings import Settings
from .task import declares_loss

_OF_DATA = ("num_classes", "in_chans", "input_size", "dataset")  # what teacher and student share


def teacher_settings(settings: Settings) -> Settings:
    """Settings that build the teacher of a run: none of the student's own."""
    assert settings.kd_model_name is not None
    shared = {name: getattr(settings, name) for name in _OF_DATA}
    return Settings(**shared, model=settings.kd_model_name, pretrained=True)


def distillation_task(
    settings: Settings, model: nn.Module, teacher: nn.Module, config: Mapping[str, Any], common: Mapping[str, Any]
) -> LogitDistillationTask:
    """timm's task of a student and its teacher.

    Args:
        settings: The run's.
        model: The student.
        teacher: Gets no gradients, and images normalised as its own config says.
        config: timm's data config of the student's images.
        common: Further arguments of the task.

    Raises:
        ValueError: For a student with a loss of its own, or a teacher of other classes.
    """
    name = settings.kd_model_name
    if declares_loss(model):
        raise ValueError(f"kd_model_name={name!r}: {type(model).__name__} declares a training loss of its own")
    taught = getattr(teacher, "pretrained_cfg", {}).get("num_classes")
    if taught not in (None, settings.num_classes):
        raise ValueError(f"kd_model_name={name!r} knows {taught} classes, the model has {settings.num_classes}")
    teacher.requires_grad_(False)
    task = LogitDistillationTask(
        student_model=model,
        teacher_model=teacher,
        distill_loss_weight=settings.distill_loss_weight,
        task_loss_weight=settings.task_loss_weight,
        temperature=settings.kd_temperature,
        **common,
    )
    # timm takes these from the model's own config, whatever the images were normalised with.
    for buffer, values in ((task.student_mean, config["mean"]), (task.student_std, config["std"])):
        buffer.set_(buffer.new_tensor(values).view(1, -1, 1, 1))
    if task.student_mean.shape != task.teacher.mean_kd.shape:
        channels = task.teacher.mean_kd.shape[1]
        raise ValueError(f"kd_model_name={name!r} has a mean for {channels} channels, images have {settings.channels}")
    return task
