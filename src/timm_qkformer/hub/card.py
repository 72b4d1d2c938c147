"""Model cards: README.md of a converted checkpoint."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .infer import Release

_SHOWN = 20  # classes
_PLAIN = re.compile(r"[^\w .,'()-]")

_CITATIONS = {
    "2403.16552": """@inproceedings{zhou2024qkformer,
  title={{QKF}ormer: Hierarchical Spiking Transformer using Q-K Attention},
  author={Chenlin Zhou and Han Zhang and Zhaokun Zhou and Liutao Yu and Liwei Huang and Xiaopeng Fan and Li Yuan and
    Zhengyu Ma and Huihui Zhou and Yonghong Tian},
  booktitle={The Thirty-eighth Annual Conference on Neural Information Processing Systems},
  year={2024},
  url={https://openreview.net/forum?id=AVd7DpiooC}
}""",
    "2505.18608": """@article{fang2025spiking,
  title={Spiking Transformers Need High Frequency Information},
  author={Fang, Yuetong and Zhou, Deming and Wang, Ziqing and Ren, Hongwei and Zeng, ZeCui and Li, Lusong and
    Zhou, Shibo and Xu, Renjing},
  journal={arXiv preprint arXiv:2505.18608},
  year={2025}
}""",
}

_COUPLED_NOTE = """## Coupled neurons

In the authors' code the last neuron of self-attention integrates over time *and batch*, so a sample's answer depends
on the samples before it in its batch. Published accuracies were measured that way. This model keeps samples apart
unless it is created with `batch_coupled=True`, which reproduces the authors' code. With their weights the difference
matters: independent measurements report 78.73 % coupled and 74.20 % per sample for HST-10-384, and 84.25 % and 78.70 %
for HST-10-768 (issue 14 of the authors' tracker).
"""


def write_card(
    folder: Path,
    config: dict[str, Any],
    source: dict[str, str],
    params: int,
    release: Release | None = None,
    measured: list[dict[str, Any]] | None = None,
) -> None:
    """Write `folder`/README.md.

    Args:
        folder: The converted checkpoint.
        config: What stands in its config.json.
        source: What is known of the checkpoint, label and value, for the list under "Source".
        params: Number of parameters.
        release: The authors' checkpoint that it is, going by its md5.
        measured: Results of `verify`.
    """
    cfg = config["pretrained_cfg"]
    architecture = config["architecture"]
    name = f"{architecture}.{cfg['tag']}" if cfg.get("tag") else architecture
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=cfg.get("license") or "unknown",
        datasets=["imagenet-1k"] if release else None,
        tags=["image-classification", "timm", "transformers", "spiking-neural-network"],
    )
    size = "x".join(map(str, cfg["input_size"][1:]))
    facts = {
        "Architecture": f"{architecture}, {params / 1e6:.2f} M parameters, needs `pip install timm-qkformer`",
        "Time steps": config["model_args"]["time_steps"],
        "Input": f"{cfg['input_size'][0]} channels, {size}, {cfg['interpolation']}, crop {cfg['crop_pct']:g}",
        "Classes": _classes(config),
        "Paper": f"{cfg.get('paper_name')}, {cfg.get('paper_ids')}",
        "Authors' code": cfg.get("origin_url"),
        "Licence": cfg.get("license")
        or ("none stated by the authors" if cfg.get("tag") not in (None, "custom") else "none stated"),
    }
    coupled = "batch_coupled" in config["model_args"]
    sections = [
        f"# Model card for {name}",
        "A spiking transformer for image classification, converted to timm's format with `timm-qkformer convert`.",
        "## Model\n\n" + _list(facts),
        "## Source\n\n" + _list(source),
        "## Accuracy\n\n" + _accuracy(release, measured or []),
        *([_COUPLED_NOTE.strip()] if coupled else []),
        _usage(cfg, f"hf-hub:timm-qkformer/{release.name}" if release else "local-dir:FOLDER"),
        "## Citation\n\n" + "\n".join(f"```bibtex\n{entry}\n```" for entry in _citations(cfg)),
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(sections) + "\n").save(folder / "README.md")


def _classes(config: dict[str, Any]) -> str:
    """Their number, and the names of the first ones, with nothing in them that Markdown acts on."""
    names = config.get("label_names") or []
    first = ", ".join(_PLAIN.sub("_", str(name))[:40] for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{config['num_classes']}" + (f" ({first}{more})" if names else "")


def _list(facts: dict[str, Any]) -> str:
    return "\n".join(f"- **{key}:** {value}" for key, value in facts.items() if value is not None)


def _accuracy(release: Release | None, measured: list[dict[str, Any]]) -> str:
    if release is None and not measured:
        return "Not measured, and this file is none of those with a published accuracy."
    rows = ["| Top-1 | Top-5 | Images | Neurons | Where from |", "|---|---|---|---|---|"]
    if release is not None:
        rows.append(f"| {release.top1:.2f} % | | 50,000 | coupled | published by the authors |")
        if release.per_sample is not None:
            rows.append(f"| {release.per_sample:.2f} % | | 50,000 | per sample | issue 14 of the authors' tracker |")
    for result in measured:
        neurons = "coupled" if result["batch_coupled"] else "per sample"
        rows.append(
            f"| {result['top1']:.2f} % | {result['top5']:.2f} % | {result['images']:,} | {neurons} | "
            f"`timm-qkformer verify`, T = {result['time_steps']} |"
        )
    return "\n".join(rows)


def _usage(cfg: dict[str, Any], source: str) -> str:
    shape = ", ".join(map(str, cfg["input_size"]))
    return f"""## Usage

```python
import timm
import torch

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(torch.rand(1, {shape}))  # transform(image).unsqueeze(0)
```"""


def _citations(cfg: dict[str, Any]) -> list[str]:
    papers = cfg.get("paper_ids") or ()
    papers = [papers] if isinstance(papers, str) else papers
    return [_CITATIONS[key] for paper in papers if (key := paper.removeprefix("arXiv:")) in _CITATIONS]
