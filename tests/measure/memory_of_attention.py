"""Peak memory of everything the attention page computes of one image, above the loaded model.

    OMP_NUM_THREADS=1 python -m tests.measure.memory_of_attention [DEPTH]

ViT-L/16 at 384 pixels with fresh weights (DEPTH: other than 24 layers), one thread; prints one JSON line. Growth is the
peak resident size (VmHWM) after the page's numbers exist, less the resident size when all weights have been touched.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vitscale.insight.views import view_image
from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer


def status_mib(name: str) -> float:
    """A line of this process's status, in MiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(depth: int) -> dict[str, float]:
    torch.set_num_threads(1)
    config = ModelConfig(image_size=384, patch_size=16, width=1024, depth=depth, heads=16, classes=1000)
    model = VisionTransformer(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight, std=0.02)  # else no gradient reaches the blocks
    image_BCHW = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    touched = float(sum(parameter.sum() for parameter in model.parameters()))
    before_mib, started_s = status_mib("VmRSS"), time.perf_counter()
    view = view_image(model, image_BCHW, np.zeros((384, 384, 3), np.uint8), name="x", caption=lambda label, p: "x")
    assert np.isfinite(view.row.gradient_N).all() and np.isfinite(touched)
    return {
        "depth": depth,
        "resident_with_weights_mib": round(before_mib),
        "growth_at_peak_mib": round(status_mib("VmHWM") - before_mib),
        "all_maps_would_be_mib": round(depth * 16 * config.tokens**2 * 4 / 2**20),
        "elapsed_s": round(time.perf_counter() - started_s, 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 24)))
