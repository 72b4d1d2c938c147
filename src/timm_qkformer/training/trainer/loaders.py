"""Loaders of both splits: timm's for images, this package's for events, and what they need to be resumed."""

import argparse
from typing import Any

import torch
from timm.data import Mixup, create_loader
from torch.utils.data import DataLoader

from ..._errors import naming_settings
from ...data import EventMixup, SharedRandomSampler, create_event_loader
from .datasets import check_sample, is_events
from .mixing import SwitchableCollateMixup
from .replay import ReplayableLoader
from .settings import given_in, mixes

__all__ = ["TrainLoader", "create_eval_loader", "create_train_loader"]


class TrainLoader:
    """Batches of an epoch, and the switches that the training loop needs.

    Attributes:
        batches: What to iterate: images [B, C, H, W] or clips [B, T, C, H, W], and targets.
        replayable: The loader inside, which knows its position.
        mixup: Mixes batches in this process; None if nothing is mixed or the loader does it.
        on_device: Whether the batches are on the model's device already, and mixed.
    """

    def __init__(self, batches: Any, replayable: ReplayableLoader, mixup: Mixup | None, on_device: bool) -> None:
        self.batches = batches
        self.replayable = replayable
        self.mixup = mixup
        self.on_device = on_device

    def __len__(self) -> int:
        return len(self.replayable)

    def begin(self, epoch: int, mix: bool) -> None:
        """Say which epoch comes next, and whether its batches are mixed."""
        for part in (self.replayable.loader, self.replayable.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self.mixup is not None:
            self.mixup.mixup_enabled = mix
        elif isinstance(self.replayable.collate_fn, SwitchableCollateMixup):
            self.replayable.collate_fn.mixup_enabled = mix


def create_train_loader(args: argparse.Namespace, dataset: Any, config: dict[str, Any]) -> TrainLoader:
    """The training loader, which draws random numbers as train.py's does.

    Args:
        args: Settings, with train.py's `device`, `rank`, `world_size` and `distributed`.
        dataset: Of the training split.
        config: timm's data config.

    Raises:
        ValueError: If there is not one full batch, or a sample or a setting does not fit.
    """
    settings = given_in(args, "augmentation and regularization", "data")
    with naming_settings("batches to train on", settings):
        return _create_train_loader(args, dataset, config)


def _create_train_loader(args: argparse.Namespace, dataset: Any, config: dict[str, Any]) -> TrainLoader:
    device = torch.device(args.device)
    mixing = _mixing(args)
    if is_events(args):
        check_sample(dataset, config["input_size"][0], f"the split {args.train_split!r}")
        loader = create_event_loader(
            dataset,
            args.batch_size,
            is_training=True,
            seed=args.seed,
            num_workers=args.workers,
            distributed=args.distributed,
            pin_memory=args.pin_mem,
        )
        replayable = ReplayableLoader(loader, device)
        return TrainLoader(replayable, replayable, EventMixup(**mixing) if mixing else None, on_device=False)

    share = len(dataset) // args.world_size
    if share < args.batch_size:
        raise ValueError(f"batch_size={args.batch_size} is more than the {share} images that a process has to train on")
    if args.aug_repeats and not args.distributed:
        raise ValueError(f"aug_repeats={args.aug_repeats} needs several processes, which share an image's copies")
    prefetch = not args.no_prefetcher
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=(None if args.no_aug else args.train_interpolation) or config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=args.workers,
        distributed=bool(args.aug_repeats),
        collate_fn=SwitchableCollateMixup(**mixing) if mixing and prefetch else None,
        pin_memory=args.pin_mem,
        img_dtype=_dtype(args),
        device=device,
        use_prefetcher=prefetch,
        worker_seeding=args.worker_seeding,
    )
    inner: DataLoader = loader.loader if prefetch else loader
    check_sample(dataset, config["input_size"][0], f"the split {args.train_split!r}")
    if args.distributed and not args.aug_repeats:
        sampler = SharedRandomSampler(len(dataset), _shared_seed, args.rank, args.world_size)
        inner.batch_sampler.sampler = sampler  # type: ignore[union-attr]
    replayable = ReplayableLoader(inner, device)
    if prefetch:
        loader.loader = replayable
    return TrainLoader(
        loader if prefetch else replayable,
        replayable,
        Mixup(**mixing) if mixing and not prefetch else None,
        on_device=prefetch,
    )


def create_eval_loader(args: argparse.Namespace, dataset: Any, config: dict[str, Any], where: str) -> Any:
    """The loader of the samples to validate on, each once (see `evaluation_sample_limit` for several processes).

    Args:
        args: As for `create_train_loader`.
        dataset: Of the split to validate on.
        config: timm's data config.
        where: What to call the split in an error.

    Raises:
        ValueError: If a sample or a setting does not fit.
    """
    settings = {name: config[name] for name in ("interpolation", "crop_pct")} | given_in(args, "data")
    with naming_settings("batches to validate on", settings):
        return _create_eval_loader(args, dataset, config, where)


def _create_eval_loader(args: argparse.Namespace, dataset: Any, config: dict[str, Any], where: str) -> Any:
    batch_size = getattr(args, "validation_batch_size", None) or args.batch_size
    if is_events(args):
        loader = create_event_loader(
            dataset,
            batch_size,
            seed=args.seed,
            num_workers=args.workers,
            distributed=args.distributed,
            pin_memory=args.pin_mem,
        )
    else:
        loader = create_loader(
            dataset,
            input_size=config["input_size"],
            batch_size=batch_size,
            is_training=False,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            num_workers=args.workers,
            distributed=args.distributed,
            crop_pct=config["crop_pct"],
            pin_memory=args.pin_mem,
            img_dtype=_dtype(args),
            device=torch.device(args.device),
            use_prefetcher=not args.no_prefetcher,
        )
    check_sample(dataset, config["input_size"][0], where)
    return loader


def _mixing(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of timm's Mixup; empty if nothing is mixed."""
    if not mixes(args):
        return {}
    return {
        "mixup_alpha": args.mixup,
        "cutmix_alpha": args.cutmix,
        "cutmix_minmax": args.cutmix_minmax,
        "prob": args.mixup_prob,
        "switch_prob": args.mixup_switch_prob,
        "mode": args.mixup_mode,
        "label_smoothing": args.smoothing,
        "num_classes": args.num_classes,
    }


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.model_dtype or "float32")


def _shared_seed() -> int:
    """A seed that process 0 draws where torch's RandomSampler would."""
    seed = torch.empty((), dtype=torch.int64).random_()
    if torch.distributed.get_backend() == "nccl":
        seed = seed.cuda()
    torch.distributed.broadcast(seed, src=0)
    return int(seed)
