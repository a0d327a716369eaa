"""Resize with antialiasing: bicubic as Pillow, torchvision and timm do it, straight into a slot of the batch.

torch's kernel for uint8 (derived from Pillow-SIMD) is an eighth of Pillow's time when its result lies in memory as
H,W,3, as here. PSNR against Pillow: above 50 dB, where resizing by area reaches 42 dB and costs half as much again.
"""

import threading

import numpy as np
import torch

_scratch = threading.local()


def resample(image: np.ndarray, out_HWC: np.ndarray) -> None:
    """Resize a non-empty H,W,3 uint8 image to the size of `out_HWC` (contiguous) and write it there."""
    out_height, out_width = out_HWC.shape[:2]
    source = torch.from_numpy(_packed(image)).permute(2, 0, 1).unsqueeze(0)
    out = torch.from_numpy(out_HWC).permute(2, 0, 1).unsqueeze(0)
    # What F.interpolate(mode="bicubic", antialias=True) calls, but for `out`: it would return planes of colour, and
    # turning those into pixels takes as long as resizing.
    torch.ops.aten._upsample_bicubic2d_aa.out(source, [out_height, out_width], False, None, None, out=out)


def _packed(image: np.ndarray) -> np.ndarray:
    """The image without gaps between its rows: the kernel would copy it too, into fresh memory."""
    if image.flags.c_contiguous:
        return image
    memory = getattr(_scratch, "memory", None)
    if memory is None or len(memory) < image.size:
        _scratch.memory = memory = np.empty(2 * image.size, np.uint8)
    packed: np.ndarray = memory[: image.size].reshape(image.shape)
    packed[:] = image
    return packed
