"""`timm-qkformer train`: a run from its settings to its last epoch."""

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import clean_state_dict
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import AverageMeter, NativeScaler, distribute_bn, random_seed
from torch import nn

from ...errors import naming_settings
from ...execution.memory import keep_freed_memory
from ...files import write_atomically
from ...hub.checkpoints import CheckpointError
from ...hub.evaluate import Evaluation
from ...progress import Pace
from .checkpoint import (
    DivergedError,
    RunSaver,
    check_optimizer,
    check_same_model,
    newest_checkpoint,
    read_run,
    resume_optimizer,
    resume_schedule,
    schedule_state,
    settings_in,
)
from .config import plain_settings
from .contents import loading
from .data import check_classes, check_same_classes, class_names, create_eval_loader, create_train_loader, open_split
from .distributed import Processes, join_processes
from .evaluate import evaluate
from .facts import contention, data_facts, differences, fingerprint
from .folder import RunFolder
from .log import Progress, RunLog, draw_curves, epoch_line, use_tensorboard, write_summary
from .loop import Parts, Update, learning_rate, train_epoch
from .network import autocast, build_model, build_task, compiling, data_config, forward_weights
from .settings import Settings
from .sparsity import firing_rate_penalty
from .state import RunState, resume_state, state_to_save

# What a run's settings have besides those of the command line: where the process stands among the others.
_OF_PROCESS = {"distributed", "rank", "world_size"}
# Settings that may differ when a run is resumed, and it is the same run.
_FREE = {
    "resume", "output", "experiment", "data", "data_dir", "log_interval", "recovery_interval", "tensorboard",
    "checkpoint_hist", "local_rank", "device", "rank", "start_epoch", "dataset_download", "event_cache", "pin_mem",
    "initial_checkpoint", "pretrained", "pretrained_path", "validation_batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    folder: Path  # of the run's files
    best_metric: float | None  # best value of the metric that checkpoints are ranked by
    best_epoch: int | None  # its epoch, from 0
    history: list[dict[str, Any]]  # rows of summary.csv


def train(settings: Settings) -> TrainResult:
    """Train a model with settings of `resolve_train`.

    OSError or ValueError, in one line, if something is not as it needs to be. Checkpoints that were there are intact.
    """
    tensorboard = use_tensorboard(settings.tensorboard)
    with join_processes(settings.device) as processes:
        if processes.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        if processes.device.type == "cpu":
            keep_freed_memory()
        with closing(RunFolder(settings)) as place:
            while True:
                try:
                    run = _Run(settings, processes, tensorboard, place)
                    break
                except CheckpointError as error:
                    if settings.resume != "auto" or place.resumed is None:
                        raise
                    place.passed_over.add(place.resumed)
                    warnings.warn(f"passed over: {error}", stacklevel=2)
            return run.train()


class _Run:
    def __init__(self, settings: Settings, processes: Processes, tensorboard: bool, place: RunFolder) -> None:
        self.processes = processes
        primary = processes.primary
        resume = processes.from_primary(place.checkpoint() if primary else None)
        place.resumed = Path(resume) if resume else None
        content = read_run(Path(resume)) if resume else None
        if content is not None:
            check_optimizer(content, Path(resume), settings)

        # From here on random numbers are drawn in train.py's order.
        random_seed(settings.seed, processes.rank)
        model: Any = build_model(settings)
        settings = replace(settings, num_classes=settings.num_classes or model.num_classes)
        self.saved_settings = plain_settings(settings) | processes.facts()
        if content is not None:
            check_same_model(content, Path(resume), model, settings.model)
        self.facts: dict[str, Any] = {
            "model": {"num_classes": settings.num_classes, "time_steps": getattr(model, "time_steps", None)},
            "threads": torch.get_num_threads(),
        }
        config = data_config(settings, model)
        folder = str(place.choose(resume, config["input_size"][-1])) if primary else None
        self.folder = Path(processes.from_primary(folder))
        self.resumes_here = bool(resume) and Path(resume).parent.resolve() == self.folder.resolve()
        parameters = sum(p.numel() for p in model.parameters())
        task = build_task(settings, processes, model)
        self.samples = self._open_data(settings, config, getattr(model, "time_steps", 1))
        self.settings = settings = _with_learning_rate(settings, processes.world_size)
        self._build_parts(task)
        self.saver = RunSaver(
            model=model,
            optimizer=self.parts.optimizer,
            args=self.saved_settings,
            amp_scaler=self.parts.scaler,
            checkpoint_dir=str(self.folder),
            recovery_dir=str(self.folder),
            decreasing=self.metric == "loss",
            max_history=settings.checkpoint_hist,
            task=task,
        )
        self.state = RunState()
        self.pace = Pace()
        notes = self._resume(content, Path(resume), model) if content is not None else []
        if settings.start_epoch is not None:
            self.state.epoch, self.state.consumed = settings.start_epoch, 0
        written = (content or {}).get("trainer") or {}
        done = self.parts.updates(self.state.epoch + (self.state.trained is not None), self.state.consumed)
        with loading(Path(resume), "schedule or moving average") if resume else nullcontext():
            resume_schedule(self.parts.scheduler, written.get("schedule"), self.state.epoch, done)
            self._set_up_average(content)
        self._wrap(task)
        self._make_folder(place)  # not earlier: what could not begin leaves nothing behind
        self.log = RunLog(primary, self.folder if tensorboard else None, purge_step=done + 1)
        self._introduce(parameters, resume, notes)

    # ---- setting up

    def _make_folder(self, place: RunFolder) -> None:
        folder = self.folder
        if self.processes.primary and self.resumes_here:
            place.tidy(folder)
            if self.state.history:
                write_summary(folder / "summary.csv", self.state.history)
        elif self.processes.primary:
            folder = place.begin(folder)
            recipe = {name: value for name, value in self.saved_settings.items() if name not in _OF_PROCESS}
            write_atomically(folder / "args.yaml", yaml.safe_dump(recipe, default_flow_style=False))
        self.folder = Path(self.processes.from_primary(str(folder)))
        self.saver.checkpoint_dir = self.saver.recovery_dir = str(self.folder)
        if self.processes.primary and self.resumes_here and place.resumed and place.resumed.name.startswith("last"):
            self.saver.forget_recovery()  # of before; a kill may have come first

    def _open_data(self, settings: Settings, config: dict[str, Any], time_steps: int) -> int:
        """Make the loaders; returns the number of training samples."""
        size = tuple(config["input_size"])
        train_data = open_split(settings, settings.train_split, True, size, time_steps)
        self.facts["files"] = fingerprint(train_data) if self.processes.primary else None
        check_classes(train_data, settings.num_classes or 0, f"the split {settings.train_split!r}")
        eval_data = None
        if settings.val_split:
            eval_data = open_split(settings, settings.val_split, False, size, time_steps)
            check_same_classes(train_data, eval_data, settings.val_split)
        self.facts["data"] = data_facts(settings, config, eval_data or train_data, time_steps)
        self.facts["class_names"] = class_names(train_data)
        self.loader = create_train_loader(settings, self.processes, train_data, config)
        self.eval_loader = None
        if eval_data is not None:
            where = f"the split {settings.val_split!r}"
            self.eval_loader = create_eval_loader(settings, self.processes, eval_data, config, where)
        return len(train_data)

    def _build_parts(self, task: TrainingTask) -> None:
        settings, device = self.settings, self.processes.device
        with naming_settings(f"the optimizer {settings.opt}", settings.given("optimizer")):
            optimizer = create_optimizer_v2(
                task.get_trainable_module(), **optimizer_kwargs(cfg=settings), **settings.opt_kwargs
            )
        scaled = settings.amp and device.type == "cuda" and settings.amp_dtype == "float16"
        self.metric = settings.eval_metric if self.eval_loader is not None else "loss"
        scheduler, self.epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(settings, decreasing_metric=self.metric == "loss"),
            updates_per_epoch=math.ceil(len(self.loader) / settings.grad_accum_steps),
        )
        if settings.start_epoch is not None and settings.start_epoch >= self.epochs:
            raise ValueError(f"start_epoch={settings.start_epoch} needs to be below the run's {self.epochs} epochs")
        scaler = NativeScaler(device=device.type) if scaled else None
        penalty = firing_rate_penalty(settings, task.get_trainable_module())
        context = autocast(settings, device)
        self.parts = Parts(settings, self.processes, task, self.loader, optimizer, scheduler, scaler, context, penalty)

    def _resume(self, content: Mapping[str, Any], path: Path, model: nn.Module) -> list[str]:
        """Resume where the checkpoint was written; returns what makes it something else than the same run."""
        settings, parts, notes = self.settings, self.parts, []
        trainer = content.get("trainer")
        with loading(path, "weights"):
            model.load_state_dict(clean_state_dict(content["state_dict"]))
        if not settings.no_resume_opt:
            follows = schedule_state(parts.scheduler) is not None
            resume_optimizer(parts.optimizer, content, path, settings, follows)
            if parts.scaler is not None and NativeScaler.state_dict_key in content:
                with loading(path, "gradient scaler"):
                    parts.scaler.load_state_dict(content[NativeScaler.state_dict_key])
        if trainer is None:
            self.state.epoch = int(content.get("epoch", -1)) + 1
            notes.append("the checkpoint is not of this trainer: random numbers begin anew")
        else:
            old, new = settings_in(content), self.saved_settings
            changed = [name for name in sorted(old.keys() & new.keys() - _FREE) if old[name] != new[name]]
            notes += [f"setting {name} is {new[name]!r}, it was {old[name]!r}" for name in changed]
            notes += differences(trainer, self.facts, self.processes.device) if self.processes.primary else []
            self.state, more = resume_state(parts, trainer, path, self.eval_loader)
            notes += more
        if self.resumes_here and self.processes.primary:  # the saver deletes files; another run's are not its own
            if content.get("saver"):
                with loading(path, "list of the best checkpoints"):
                    self.saver.restore(content["saver"], path)
            if path.name.startswith("recovery-"):
                self.saver.curr_recovery_file = str(path)
        return notes

    def _set_up_average(self, content: Mapping[str, Any] | None) -> None:
        settings, task = self.settings, self.parts.task
        if not settings.model_ema:
            return
        task.setup_ema(
            decay=settings.model_ema_decay,
            use_warmup=settings.model_ema_warmup,
            device="cpu" if settings.model_ema_force_cpu else None,
        )
        if content is not None:
            weights = content.get("state_dict_ema") or content["state_dict"]
            task.load_checkpoint_state(clean_state_dict(weights), ema=True)

    def _wrap(self, task: TrainingTask) -> None:
        """Compile the model, and prepare it for several processes."""
        settings, device = self.settings, self.processes.device
        if settings.torchcompile:
            with compiling(settings):
                task.compile(backend=settings.torchcompile, mode=settings.torchcompile_mode)
                if task.has_ema():
                    task.compile_ema(backend=settings.torchcompile, mode=settings.torchcompile_mode)
        self.eval_model: nn.Module = task.get_eval_model()
        if self.processes.distributed:
            devices = [device] if device.type == "cuda" else None
            task.prepare_distributed(device_ids=devices, **({"broadcast_buffers": False} if settings.no_ddp_bb else {}))

    def _introduce(self, parameters: int, resume: str | None, notes: list[str]) -> None:
        settings, say = self.settings, self.log.say
        per_update = settings.batch_size * self.processes.world_size * settings.grad_accum_steps
        say(
            f"{settings.model}: {parameters:,} parameters, {settings.num_classes} classes, on {self.processes.device}\n"
            f"{self.samples:,} training samples, {self.epochs} epochs of {self.parts.updates_per_epoch} updates with "
            f"{per_update} each, learning rate {settings.lr:.3g}\n"
            f"writing to {self.folder}"
        )
        if resume:
            batch = f", batch {self.state.consumed}" if self.state.consumed else ""
            batch = ", to be validated" if self.state.trained else batch
            say(f"resumed from {resume}: epoch {self.state.epoch}{batch}")
        elif settings.resume == "auto":
            say("nothing to resume, this is a new run")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.processes.distributed else 1
        if hint := contention(local, self.processes.device):
            say(hint)
        for note in notes:
            say(f"not an exact continuation: {note}")

    # ---- training

    def train(self) -> TrainResult:
        state, interval = self.state, self.settings.val_interval
        try:
            for epoch in range(state.epoch, self.epochs):
                state.epoch = epoch
                validate = (epoch + 1) % interval == 0 or epoch + 1 == self.epochs
                row = state.trained or self._train_epoch()
                if state.trained is None and not (validate and self.eval_loader is None):
                    state.trained = row
                    self._save_within_epoch(len(self.loader))  # a validation may take long, or not come for long
                state.trained = None
                self._finish_epoch(dict(row), validate)
        except DivergedError as error:
            if not self.processes.primary:
                raise
            kept = newest_checkpoint(self.folder)
            where = f"the last good checkpoint is {kept}" if kept else "no checkpoint has been written"
            raise DivergedError(f"{error}; {where}") from None
        finally:
            self.log.close()
        if self.processes.primary:
            self._conclude()
        return TrainResult(self.folder, self.saver.best_metric, self.saver.best_epoch, state.history)

    def _train_epoch(self) -> dict[str, Any]:
        settings, parts, state = self.settings, self.parts, self.state
        if not state.consumed:
            state.losses = AverageMeter()
        left = self.epochs * parts.updates_per_epoch - parts.updates(state.epoch, state.consumed)
        known = [row["firing_rate"] for row in state.history if row.get("firing_rate") is not None]
        progress = Progress(
            self.log, state.epoch, self.epochs, len(self.loader), state.consumed, left, settings.log_interval,
            settings.grad_accum_steps, known[-1] if known else None, self.pace,
        )  # fmt: skip

        def on_update(update: Update) -> None:
            progress.update(update, state.losses.avg)
            is_last = update.consumed == len(self.loader)  # the epoch's own checkpoint follows
            if settings.recovery_interval and update.updates % settings.recovery_interval == 0 and not is_last:
                self._save_within_epoch(update.consumed)

        try:
            loss = train_epoch(parts, state.epoch, state.consumed, state.losses, on_update)
        finally:
            progress.close()
        self._distribute_statistics(parts.task.get_trainable_module())
        state.consumed = 0
        return {"epoch": state.epoch, "train_loss": loss, "images_per_second": progress.samples_per_second}

    def _finish_epoch(self, row: dict[str, Any], validate: bool) -> None:
        state, parts = self.state, self.parts
        measured = self._validate() if validate and self.eval_loader is not None else None
        # train.py's columns in its order, then ours.
        speed = row.pop("images_per_second")
        if measured is not None:
            row |= {"eval_loss": measured.loss, "eval_top1": measured.top1, "eval_top5": measured.top5}
        row["lr"] = learning_rate(parts.optimizer)
        row |= {"images_per_second": speed, "firing_rate": measured.firing_rate if measured else None}
        metric = row.get("train_loss" if self.eval_loader is None else f"eval_{self.metric}")
        if validate:
            state.history.append(row)
        if parts.scheduler is not None:
            parts.scheduler.step(row["epoch"] + 1, metric if validate else None)
        state.epoch = row["epoch"] + 1
        if validate:
            trainer = state_to_save(parts, state, 0, **self.facts)
            if self.processes.primary:
                self.saver.trainer_state = trainer
                self.saver.save_checkpoint(row["epoch"], metric=metric)
                self.saver.forget_recovery()
                write_summary(self.folder / "summary.csv", state.history)
        points = {name.replace("_", "/", 1): value for name, value in row.items() if name.startswith("eval_")}
        points |= {"train/epoch_loss": row["train_loss"], "firing_rate": row["firing_rate"]}
        self.log.scalars(points, parts.updates(state.epoch, 0))
        self.log.say(epoch_line(row, self.epochs))

    def _distribute_statistics(self, model: nn.Module) -> None:
        """Let all processes have the same running statistics of batch norms that are not synchronized."""
        settings, processes = self.settings, self.processes
        if processes.distributed and settings.dist_bn and not settings.sync_bn:
            distribute_bn(model, processes.world_size, settings.dist_bn == "reduce")

    def _validate(self) -> Evaluation:
        task = self.parts.task
        self.state.eval_began = True
        measured = self._evaluate(self.eval_model)
        if task.has_ema() and not self.settings.model_ema_force_cpu:
            self._distribute_statistics(task.get_trainable_module(ema=True))
            measured = self._evaluate(task.get_eval_model(ema=True))
        return measured

    def _evaluate(self, model: nn.Module) -> Evaluation:
        with forward_weights(self.settings, model):
            return evaluate(self.settings, model, self.eval_loader, self.processes)

    def _save_within_epoch(self, consumed: int) -> None:
        trainer = state_to_save(self.parts, self.state, consumed, **self.facts)
        if self.processes.primary:
            self.saver.trainer_state = trainer
            self.saver.save_recovery(self.state.epoch, batch_idx=consumed)

    def _conclude(self) -> None:
        if self.state.history:
            try:
                draw_curves(self.state.history, self.folder / "curves.png", self.folder.name)
            except ModuleNotFoundError as error:
                self.log.say(f"no curves.png: {error.name} is missing, pip install 'timm-qkformer[train]'")
        if self.saver.best_metric is not None:
            self.log.say(f"best {self.metric} {self.saver.best_metric:.6g} in epoch {self.saver.best_epoch}")
        self.log.say(f"done: {self.folder}")


def _with_learning_rate(settings: Settings, world_size: int) -> Settings:
    """Settings with the learning rate that follows from `lr_base` and the global batch, if none is given."""
    if settings.lr:
        return settings
    ratio = settings.batch_size * world_size * settings.grad_accum_steps / settings.lr_base_size
    adaptive = any(kind in settings.opt.lower() for kind in ("ada", "lamb"))
    scale = settings.lr_base_scale or ("sqrt" if adaptive else "linear")
    return replace(settings, lr_base_scale=scale, lr=settings.lr_base * (ratio**0.5 if scale == "sqrt" else ratio))
