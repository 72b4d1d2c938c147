"""Weights that ship, fine-tuned on a small folder of one's own: accuracy against minutes on a CPU.

    python benchmarks/fine_tuning.py --data-dir FOLDER               # FOLDER/train/<class>/ and FOLDER/test/<class>/

From the first images of each class: the classifier alone on features computed once (linear probe) or with augmented
images (frozen backbone), low-rank adapters (LoRA, by peft), everything (full), and everything without these weights.
Each method's learning rate is chosen on a fifth of these images, then it trains on all of them with several seeds, and
the test images are counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from _common import RESULTS, environment, write_json
from timm_qkformer.execution import keep_freed_memory
from timm_qkformer.models import PEFT_TARGET_MODULES
from timm_qkformer.progress import Bar

CONVOLUTIONS = r"stages\..*\.conv"
RATES = {
    "frozen backbone": (0.01, 0.03, 0.1, 0.3),
    "LoRA, attention and MLPs": (0.003, 0.01, 0.03, 0.1),
    "LoRA, all convolutions": (0.003, 0.01, 0.03, 0.1),
    "full": (0.001, 0.003, 0.01, 0.03),
    "from scratch": (0.0003, 0.001, 0.003, 0.01),
}
PROBE = (0.01, 0.1, 1.0, 10.0, 100.0)  # inverse regularization


class Photos(NamedTuple):
    """Images of a split, as read, and their labels."""

    images: list[Image.Image]
    labels: Tensor

    def of_class(self, keep: Callable[[int], bool]) -> "Photos":
        """The images of each class whose number within it is to be kept."""
        seen: dict[int, int] = {}
        chosen = []
        for i, label in enumerate(self.labels.tolist()):
            number = seen[label] = seen.get(label, -1) + 1
            if keep(number):
                chosen.append(i)
        return Photos([self.images[i] for i in chosen], self.labels[chosen])


class Score(NamedTuple):
    top1: float  # percent
    seconds: float  # of training
    trained: int  # parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="images as train/<class>/ and test/<class>/")
    parser.add_argument("--model", default="qkformer_hst2_224.cifar10")
    parser.add_argument("--images", type=int, default=100, help="of each class (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--time-steps", type=int, help="the model's own by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    train, test = (read(args.data_dir / split) for split in ("train", "test"))
    mine = train.of_class(lambda number: number < args.images)
    learned, held_back = (
        mine.of_class(lambda n, hold=hold: (n % 5 == 4) == hold)  # type: ignore[misc]
        for hold in (False, True)
    )
    tried: dict[str, dict[float, float]] = {}
    rows: dict[str, list[Score]] = {}
    for method in ("linear probe", *RATES):
        options = PROBE if method == "linear probe" else RATES[method]
        tried[method] = {rate: run(args, method, rate, learned, held_back, 0).top1 for rate in options}
        best = max(options, key=lambda rate: tried[method][rate])
        seeds = range(1 if method == "linear probe" else args.seeds)
        rows[method] = [run(args, method, best, mine, test, seed) for seed in seeds]
        print_row(method, best, rows[method])
    result = {method: [score._asdict() for score in scores] for method, scores in rows.items()}
    settings = {"model": args.model, "images": args.images, "epochs": args.epochs, "threads": torch.get_num_threads()}
    write_json({**settings, **environment("timm"), "held_back": tried, "test": result}, args.out / "fine_tuning.json")


def print_row(method: str, rate: float, scores: list[Score]) -> None:
    top1 = [score.top1 for score in scores]
    spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
    minutes = statistics.mean(score.seconds for score in scores) / 60
    print(f"{method:26} {statistics.mean(top1):5.1f}{spread} %, {minutes:5.2f} min, {scores[0].trained:9,} parameters,"
          f" rate {rate}", flush=True)  # fmt: skip


def read(folder: Path) -> Photos:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    images = [Image.open(file).convert("RGB") for file, _ in files]
    return Photos(images, torch.tensor([label for _, label in files]))


def run(args: argparse.Namespace, method: str, rate: float, train: Photos, test: Photos, seed: int) -> Score:
    """Train by one method on some images and count others."""
    timm.utils.random_seed(seed)
    number = int(train.labels.max()) + 1
    options = {} if args.time_steps is None else {"time_steps": args.time_steps}
    model = timm.create_model(args.model, pretrained=method != "from scratch", num_classes=number, **options)
    config = resolve_model_data_config(model)
    as_measured = create_transform(**config)
    start = time.perf_counter()
    if method == "linear probe":
        return probe(model, as_measured, rate, train, test)
    model = prepared(model, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    augment = create_transform(
        **config, is_training=True, scale=(0.7, 1.0), ratio=(0.9, 1.1), hflip=0.5, color_jitter=0.0
    )
    fit(model, augment, train, rate, args.epochs, args.batch_size, frozen=method == "frozen backbone")
    seconds = time.perf_counter() - start
    answers = outputs(model, as_measured, test)
    return Score(top1(answers, test.labels), seconds, sum(p.numel() for p in trained))


def prepared(model: nn.Module, method: str) -> nn.Module:
    """The model with what the method trains."""
    if method in ("full", "from scratch"):
        return model
    if method == "frozen backbone":
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)  # type: ignore[operator]
        return model
    from peft import LoraConfig, get_peft_model

    target = CONVOLUTIONS if method.endswith("all convolutions") else PEFT_TARGET_MODULES
    return get_peft_model(model, LoraConfig(target_modules=target, r=8, lora_alpha=16, modules_to_save=["head", "bn"]))


def fit(model: nn.Module, augment: Any, train: Photos, rate: float, epochs: int, batch_size: int, frozen: bool) -> None:
    """AdamW, cosine. A frozen backbone's batch norms keep their statistics."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=rate, weight_decay=0.02)
    batch_size = min(batch_size, len(train.labels))
    updates = epochs * (len(train.labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates, pct_start=0.1)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train(not frozen)
    with Bar(total=updates, desc="training", unit="batch") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(train.labels))
            for batch in order.split(batch_size)[: len(order) // batch_size]:
                images = torch.stack([augment(train.images[i]) for i in batch])
                loss = criterion(model(images), train.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


@torch.inference_mode()
def outputs(model: Any, transform: Any, photos: Photos, features: bool = False) -> Tensor:
    """Logits, or what the classifier gets."""
    model.eval()
    found = []
    for i in range(0, len(photos.labels), 100):
        images = torch.stack([transform(image) for image in photos.images[i : i + 100]])
        found.append(model.forward_head(model.forward_features(images), pre_logits=True) if features else model(images))
    return torch.cat(found)


def probe(model: Any, transform: Any, inverse: float, train: Photos, test: Photos) -> Score:
    """Logistic regression on features that are computed once."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    start = time.perf_counter()
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=inverse, max_iter=2000))
    regression.fit(outputs(model, transform, train, features=True).numpy(), train.labels.numpy())
    seconds = time.perf_counter() - start
    answers = torch.from_numpy(regression.decision_function(outputs(model, transform, test, features=True).numpy()))
    return Score(top1(answers, test.labels), seconds, sum(p.numel() for p in model.get_classifier().parameters()))


def top1(answers: Tensor, labels: Tensor) -> float:
    return 100.0 * float((answers.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
