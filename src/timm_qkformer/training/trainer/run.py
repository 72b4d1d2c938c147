"""`timm-qkformer train`: a run from its settings to its last epoch."""

import argparse
import time
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from timm.models import clean_state_dict, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, NativeScaler, distribute_bn, random_seed
from torch import nn

from ..._errors import naming_settings
from ..._files import write_atomically
from ...layers.fusion_progress import fusion_progress, resume_fusion
from .checkpoint import (
    DivergedError,
    RunSaver,
    check_same_model,
    newest_checkpoint,
    plain_settings,
    read_checkpoint,
    settings_in,
)
from .datasets import check_classes, open_split, same_classes
from .distributed import from_primary, of_all, processes
from .evaluation import Evaluation, evaluate
from .loaders import create_eval_loader, create_train_loader
from .log import Progress, RunLog, use_tensorboard, write_summary
from .loop import Parts, Update, learning_rate, train_epoch, updates_per_epoch
from .network import autocast, build_model, build_task, compiling, data_config
from .resume import check_optimizer, take_up_optimizer
from .schedule import schedule_state, take_up_schedule
from .settings import OF_PROCESS, given_in

__all__ = ["TrainResult", "train"]

# Settings that may differ when a run goes on, and it is the same run.
_FREE = {
    "resume", "output", "experiment", "data", "data_dir", "config", "log_interval", "recovery_interval", "tensorboard",
    "checkpoint_hist", "local_rank", "device", "rank", "start_epoch", "dataset_download", "event_cache", "pin_mem",
    "initial_checkpoint", "pretrained", "pretrained_path", "validation_batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        folder: Of the run's files.
        best_metric: Best value of the metric that checkpoints are ranked by.
        best_epoch: Its epoch, from 0.
        history: Rows of summary.csv.
    """

    folder: Path
    best_metric: Optional[float]
    best_epoch: Optional[int]
    history: list[dict[str, Any]]


@dataclass
class _State:
    """Where the run is."""

    epoch: int = 0
    consumed: int = 0
    losses: AverageMeter = field(default_factory=AverageMeter)
    history: list[dict[str, Any]] = field(default_factory=list)
    eval_began: bool = False


def train(args: argparse.Namespace) -> TrainResult:
    """Train a model.

    Args:
        args: Settings, see `resolve_train`; left as they are.

    Raises:
        OSError, ValueError: If something is not as it needs to be; one line says what. Checkpoints that were there
            are intact.
    """
    args = copy(args)
    tensorboard = use_tensorboard(args.tensorboard)
    with processes(args) as device:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        return _Run(args, device, tensorboard).train()


class _Run:
    def __init__(self, args: argparse.Namespace, device: torch.device, tensorboard: bool) -> None:
        self.args = args
        self.device = device
        self.primary = args.rank == 0
        resume = from_primary(args, self._checkpoint_to_resume() if self.primary else None)
        content = read_checkpoint(Path(resume)) if resume else None
        if content is not None:
            check_optimizer(content, Path(resume), args)

        # From here on random numbers are drawn in train.py's order.
        random_seed(args.seed, args.rank)
        model = build_model(args)
        settings = plain_settings(args)
        if content is not None:
            check_same_model(content, Path(resume), model, args.model)
        self.facts = {"num_classes": args.num_classes, "time_steps": getattr(model, "time_steps", None)}
        config = data_config(args, model)
        folder = from_primary(args, str(self._choose_folder(resume, config)) if self.primary else None)
        self.folder = Path(folder)
        self.goes_on_here = bool(resume) and _same(Path(resume).parent, self.folder)
        self.parameters = sum(p.numel() for p in model.parameters())
        task = build_task(args, model)
        self._open_data(config, getattr(model, "time_steps", 1))
        self._choose_learning_rate()
        with naming_settings(f"the optimizer {args.opt}", given_in(args, "optimizer")):
            self.optimizer = create_optimizer_v2(
                task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs
            )
        scaled = args.amp and device.type == "cuda" and args.amp_dtype == "float16"
        self.scaler = NativeScaler(device=device.type) if scaled else None
        self.metric = args.eval_metric if self.eval_loader is not None else "loss"
        scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            **scheduler_kwargs(args, decreasing_metric=self.metric == "loss"),
            updates_per_epoch=-(-len(self.loader) // args.grad_accum_steps),
        )
        if args.start_epoch is not None and args.start_epoch >= self.epochs:
            raise ValueError(f"start_epoch={args.start_epoch} needs to be below the run's {self.epochs} epochs")
        self.parts = Parts(args, task, self.loader, self.optimizer, scheduler, self.scaler, autocast(args), device)
        self.saver = RunSaver(
            model=model,
            optimizer=self.optimizer,
            args=settings,
            amp_scaler=self.scaler,
            checkpoint_dir=str(self.folder),
            recovery_dir=str(self.folder),
            decreasing=self.metric == "loss",
            max_history=args.checkpoint_hist,
            task=task,
        )
        self.state = _State()
        notes = self._take_up(content, Path(resume), model, settings) if content is not None else []
        if args.start_epoch is not None:
            self.state.epoch, self.state.consumed = args.start_epoch, 0
        written = (content or {}).get("trainer") or {}
        take_up_schedule(scheduler, written.get("schedule"), self.state.epoch, self._updates())
        self._set_up_average(content)
        if args.torchcompile:
            with compiling(args):
                task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
                if task.has_ema():
                    task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
        self.eval_model: nn.Module = task.get_eval_model()
        if args.distributed:
            devices = [device] if device.type == "cuda" else None
            task.prepare_distributed(device_ids=devices, **({"broadcast_buffers": False} if args.no_ddp_bb else {}))
        if self.primary and not self.goes_on_here:  # not earlier: what could not begin leaves nothing behind
            self._make_folder(settings)
        self.log = RunLog(self.primary, self.folder if tensorboard else None, purge_step=self._updates() + 1)
        self._introduce(resume, notes)

    # ---- setting up

    def _checkpoint_to_resume(self) -> Optional[str]:
        args = self.args
        if args.resume != "auto":
            return args.resume or None
        runs = Path(args.output or "output/train")
        if args.experiment:
            folders = [runs / args.experiment]
        else:
            found = runs.glob("*/*.pth.tar")
            folders = sorted({path.parent for path in found}, key=lambda p: p.stat().st_mtime)[-1:]
        newest = newest_checkpoint(folders[0]) if folders else None
        return str(newest) if newest else None

    def _choose_folder(self, resume: Optional[str], config: Mapping[str, Any]) -> Path:
        """The run's folder: that of the checkpoint, if it is one of this run, else one that is still to be made."""
        args = self.args
        runs = Path(args.output or "output/train")
        if resume and (
            args.resume == "auto" or (args.experiment and _same(Path(resume).parent, runs / args.experiment))
        ):
            return Path(resume).parent
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = args.experiment or "-".join([stamp, safe_model_name(args.model), str(config["input_size"][-1])])
        folder = runs / name
        if (
            folder.exists()
            and not (args.resume == "auto" and _before_first_checkpoint(folder))
            and any(folder.iterdir())
        ):
            raise FileExistsError(
                f"{folder} holds a run already; --resume auto goes on with it, or choose another name"
            )
        return folder

    def _make_folder(self, settings: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = {name: value for name, value in settings.items() if name not in OF_PROCESS}
        write_atomically(self.folder / "args.yaml", yaml.safe_dump(recipe, default_flow_style=False))

    def _open_data(self, config: dict[str, Any], time_steps: int) -> None:
        args = self.args
        size = tuple(config["input_size"])
        train_data = open_split(args, args.train_split, True, size, time_steps)
        check_classes(train_data, args.num_classes, f"the split {args.train_split!r}")
        eval_data = None
        if args.val_split:
            eval_data = open_split(args, args.val_split, False, size, time_steps)
            same_classes(train_data, eval_data, args.val_split)
        self.samples = len(train_data)
        self.loader = create_train_loader(args, train_data, config)
        self.eval_loader = None
        if eval_data is not None:
            self.eval_loader = create_eval_loader(args, eval_data, config, f"the split {args.val_split!r}")

    def _choose_learning_rate(self) -> None:
        args = self.args
        if args.lr:
            return
        ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
        if not args.lr_base_scale:
            args.lr_base_scale = "sqrt" if any(kind in args.opt.lower() for kind in ("ada", "lamb")) else "linear"
        args.lr = args.lr_base * (ratio**0.5 if args.lr_base_scale == "sqrt" else ratio)

    def _take_up(
        self, content: Mapping[str, Any], path: Path, model: nn.Module, settings: Mapping[str, Any]
    ) -> list[str]:
        """Go on where the checkpoint was written; returns what makes it something else than the same run."""
        args, notes = self.args, []
        trainer = content.get("trainer")
        model.load_state_dict(clean_state_dict(content["state_dict"]))
        if not args.no_resume_opt:
            follows = schedule_state(self.parts.scheduler) is not None
            take_up_optimizer(self.optimizer, content, path, args, follows)
            if self.scaler is not None and NativeScaler.state_dict_key in content:
                self.scaler.load_state_dict(content[NativeScaler.state_dict_key])
        if trainer is None:
            self.state.epoch = int(content.get("epoch", -1)) + 1
            notes.append("the checkpoint is not of this trainer: random numbers begin anew")
        else:
            changed = _changed(settings_in(content), settings)
            notes += [f"setting {name} is {new!r}, it was {old!r}" for name, old, new in changed]
            self._take_up_state(trainer, path, notes)
        if self.goes_on_here:  # the saver deletes what it knows; another run's files are not its own
            if "saver" in content:
                self.saver.load_state_dict(content["saver"])
            if path.name.startswith("recovery-"):
                self.saver.curr_recovery_file = str(path)
        return notes

    def _updates(self) -> int:
        """Updates of the weights so far."""
        consumed = self.state.consumed // self.args.grad_accum_steps
        return self.state.epoch * updates_per_epoch(self.parts) + consumed

    def _take_up_state(self, trainer: Mapping[str, Any], path: Path, notes: list[str]) -> None:
        args, state = self.args, self.state
        state.epoch, state.consumed = trainer["epoch"], trainer["consumed"]
        state.history = [dict(row) for row in trainer["history"]]
        if args.start_epoch is not None:
            state.history = [row for row in state.history if row["epoch"] < args.start_epoch]
            return
        here = [len(self.loader), args.batch_size, args.grad_accum_steps, args.world_size]
        if state.consumed and trainer["batches"] != here:
            raise ValueError(
                f"checkpoint {path} is from within an epoch; [batches, batch_size, grad_accum_steps, processes] were "
                f"{trainer['batches']} and are {here}. Resume with the same, or from last.pth.tar"
            )
        if len(trainer["processes"]) != args.world_size:
            notes.append(f"{args.world_size} processes instead of {len(trainer['processes'])}: new random numbers")
            return
        own = trainer["processes"][args.rank]
        state.losses.sum, state.losses.count = own["losses"]["sum"], own["losses"]["count"]
        state.losses.avg = state.losses.sum / max(1, state.losses.count)
        self.loader.replayable.resume(own["position"])
        resume_fusion(own["fusion"])
        state.eval_began = trainer["eval_began"]
        if state.eval_began and self.eval_loader is not None:
            loader = getattr(self.eval_loader, "loader", self.eval_loader)
            if loader.num_workers and loader.persistent_workers:
                # Their seed was drawn once: see ReplayableLoader.resume.
                loader.generator = torch.Generator()

    def _set_up_average(self, content: Optional[Mapping[str, Any]]) -> None:
        args, task = self.args, self.parts.task
        if not args.model_ema:
            return
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device="cpu" if args.model_ema_force_cpu else None,
        )
        if content is not None:
            weights = content.get("state_dict_ema") or content["state_dict"]
            task.load_checkpoint_state(clean_state_dict(weights), ema=True)

    def _introduce(self, resume: Optional[str], notes: list[str]) -> None:
        args, say = self.args, self.log.say
        per_update = args.batch_size * args.world_size * args.grad_accum_steps
        say(f"{args.model}: {self.parameters:,} parameters, {args.num_classes} classes, on {self.device}")
        say(
            f"{self.samples:,} training samples, {self.epochs} epochs of {updates_per_epoch(self.parts)} updates with "
            f"{per_update} each, learning rate {args.lr:.3g}"
        )
        say(f"writing to {self.folder}")
        if resume:
            batch = f", batch {self.state.consumed}" if self.state.consumed else ""
            say(f"resumed from {resume}: epoch {self.state.epoch}{batch}")
        elif args.resume == "auto":
            say("nothing to resume, this is a new run")
        for note in notes:
            say(f"not an exact continuation: {note}")

    # ---- training

    def train(self) -> TrainResult:
        args, state = self.args, self.state
        try:
            for epoch in range(state.epoch, self.epochs):
                state.epoch = epoch
                row = self._train_epoch()
                last = epoch + 1 == self.epochs
                validate = (epoch + 1) % args.val_interval == 0 or last
                self._finish_epoch(row, validate)
        except DivergedError as error:
            if not self.primary:
                raise
            kept = newest_checkpoint(self.folder)
            where = f"the last good checkpoint is {kept}" if kept else "no checkpoint has been written"
            raise DivergedError(f"{error}; {where}") from None
        finally:
            self.log.close()
        self._conclude()
        return TrainResult(self.folder, self.saver.best_metric, self.saver.best_epoch, state.history)

    def _train_epoch(self) -> dict[str, Any]:
        args, state = self.args, self.state
        if not state.consumed:
            state.losses = AverageMeter()
        per_epoch = updates_per_epoch(self.parts)
        left = (self.epochs - state.epoch) * per_epoch - state.consumed // args.grad_accum_steps
        known = [row["firing_rate"] for row in state.history if row.get("firing_rate") is not None]
        progress = Progress(
            self.log, state.epoch, self.epochs, len(self.loader), state.consumed, left, args.log_interval,
            args.grad_accum_steps, known[-1] if known else None,
        )  # fmt: skip

        def on_update(update: Update) -> None:
            progress.update(update, state.losses.avg)
            number = -(-update.consumed // args.grad_accum_steps)
            if args.recovery_interval and number % args.recovery_interval == 0:
                self._save_within_epoch(update)

        try:
            loss = train_epoch(self.parts, state.epoch, state.consumed, state.losses, on_update)
        finally:
            progress.close()
        if args.distributed and args.dist_bn in ("broadcast", "reduce"):
            distribute_bn(self.parts.task.get_trainable_module(), args.world_size, args.dist_bn == "reduce")
        state.consumed = 0
        return {"epoch": state.epoch, "train_loss": loss, "images_per_second": progress.samples_per_second}

    def _finish_epoch(self, row: dict[str, Any], validate: bool) -> None:
        state = self.state
        measured = self._validate() if validate and self.eval_loader is not None else None
        # train.py's columns in its order, then ours.
        speed = row.pop("images_per_second")
        if measured is not None:
            row |= {"eval_loss": measured.loss, "eval_top1": measured.top1, "eval_top5": measured.top5}
        row["lr"] = learning_rate(self.optimizer)
        row |= {"images_per_second": speed, "firing_rate": measured.firing_rate if measured else None}
        metric = (row if self.eval_loader is None else {**row, "loss": row.get("eval_loss")}).get(self._column())
        if validate:
            state.history.append(row)
        if self.parts.scheduler is not None:
            self.parts.scheduler.step(row["epoch"] + 1, metric if validate else None)
        state.epoch = row["epoch"] + 1
        if validate:
            trainer = self._trainer_state(0)
            if self.primary:
                self.saver.trainer_state = trainer
                self.saver.save_checkpoint(row["epoch"], metric=metric)
                self.saver.forget_recovery()
                write_summary(self.folder / "summary.csv", state.history)
        points = {name.replace("_", "/", 1): value for name, value in row.items() if name.startswith("eval_")}
        step = state.epoch * updates_per_epoch(self.parts)
        self.log.scalars({**points, "train/epoch_loss": row["train_loss"], "firing_rate": row["firing_rate"]}, step)
        self.log.say(_line(row, self.epochs))

    def _column(self) -> str:
        return "train_loss" if self.eval_loader is None else f"eval_{self.metric}"

    def _validate(self) -> Evaluation:
        args, task = self.args, self.parts.task
        self.state.eval_began = True
        measured = self._evaluate(self.eval_model)
        if task.has_ema() and not args.model_ema_force_cpu:
            if args.distributed and args.dist_bn in ("broadcast", "reduce"):
                distribute_bn(task.get_trainable_module(ema=True), args.world_size, args.dist_bn == "reduce")
            measured = self._evaluate(task.get_eval_model(ema=True))
        return measured

    def _evaluate(self, model: nn.Module) -> Evaluation:
        with self.parts.weights(model):
            return evaluate(
                model,
                self.eval_loader,
                self.device,
                self.parts.autocast,
                self.parts.dtype,
                self.args.channels_last,
                self.args.distributed,
            )

    def _trainer_state(self, consumed: int) -> dict[str, Any]:
        """The checkpoint's entry "trainer"; every process has to call this."""
        args, state = self.args, self.state
        return {
            "epoch": state.epoch,
            "consumed": consumed,
            "batches": [len(self.loader), args.batch_size, args.grad_accum_steps, args.world_size],
            "processes": of_all(
                args,
                {
                    "position": self.loader.replayable.position(consumed),
                    "fusion": fusion_progress(),
                    "losses": {"sum": state.losses.sum, "count": state.losses.count},
                },
            ),
            "eval_began": state.eval_began,
            "history": state.history,
            "schedule": schedule_state(self.parts.scheduler),
            "model": self.facts,
            "written": time.time(),
        }

    def _save_within_epoch(self, update: Update) -> None:
        if update.consumed == len(self.loader):
            return  # the epoch's own checkpoint follows
        trainer = self._trainer_state(update.consumed)
        if self.primary:
            self.saver.trainer_state = trainer
            self.saver.save_recovery(self.state.epoch, batch_idx=update.consumed)

    def _conclude(self) -> None:
        if not self.primary:
            return
        history = self.state.history
        if history:
            try:
                from .curves import draw_curves

                draw_curves(history, self.folder / "curves.png", self.folder.name)
            except ModuleNotFoundError as error:
                self.log.say(f"no curves.png: {error.name} is missing, pip install 'timm-qkformer[train]'")
        if self.saver.best_metric is not None:
            self.log.say(f"best {self.metric} {self.saver.best_metric:.6g} in epoch {self.saver.best_epoch}")
        self.log.say(f"done: {self.folder}")


def _before_first_checkpoint(folder: Path) -> bool:
    """Whether this is a run that was stopped with nothing to go on from, so that it may begin anew in its place."""
    begun = ("args.yaml", "events.out.tfevents.*", ".*.tmp", "tmp.pth.tar", "recovery_tmp.pth.tar")
    return all(any(path.match(pattern) for pattern in begun) for path in folder.iterdir())


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that differ and make another run of it: (name, old, new)."""
    return [(k, old[k], new[k]) for k in sorted(old.keys() & new.keys() - _FREE) if old[k] != new[k]]


def _line(row: Mapping[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch']} of {epochs}: loss {row['train_loss']:.4f}"]
    if "eval_loss" in row:
        parts.append(f"validation loss {row['eval_loss']:.4f}, top-1 {row['eval_top1']:.2f} %, "
                     f"top-5 {row['eval_top5']:.2f} %")  # fmt: skip
    if row["firing_rate"] is not None:
        parts.append(f"firing rate {row['firing_rate']:.4f}")
    parts.append(f"{row['images_per_second']:.1f} images/s")
    return ", ".join(parts)
