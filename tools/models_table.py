"""The tables of models in README.md and docs/models.md, from timm's registry.

python tools/models_table.py            # print both
python tools/models_table.py --write    # put them between `<!-- models -->` and `<!-- /models -->`
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models import get_arch_pretrained_cfgs, model_entrypoint

import timm_qkformer  # noqa: F401, registers its models
from timm_qkformer.models.loading import PendingCfg

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- models -->\n).*?(<!-- /models -->)", re.DOTALL)

# Families in the order of the tables: by the registered names that are theirs.
FAMILIES = {
    "QKFormer": r"qkformer_hst\d+_\d+",
    "QKFormer, membrane shortcuts": r"qkformer_hst\d+_\d+_ms",
    "Max-Former": r"maxformer_.*",
    "SpiLiFormer": r"spiliformer_.*",
    "Spikformer": r"spikformer_.*(?<!_cml)",
    "Spikformer with CML": r"spikformer_.*_cml",
    "Spikingformer": r"spikingformer_.*(?<!_cml)",
    "Spikingformer with CML": r"spikingformer_.*_cml",
    "Spike-driven Transformer": r"sdt_.*",
    "TIM": r"tim_.*",
    "SEMM": r"semm_.*",
    "A2OS2A": r"a2os2a_.*",
    "AutoST": r"autost_.*",
}


class Row(NamedTuple):
    """A registered model, as tables show it."""

    name: str
    data: str
    params: int
    strides: str
    widths: str
    blocks: str
    heads: str
    mixers: str
    time_steps: int
    sources: tuple[str, ...]  # of the weights, of all tags


def rows() -> dict[str, list[Row]]:
    """All models but those for tests, by family, for larger data first."""
    ours = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm_qkformer.")]
    found = {family: [_row(n) for n in ours if re.fullmatch(names, n)] for family, names in FAMILIES.items()}
    left = {n for n in ours if not n.startswith("test_")} - {row.name for of in found.values() for row in of}
    if left:
        raise SystemExit(f"{', '.join(sorted(left))}: of no family in {Path(__file__).name}")
    order = ["ImageNet", "CIFAR", "events"]
    return {
        family: sorted(of, key=lambda row: (order.index(row.data.split()[0]), row.params))
        for family, of in found.items()
    }


def _row(name: str) -> Row:
    model: Any = timm.create_model(name, device="meta")
    stages = list(model.stages)
    mixers = [[block.attn for block in stage.blocks] for stage in stages]
    heads = _each(str(mixer.num_heads) for of in mixers for mixer in of if _has_heads(mixer))
    return Row(
        name,
        _data(model.pretrained_cfg["input_size"]),
        sum(parameter.numel() for parameter in model.parameters()),
        ", ".join(str(info["reduction"]) for info in model.feature_info),
        ", ".join(str(info["num_chs"]) for info in model.feature_info),
        ", ".join(str(len(stage.blocks)) for stage in stages),
        heads or "-",
        ", ".join(_each(mixer.operator_name for mixer in of) or "-" for of in mixers),
        model.time_steps,
        tuple(dict.fromkeys(_source(cfg) for cfg in get_arch_pretrained_cfgs(name).values())),
    )


def _has_heads(mixer: Any) -> bool:
    return bool(mixer.inputs) and mixer.operator_name != "experts"


def _each(values: Iterable[str]) -> str:
    """One value if all are alike, else all."""
    listed = list(values)
    return ", ".join(listed if len(set(listed)) > 1 else listed[:1])


def _data(size: tuple[int, int, int]) -> str:
    channels, side, _ = size
    if channels == 2:
        return f"events {side}"
    return f"CIFAR {side}" if side <= 32 else f"ImageNet {side}"


def _source(cfg: Any) -> str:
    if isinstance(cfg, PendingCfg):
        return "a file of the authors' loads; their links are dead"
    if cfg.file:
        return "in the package"
    if cfg.hf_hub_id:
        return f"`pretrained=True`: [{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id})"
    if cfg.url:
        owner = re.match(r"https://github\.com/([^/]+/[^/]+)", cfg.url)
        return f"`pretrained=True`: [{owner[1]}]({owner[0]})" if owner else "`pretrained=True`"
    return "none to download"


def folded(names: list[str]) -> str:
    """Names that begin alike: the first, then what the others end in."""
    first, *others = names
    stem = first.split("_")[0]
    return ", ".join([f"`{first}`", *(f"`_{name.removeprefix(stem + '_')}`" for name in others)])


def readme_table() -> str:
    """A row for each family, or more where its weights come from several places."""
    lines = ["| family | models | data | parameters | weights |", "|---|---|---|--:|---|"]
    for family, of_family in rows().items():
        kinds: dict[tuple[str, ...], list[Row]] = {}
        for row in of_family:
            kinds.setdefault(row.sources, []).append(row)
        for sources, alike in kinds.items():
            sizes = sorted({f"{row.params / 1e6:.2f}" for row in alike}, key=float)
            span = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
            data = ", ".join(dict.fromkeys(row.data for row in alike))
            weights = "; ".join(source for source in sources if source != "none to download") or "none to download"
            lines.append(f"| {family} | {folded([row.name for row in alike])} | {data} | {span} M | {weights} |")
    return "\n".join(lines) + "\n"


def docs_table() -> str:
    """A row for each model."""
    lines = [
        "| Model | Data | Parameters | Strides | Widths | Blocks | Heads | Token mixers | T |",
        "|---|---|--:|---|---|---|---|---|--:|",
    ]
    for of_family in rows().values():
        for row in of_family:
            shape = f"{row.strides} | {row.widths} | {row.blocks} | {row.heads} | {row.mixers} | {row.time_steps}"
            lines.append(f"| `{row.name}` | {row.data} | {row.params:,} | {shape} |")
    return "\n".join(lines) + "\n"


def replaced(text: str, table: str) -> str:
    """A page with the table in its marked block.

    Raises:
        ValueError: For a page that does not have one such block.
    """
    result, count = BLOCK.subn(lambda found: found[1] + table + found[2], text)
    if count != 1:
        raise ValueError(f"the page has {count} blocks <!-- models --> ... <!-- /models -->, expected one")
    return result


PAGES = {"README.md": readme_table, "docs/models.md": docs_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    write = parser.parse_args().write
    for page, table in PAGES.items():
        if write:
            path = ROOT / page
            path.write_text(replaced(path.read_text(), table()))
        else:
            print(f"{page}:\n\n{table()}")


if __name__ == "__main__":
    main()
