"""Photographs: files of one's own, the colour space Lab, smaller versions, a flow's view of them.

Lab (CIE 1976, white point D65) separates how light a colour is from which colour it is. L runs from
0 (black) to 100 (white); a from green (-) to red (+), b from blue (-) to yellow (+), both 0 for
greys and rarely beyond 100. A step of 1 is about as much as an eye can tell apart. The conversions
are those of `skimage.color`.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.arguments import Size, checked
from nflib.core import DataError

LEAST = 8
"""Pixels a side that a photograph has at least."""
MOST = 2048
"""Pixels a side; a larger photograph is made smaller when it is read."""
ZERO = 128
"""The whole number that stands for a = 0, or b = 0, so that both fit into 0 .. 255."""


@checked
def read(file: str | Path) -> Tensor:
    """A photograph of one's own as uint8 ``(3, H, W)``: red, green, blue.

    Any format that pillow reads. It is turned as the camera noted (EXIF), grey pictures get three
    equal channels, palettes are looked up, what is transparent becomes white, 16 bits become 8,
    and sides beyond 2048 pixels are reduced.

    Raises: DataError if there is no such file, if it is no picture or a damaged one, or if a side
        has fewer than 8 pixels.
    """
    from PIL import Image, ImageOps

    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"read expects the file of a photograph, got {path}, which is no file.")
    try:
        with _opened(path) as opened:
            if opened.width * opened.height > 80_000_000:
                raise DataError(
                    "read expects a photograph of at most 80 million pixels, got "
                    f"{opened.width} x {opened.height} in {path}."
                )
            opened.draft("RGB", (MOST, MOST))  # a JPEG can be decoded at a smaller size
            opened.load()
            turned = ImageOps.exif_transpose(opened)
            image = _eight_bits(turned)
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"read expects a picture that pillow can open, got {path}: "
            f"{' '.join(str(error).split()).rstrip('.')}."
        ) from error
    image.thumbnail((MOST, MOST))
    if min(image.size) < LEAST:
        raise DataError(
            f"read expects at least {LEAST} pixels a side, got {image.width} x {image.height} "
            f"in {path}."
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _opened(path: Path) -> Any:
    """A picture whose pixels are not read yet; what pillow finds too large is refused later."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _eight_bits(image: Any) -> Any:
    """A picture of any kind as one of three channels of 8 bits, on white where transparent."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        # pillow would clip these to 255: 16 bits are scaled by their own full range.
        values = np.asarray(image, dtype=np.float64)
        full = 65535.0 if image.mode.startswith("I") else max(values.max(), 1e-9)
        image = Image.fromarray((values / full * 255).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def upload() -> Tensor:
    """A photograph that the reader chooses in the browser, as from `read`; in Colab only.

    Raises: DataError elsewhere, and if no file was chosen.
    """
    if "google.colab" not in sys.modules:
        raise DataError(
            'upload works in Colab only; elsewhere write read("the/path/of/your/photograph.jpg").'
        )
    from google.colab import files

    chosen = files.upload()
    if not chosen:
        raise DataError("upload expects a file, got none.")
    return read(next(iter(chosen)))


@checked
def to_lab(rgb: Tensor) -> Tensor:
    """Colours as L, a and b: uint8 ``(..., 3, H, W)`` to float32 of the same shape."""
    from skimage.color import rgb2lab

    _three(rgb, "to_lab", torch.uint8)
    return torch.from_numpy(rgb2lab(rgb.numpy(), channel_axis=-3).astype(np.float32))


@checked
def to_rgb(lab: Tensor) -> Tensor:
    """L, a and b as colours: float ``(..., 3, H, W)`` to uint8 of the same shape.

    Colours that no screen can show are clipped, red, green and blue each by itself.
    """
    from skimage.color import lab2rgb

    _three(lab, "to_rgb", torch.float32)
    with warnings.catch_warnings():
        # It says so of every colour that it clips.
        warnings.filterwarnings("ignore", message=".*negative Z values", category=UserWarning)
        rgb = lab2rgb(lab.numpy(), channel_axis=-3)
    return torch.from_numpy((rgb * 255).round().astype(np.uint8))


def _three(picture: Tensor, name: str, dtype: torch.dtype) -> None:
    if picture.dtype != dtype or picture.ndim < 3 or picture.shape[-3] != 3:
        raise DataError(
            f"{name} expects {str(dtype).removeprefix('torch.')} of shape (..., 3, height, width), "
            f"got {str(picture.dtype).removeprefix('torch.')} {tuple(picture.shape)}."
        )


@checked
def light_and_colours(
    rgb: Tensor, size: Size = 64, colour_size: Size = 32
) -> tuple[Tensor, Tensor]:
    """What a flow that colours sees of photographs, and what it learns to draw.

    The eye sees colours coarsely, so a and b are kept at a lower resolution than L. Pictures of any
    shape are squeezed to squares.

    Args:
        rgb: uint8 ``(N, 3, H, W)``.
        size, colour_size: sides of the squares of L and of a and b, in pixels.

    Returns: L / 50 - 1, float32 ``(N, 1, size, size)``, and a and b rounded to whole numbers, plus
        128, uint8 ``(N, 2, colour_size, colour_size)``.
    """
    _three(rgb, "light_and_colours", torch.uint8)
    lab = to_lab(_resized(rgb.float(), size).round().clamp(0, 255).to(torch.uint8))
    colours = _resized(lab[:, 1:], colour_size).round() + ZERO
    return lab[:, :1] / 50 - 1, colours.clamp(0, 255).to(torch.uint8)


@checked
def paint(photograph: Tensor, colours: Tensor) -> Tensor:
    """A photograph's lightness at full resolution under colours that are enlarged to it.

    Args:
        photograph: uint8 ``(3, H, W)``; its own colours are not used.
        colours: a + 128 and b + 128, ``(N, 2, h, w)``.

    Returns: uint8 ``(N, 3, H, W)``. Enlarging is bilinear.
    """
    if colours.ndim != 4 or colours.shape[1] != 2:
        raise DataError(f"paint expects colours of shape (N, 2, h, w), got {tuple(colours.shape)}.")
    light = to_lab(photograph)[:1]
    wide = F.interpolate(colours.float() - ZERO, light.shape[1:], mode="bilinear")
    return to_rgb(torch.cat([light.expand(len(wide), *light.shape), wide], 1))


@checked
def shrink(images: Tensor, factor: Size = 4) -> Tensor:
    """Images made smaller by a whole factor, ``(..., H, W)`` to uint8 ``(..., H / f, W / f)``.

    Bicubic with antialiasing (torch's ``interpolate``): along each axis a small pixel is the mean
    of the large ones around it, weighted by Keys' cubic with a = -1/2, stretched by f,

        w(t) = 1.5 |t|^3 - 2.5 |t|^2 + 1               for |t| < 1
               -0.5 |t|^3 + 2.5 |t|^2 - 4 |t| + 2      for |t| < 2,    t = distance / f

    divided by their sum, so that those beyond the image's edge count for nothing. The results are
    rounded and cut to 0 .. 255. pillow's bicubic and MATLAB's ``imresize`` use the same weights.

    Args:
        images: grey levels 0 .. 255, uint8 or floating-point, with at least a dim for channels.
        factor: f, which divides both sides.
    """
    _images(images, "shrink")
    *lead, height, width = images.shape
    if height % factor or width % factor:
        raise DataError(
            f"shrink expects sides that are multiples of its factor {factor}, "
            f"got {height} x {width}."
        )
    size = (height // factor, width // factor)
    flat = images.float().reshape(-1, 1, height, width)
    small = F.interpolate(flat, size, mode="bicubic", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).reshape(*lead, *size)


@checked
def low_and_high(rgb: Tensor, scale: Size = 4, multiple: Size = 8) -> tuple[Tensor, Tensor]:
    """What a flow that enlarges sees of photographs, and what it learns to draw.

    Args:
        rgb: uint8 ``(N, 3, H, W)``; cut at the right and at the bottom where a side is no multiple.
        scale: how many times smaller the flow sees them.
        multiple: of this and of scale the sides have to be multiples (`nflib.models.srflow`: 2 to
            the number of levels).

    Returns: the photographs made smaller, see `shrink`, as float32 in [-1, 1], black -1 and white
        1; and the photographs, uint8.
    """
    _three(rgb, "low_and_high", torch.uint8)
    unit = math.lcm(scale, multiple)
    height, width = (side // unit * unit for side in rgb.shape[-2:])
    if not height or not width:
        raise DataError(
            f"low_and_high expects photographs of at least {unit} pixels a side, "
            f"got {rgb.shape[-2]} x {rgb.shape[-1]}."
        )
    high = rgb[..., :height, :width]
    return shrink(high, scale) / 127.5 - 1, high


def _images(images: Tensor, name: str) -> None:
    is_number = images.dtype == torch.uint8 or images.is_floating_point()
    if not is_number or images.ndim < 3 or 0 in images.shape[-3:]:
        raise DataError(
            f"{name} expects uint8 or floating-point images of shape (..., channels, height, "
            f"width), got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}."
        )


def _resized(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
