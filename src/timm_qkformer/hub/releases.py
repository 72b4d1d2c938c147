"""What is known about published checkpoints: the authors' files by md5, and what was measured with them."""

from typing import NamedTuple, Optional

__all__ = ["RELEASES", "Release", "find_release"]


class Release(NamedTuple):
    """A checkpoint of the authors' release.

    Its accuracy was measured with coupled neurons. `per_sample` is what independent measurements on the authors'
    tracker (issue 14) found with the same weights and neurons that keep samples apart.
    """

    model: str
    tag: str
    md5: str
    input_size: int
    top1: float  # percent, ImageNet-1k validation, as the file's name has it
    per_sample: Optional[float] = None

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"


RELEASES = (
    Release("qkformer_hst10_384", "in1k", "60df416983ae326bb14bdb4566444320", 224, 78.85, 74.20),
    Release("qkformer_hst10_512", "in1k", "85dd1f94c87ba5ec908fed5d0a3f7f69", 224, 82.08),
    Release("qkformer_hst10_768", "in1k", "dc1595408ed1bd40346be2bdaf5015d5", 224, 84.29, 78.70),
    Release("qkformer_hst10_768", "ft288_in1k", "ba20af8eb450d4ec9c71009fde8e7125", 288, 85.30),
    Release("qkformer_hst10_768", "ft384_in1k", "99a671118f67a680aa38b6ac5aae449a", 384, 85.65),
)


def find_release(md5: str) -> Optional[Release]:
    """The authors' checkpoint with this md5, if it is one."""
    return next((release for release in RELEASES if release.md5 == md5), None)
