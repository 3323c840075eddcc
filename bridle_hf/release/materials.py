"""Materials of the released checkpoints: packages under permissive licences, and what of each is in the weights."""

from dataclasses import dataclass

from bridle_hf.demos.data import MUSESCORE
from bridle_hf.sets.fetching import Package


@dataclass(frozen=True)
class Material:
    """A package that weights may be made of.

    Args:
        licence: of what is used of it; an SPDX name where there is one.
        what: is used of it, in words.
    """

    package: Package
    licence: str
    what: str


FLUID = Material(
    Package(
        "apt", "fluidr3mono-gm-soundfont", "2.315-7",
        "4098301bf29f4253c2f5799a844f42dd4aa733d91a210071ad16d7757dea51d6",
    ),
    "MIT", "a soundfont: instruments and drums",
)  # fmt: skip
GENERAL = Material(MUSESCORE, "MIT", "a soundfont: instruments and drums")
RECORDINGS = Material(
    Package(
        "apt", "sonic-pi-samples", "3.2.2~repack-8", "25f2312d2fae005e6ad0f4726b8ed3084e776006a5a132083506e960224ac79d"
    ),
    "CC0-1.0", "165 recordings: drums, loops, ambience, noises",
)  # fmt: skip
FLITE = Material(
    Package("apt", "libflite1", "2.2-5", "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061"),
    "BSD-like, of Carnegie Mellon University", "synthetic speech by four voices",
)  # fmt: skip
DRAWINGS = Material(
    Package(
        "apt", "openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"
    ),
    "public domain", "8,121 drawings",
)  # fmt: skip
