"""The sizes of the literature as exact numbers: a name such as "L/16" or "So400m/14-gpu" to settings of the model.

Everything a size does not fix (image size, classes, pooling, positions) stays as the configuration has it.

-gpu  the same width and depth with heads of 64 columns (unless they have 64 or 128) and a feed-forward width that is a
      multiple of 128: attention kernels pad other heads, tensor cores other matrices. Weights of the two do not mix.
"""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Size:
    """One row of the table below."""

    width: int
    depth: int
    mlp_width: int
    heads: int
    source: str
    more: tuple[tuple[str, Any], ...] = ()
    """Settings beyond the four numbers, for the architectures that have them."""


_VIT = "Dosovitskiy et al. 2021, table 1"
_SCALING = "Zhai et al. 2022, table 2, and big_vision models/vit.py"
SIZES = {
    "Ti": Size(width=192, depth=12, mlp_width=768, heads=3, source="Touvron et al. 2021 (DeiT), table 1"),
    "S": Size(width=384, depth=12, mlp_width=1536, heads=6, source="Touvron et al. 2021 (DeiT), table 1"),
    "M": Size(width=512, depth=12, mlp_width=2048, heads=8, source="big_vision models/vit.py"),
    "B": Size(width=768, depth=12, mlp_width=3072, heads=12, source=_VIT),
    "L": Size(width=1024, depth=24, mlp_width=4096, heads=16, source=_VIT),
    "So400m": Size(width=1152, depth=27, mlp_width=4304, heads=16, source="Alabdulmohsin et al. 2023 (SoViT), big_vision"),
    "H": Size(width=1280, depth=32, mlp_width=5120, heads=16, source=_VIT),
    "g": Size(width=1408, depth=40, mlp_width=6144, heads=16, source=_SCALING),
    "g-opt": Size(width=1536, depth=40, mlp_width=6144, heads=16, source="big_vision models/vit.py"),
    "G": Size(width=1664, depth=48, mlp_width=8192, heads=16, source=_SCALING),
    "G-opt": Size(width=1536, depth=48, mlp_width=8192, heads=16, source="big_vision models/vit.py"),
    "e": Size(width=1792, depth=56, mlp_width=15360, heads=16, source="Chen et al. 2022 (PaLI), big_vision models/vit.py"),
    "22B": Size(
        width=6144,
        depth=48,
        mlp_width=24576,
        heads=48,
        source="Dehghani et al. 2023, table 1 and section 2",
        more=(("parallel", True), ("qk_norm", True), ("qkv_bias", False), ("norm_kind", "rmsnorm")),
    ),
}
PATCH_SIZES = (8, 14, 16, 32)
_NAME = re.compile(r"(?P<size>.+)/(?P<patch>\d+)(?P<twin>-gpu)?")


def preset_names() -> list[str]:
    """Every name `preset` takes."""
    return [f"{size}/{patch}{twin}" for size in SIZES for patch in PATCH_SIZES for twin in ("", "-gpu")]


def preset(name: str) -> dict[str, Any]:
    """Settings of section `model` for a name. Raises ValueError where there is none."""
    match = _NAME.fullmatch(name)
    if match is None or match["size"] not in SIZES or int(match["patch"]) not in PATCH_SIZES:
        raise ValueError(
            f"expected SIZE/PATCH or SIZE/PATCH-gpu with a size of {', '.join(SIZES)} and a patch of "
            f"{', '.join(map(str, PATCH_SIZES))}, got {name!r}"
        )
    size = SIZES[match["size"]]
    heads, mlp_width = size.heads, size.mlp_width
    if match["twin"]:
        heads = heads if size.width // heads in (64, 128) else size.width // 64
        mlp_width = -(-mlp_width // 128) * 128
    numbers = {"width": size.width, "depth": size.depth, "heads": heads, "mlp_width": mlp_width}
    return {"patch_size": int(match["patch"]), **numbers, **dict(size.more)}
