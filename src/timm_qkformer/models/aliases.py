"""Names as papers spell them, such as Spikformer-8-512, for registered models.

They are registered the way timm registers names that it has given up: `timm.create_model` takes them and warns with
the current name, `timm.list_models` leaves them out.
"""

import re
from collections.abc import Mapping

from timm.models import list_models, model_entrypoint
from timm.models._registry import register_model_deprecations

# What papers call each family; the first part of the registered name is what it stands for.
_PAPERS: Mapping[str, tuple[str, ...]] = {
    "qkformer_hst": ("QKFormer", "HST"),
    "maxformer_": ("Max-Former", "MaxFormer"),
    "spikformer_": ("Spikformer",),
    "spikingformer_": ("Spikingformer",),
    "sdt_": ("SDT", "Spike-driven-Transformer"),
    "tim_": ("TIM",),
    "semm_": ("SEMM",),
    "a2os2a_": ("A2OS2A",),
    "autost_": ("AutoST",),
    "spiliformer_": ("SpiLiFormer",),
}
_REGISTERED = re.compile(rf"({'|'.join(_PAPERS)})(\d+)_(\d+)(_cml|_ms)?")
_BEFORE = {None: "", "_cml": "CML-", "_ms": "MS-"}

ALIASES: dict[str, str] = {}  # by the paper's spelling


def register_aliases() -> None:
    """Register the papers' spellings of all models that there are by now."""
    found: dict[str, dict[str, str]] = {}
    for name in list_models():
        match = _REGISTERED.fullmatch(name.removesuffix("_dvs"))
        module = model_entrypoint(name).__module__
        if match is None or not module.startswith(__name__.rpartition(".")[0]):
            continue
        for paper in _PAPERS[match[1]]:
            spelled = f"{_BEFORE[match[4]]}{paper}-{match[2]}-{match[3]}"
            # Where images and events share sizes, the paper's name is the images' model.
            if not (name.endswith("_dvs") and name.removesuffix("_dvs") in list_models()):
                found.setdefault(module, {})[spelled] = name
    for module, spellings in found.items():
        register_model_deprecations(module, dict(spellings))
        ALIASES.update(spellings)


def current_name(name: str) -> str:
    """The registered name of a paper's spelling, with its tag if it has one; other names as they are."""
    model, dot, tag = name.partition(".")
    return f"{ALIASES.get(model, model)}{dot}{tag}"
