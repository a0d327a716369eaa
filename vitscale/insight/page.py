"""One HTML page that shows attention and needs nothing besides itself: no network, no other file.

Numbers travel as 8 bits: a row of attention is its largest patch (float32) and round(255 value / largest) per patch. The
head-mean maps, which follow the pointer, are averaged over squares of patches until all of them fit MAPS_BYTES_MAX.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitscale.base.errors import EnvironmentFault
from vitscale.insight.figures import COLORMAP, patches_of
from vitscale.insight.page_template import TEMPLATE
from vitscale.insight.plots import draw_depth, filters_picture, position_picture, svg_of
from vitscale.insight.views import ImageView, ModelView

MAPS_BYTES_MAX = 6 << 20
"""For all head-mean maps of the page, before base64 makes them a third larger."""
PICTURE_SIDE_MAX = 672


def write_page(path: Path, views: Sequence[ImageView], model: ModelView) -> None:
    """Write the page. Raises EnvironmentFault when it cannot be written."""
    assert views
    pool = squares_for(views)
    data = {
        "layers": model.layer_names,
        "heads": model.heads,
        "asking": model.asking,
        "colours": _base64((255 * COLORMAP(np.arange(256))[:, :3]).round().astype(np.uint8)),
        "images": [_image_record(view, pool) for view in views],
    }
    words = {
        "DESCRIPTION": html.escape(model.description),
        "ASKING": html.escape(model.asking.lower()),
        "DEPTH": svg_of(draw_depth(views, model)),
        "IMAGES": str(len(views)),
        "SQUARES": "each patch" if pool == 1 else f"squares of {pool} &times; {pool} patches",
        "OUTLIERS": ", ".join(str(n) for n in np.sum([view.outliers_L for view in views], axis=0)),
        "FILTERS": f'<img alt="patch filters" src="{png(filters_picture(model))}">',
        "SHARES": f"{len(model.filter_shares_F)} components, {100 * model.filter_shares_F.sum():.0f} % of the variance",
        "POSITIONS": _positions(model),
        # "</" would end the script element.
        "DATA": json.dumps(data).replace("</", "<\\/"),
    }
    text = TEMPLATE
    for word, value in words.items():
        text = text.replace(f"@@{word}@@", value)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"the page cannot be written to {path} ({error}); give a directory with room") from None


def squares_for(views: Sequence[ImageView]) -> int:
    """Side, in patches, of the squares the maps are averaged over so that all of them fit; divides the grid."""
    rows, columns = views[0].row.grid
    layers = len(views[0].mean_LNN)
    for pool in range(1, max(rows, columns) + 1):
        fits = len(views) * layers * (rows * columns // pool**2) ** 2 <= MAPS_BYTES_MAX
        if rows % pool == 0 and columns % pool == 0 and fits:
            return pool
    return max(rows, columns) if rows == columns else 1


def _positions(model: ModelView) -> str:
    picture = position_picture(model)
    if picture is None:
        return "<p class=small>The positions of this model are not learned.</p>"
    return f'<img alt="position similarity" src="{png(picture)}">'


def _image_record(view: ImageView, pool: int) -> dict[str, Any]:
    rows, columns = view.row.grid
    asking_XS = view.asking_LHN[..., -rows * columns :].reshape(-1, rows * columns)
    through_2S = np.stack([patches_of(row, view.row.grid).ravel() for row in (view.row.rollout_N, view.row.gradient_N)])
    return {
        "name": view.name,
        "caption": view.row.caption,
        "rows": rows,
        "columns": columns,
        "pool": pool,
        "tokens": view.asking_LHN.shape[-1],
        "picture": jpeg(view.row.image_HWC),
        "asking": _rows_in_8_bits(asking_XS),
        "through": _rows_in_8_bits(through_2S),
        "maps": _rows_in_8_bits(_pooled_maps(view, pool)),
        "distance": np.round(view.distance_LH, 1).tolist(),
        "entropy": np.round(view.entropy_LH, 2).tolist(),
    }


def _pooled_maps(view: ImageView, pool: int) -> np.ndarray:
    """Rows of the head-mean maps, patches to patches, averaged over asking squares and summed over seen ones' mean."""
    rows, columns = view.row.grid
    S = rows * columns
    results = []
    for map_NN in view.mean_LNN:
        cut = map_NN[-S:, -S:].astype(np.float32)
        six = cut.reshape(rows // pool, pool, columns // pool, pool, rows // pool, pool, columns // pool, pool)
        results.append(six.mean(axis=(1, 3, 5, 7)).reshape(S // pool**2, S // pool**2))
    return np.concatenate(results)


def _rows_in_8_bits(rows_XS: np.ndarray) -> dict[str, str]:
    largest_X1 = rows_XS.max(axis=1, keepdims=True).astype(np.float32)
    numbers = (255 * rows_XS / largest_X1.clip(1e-30)).round().astype(np.uint8)
    return {"largest": _base64(largest_X1.astype("<f4")), "numbers": _base64(numbers)}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def jpeg(image_HWC: np.ndarray) -> str:
    """A data URI; small images are enlarged pixel by pixel, so that they stay what they are."""
    times = max(1, 224 // image_HWC.shape[0])
    return _uri(image_HWC.repeat(times, 0).repeat(times, 1), "JPEG")


def png(image_HWC: np.ndarray) -> str:
    """A data URI."""
    return _uri(image_HWC, "PNG")


def _uri(image_HWC: np.ndarray, kind: str) -> str:
    box = io.BytesIO()
    Image.fromarray(image_HWC).save(box, format=kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(box.getvalue()).decode()}"
