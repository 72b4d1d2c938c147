"""How help looks: its width, the examples at its end, and scripts that complete commands in a shell."""

import argparse
import shutil
import textwrap
from typing import Any

EXIT_STATUS = "exit status: 0 done, 2 an error that the message explains, 130 interrupted, 1 a defect: please report"

# Of each command, what people type first. tests/test_cli.py parses them all.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("timm-qkformer demo", "timm-qkformer demo --epochs 8 --output pictures"),
    "convert": (
        "timm-qkformer convert checkpoint-199.pth hst10_384",
        "timm-qkformer convert last.pth.tar folder --quantize-weights --dtype float16",
    ),
    "train": (
        "timm-qkformer train -c cpu_cifar10 --data-dir data --dataset-download",
        "timm-qkformer train -c cpu_digits --data-dir digits --experiment first --recovery-interval 100 --resume auto",
        "timm-qkformer train my-pictures --model qkformer_hst2_224.cifar10 --pretrained --num-classes 5",
        "timm-qkformer train -c cpu_nmnist --data-dir nmnist",
    ),
    "validate": (
        "timm-qkformer validate qkformer_hst2_224.cifar10 --split test --data-dir cifar10",
        "timm-qkformer validate qkformer_hst4_384 --checkpoint last.pth.tar --data-dir digits --json",
        "timm-qkformer validate folder --dataset events/folder --data-dir recordings --split test",
    ),
    "verify": (
        "timm-qkformer verify folder --data val --progress progress.json",
        "timm-qkformer verify folder --data val --neurons per-sample --limit 1000 --json",
    ),
    "profile": (
        "timm-qkformer profile qkformer_hst2_224.cifar10 --data pictures",
        "timm-qkformer profile qkformer_hst10_384 --random --all",
        "timm-qkformer profile qkformer_hst3_128.nmnist --data recordings --sensor-size 34 34 --html profile.html",
    ),
    "calibrate": (
        "timm-qkformer calibrate folder --data-dir cifar10 --calibration-split train --split test --output curve.png",
        "timm-qkformer calibrate folder --data-dir pictures --exit entropy --points 0.5",
    ),
    "stream": (
        "timm-qkformer stream qkformer_hst3_128.nmnist digit.bs2 --sensor-size 34 34 --window 10ms",
        "timm-qkformer stream folder recording.aedat4 --count 2000 --precision int8 --output prediction.png",
    ),
    "visualize": (
        "timm-qkformer visualize qkformer_hst2_224.cifar10 cat.jpg dog.jpg --output pictures",
        "timm-qkformer visualize qkformer_hst3_128.nmnist digit.bs2 --sensor-size 34 34 --stage 1",
    ),
    "export": (
        "timm-qkformer export qkformer_hst2_224.cifar10 --output model.onnx --data pictures",
        "timm-qkformer export qkformer_hst3_128.nmnist --step --format openvino --output step.xml",
    ),
    "app": ("timm-qkformer app", "timm-qkformer app digits-model qkformer_hst2_224.cifar10 --port 8000"),
    "events": (
        "timm-qkformer events night.raw gesture.aedat4 --pictures pictures --gif",
        "timm-qkformer events night.raw --to night.npz",
    ),
    "search": (
        "timm-qkformer search --space autost-small --params 11e6 12e6 --output found",
        "timm-qkformer search --space hst --score spikes --output found --rounds 5",
    ),
    "reproduce": ("timm-qkformer reproduce --quick", "timm-qkformer reproduce --data photographs --output paper"),
    "doctor": ("timm-qkformer doctor", "timm-qkformer doctor --json"),
    "publish": ("timm-qkformer publish folder me/qkformer_hst10_384.custom --private",),
}


class HelpFormatter(argparse.HelpFormatter):
    """Help as wide as the terminal, from 72 to 100 columns; lines of the text stay apart, indented ones whole."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        width = max(72, min(100, shutil.get_terminal_size().columns - 2))
        super().__init__(prog, **{"max_help_position": 28, "width": width, **kwargs})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = (line if line[:1] == " " else textwrap.fill(line, width) for line in text.splitlines())
        return "\n".join(indent + line for line in lines)


def examples(command: str) -> str | None:
    """The end of a command's help."""
    lines = EXAMPLES.get(command)
    return "examples:\n" + "\n".join(f"  {line}" for line in lines) if lines else None


class PrintCompletion(argparse.Action):
    """Print a script that completes commands, options and files in a shell, and end. Needs the extra `completion`."""

    def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, values: Any, *__: Any) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error("shtab is missing: pip install 'timm-qkformer[completion]'")
        print(shtab.complete(parser, values))
        parser.exit()
