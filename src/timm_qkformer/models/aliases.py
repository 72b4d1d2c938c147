"""Names as papers spell them, such as Spikformer-8-512, for registered models, and other names that users try.

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
    "maxformer_": ("Max-Former", "MaxFormer", "Maxformer"),
    "spikformer_": ("Spikformer",),
    "spikingformer_": ("Spikingformer",),
    "sdt_": ("SDT", "Spike-driven-Transformer"),
    "tim_": ("TIM",),
    "semm_": ("SEMM",),
    "a2os2a_": ("A2OS2A",),
    "autost_": ("AutoST",),
    "spiliformer_": ("SpiLiFormer",),
}
_REGISTERED = re.compile(rf"({'|'.join(_PAPERS)})(\d+_\d+)(_dvs|_gesture)?(_cml|_ms)?")
# Where papers put what a model is built with, and the data where it is not images.
_FORMS: Mapping[str | None, tuple[str, ...]] = {
    None: ("{paper}-{size}",),
    "_cml": ("CML-{paper}-{size}", "{paper}-CML-{size}", "{paper}-{size}+CML"),
    "_ms": ("MS-{paper}-{size}", "{paper}-MS-{size}"),
}
_DATA = {"_dvs": "-DVS", "_gesture": "-Gesture"}

ALIASES: dict[str, str] = {}  # by the paper's spelling


def register_aliases() -> None:
    """Register the papers' spellings of all models that there are by now, and names without `_dvs` that are free."""
    found: dict[str, dict[str, str]] = {}
    for name in list_models():
        match = _REGISTERED.fullmatch(name)
        module = model_entrypoint(name).__module__
        if match is None or not module.startswith(__name__.rpartition(".")[0]):
            continue
        family, size, data, built = match.groups()
        names = found.setdefault(module, {})
        # Where images and events share sizes, names that say neither are the images' model.
        plain = f"{family}{size}{built or ''}"
        is_only = data is None or (data == "_dvs" and plain not in list_models())
        if data is not None and is_only:
            names[plain] = name
        for form in _FORMS[built]:
            for paper in _PAPERS[family]:
                if is_only:
                    names[form.format(paper=paper, size=size.replace("_", "-"))] = name
                if data is not None:
                    names[form.format(paper=paper, size=size.replace("_", "-") + _DATA[data])] = name
    for module, spellings in found.items():
        register_model_deprecations(module, dict(spellings))
        ALIASES.update(spellings)


def current_name(name: str) -> str:
    """The registered name of a paper's spelling, with its tag if it has one; other names as they are."""
    model, dot, tag = name.partition(".")
    return f"{ALIASES.get(model, model)}{dot}{tag}"
