"""Figures that the QKFormer paper (arXiv 2403.16552) and its repository state, beside which ours are put.

Those of complexity, firing rates and memory stand with the instruments that measure the same.

Two sources. README: the table in the authors' repository, https://github.com/zhouchenlin2096/QKFormer. Copy: a public
conversion of the paper to Markdown, which we could not compare with the PDF and whose conclusion is not the paper's; a
figure found there alone is marked with a dagger wherever it is printed.
"""

from typing import NamedTuple

README = "README"
COPY = "†"


class Published(NamedTuple):
    """A published figure and where it was read."""

    value: float
    source: str

    def __str__(self) -> str:
        return f"{self.value:.2f}{COPY if self.source == COPY else ''}"


def _copied(values: dict[str, float]) -> dict[str, Published]:
    return {name: Published(value, COPY) for name, value in values.items()}


# Millions of parameters, by registered model.
PARAMETERS: dict[str, Published] = {
    "qkformer_hst10_384": Published(16.47, README),
    "qkformer_hst10_512": Published(29.08, README),
    "qkformer_hst10_768": Published(64.96, README),
    "qkformer_hst4_384": Published(6.74, COPY),  # for CIFAR-10 and CIFAR-100 alike
    "qkformer_hst2_256": Published(1.50, COPY),  # for CIFAR10-DVS and DVS128 Gesture alike
}

# Top-1 on CIFAR-100 in percent, by experiment and variant; HST-4-384, T = 4 unless the variant says otherwise.
TOP1: dict[str, dict[str, Published]] = {
    "ablation_time_steps": _copied({"T = 1": 78.51, "T = 2": 80.08, "T = 4": 81.15, "T = 6": 81.30}),
    "ablation_attention": _copied(
        {"QKTA + SSA": 81.15, "QKCA + SSA": 81.07, "QKTA + QKCA": 81.04, "SSA": 81.23, "QKCA": 81.00, "QKTA": 79.09}
    ),
    "ablation_neuron": _copied({"LIF": 81.15, "IF": 80.95, "PLIF": 81.12}),
}

# Millions of parameters with these kinds of attention in the first two stages and in the last: HST-4-384 for CIFAR-100,
# HST-2-256 for CIFAR10-DVS.
ATTENTION_PARAMETERS: dict[str, dict[str, Published]] = {
    "qkformer_hst4_384": _copied(
        {"QKTA + SSA": 6.74, "QKCA + SSA": 6.74, "QKTA + QKCA": 6.44, "SSA": 6.79, "QKCA": 6.44, "QKTA": 6.44}
    ),
    "qkformer_hst2_256": _copied(
        {"QKTA + SSA": 1.50, "QKCA + SSA": 1.50, "QKTA + QKCA": 1.44, "SSA": 1.52, "QKCA": 1.44, "QKTA": 1.44}
    ),
}
