"""A reader's own photograph, the colour space Lab, and BSDS500 by name."""

from __future__ import annotations

import struct
import sys
import tarfile
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nflib import data
from nflib.core import DataError
from nflib.data import archives, downloads, photographs


def colourful(width: int = 40, height: int = 24) -> Image.Image:
    """A picture whose left half is red and whose right half is blue, the top row white."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 200
    pixels[:, width // 2 :, 2] = 200
    pixels[0] = 255
    return Image.fromarray(pixels)


def stored(folder: Path, image: Image.Image, name: str = "photo.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def near(found: Tensor, expected: list[int], tolerance: int = 0) -> bool:
    return bool(((found.int() - torch.tensor(expected)).abs() <= tolerance).all())


@pytest.mark.parametrize(
    "name", ["photo.png", "photo.bmp", "photo.tiff", "photo.webp", "photo.gif"]
)
def test_pictures_of_many_formats_are_read(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    found = photographs.read(stored(tmp_path, colourful(), name, **options))
    assert found.dtype == torch.uint8
    assert found.shape == (3, 24, 40)
    assert near(found[:, 12, 5], [200, 0, 0], 4)
    assert near(found[:, 12, 35], [0, 0, 200], 4)
    assert photographs.read(str(tmp_path / name)).shape == (3, 24, 40)


def test_grey_and_16_bit_pictures_get_three_equal_channels(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 40).astype(np.uint8)[None].repeat(16, 0)
    grey = photographs.read(stored(tmp_path, Image.fromarray(ramp)))
    assert torch.equal(grey[0], torch.from_numpy(ramp))
    assert torch.equal(grey[1], grey[0])
    assert torch.equal(grey[2], grey[0])
    deep = photographs.read(
        stored(tmp_path, Image.fromarray(ramp.astype(np.uint16) * 257), "16.png")
    )
    assert torch.equal(deep, grey)
    dark = photographs.read(stored(tmp_path, Image.fromarray(ramp.astype(np.uint16)), "dark.png"))
    assert dark.max() <= 1  # 16 bits are not stretched to what one picture holds
    real = Image.fromarray(ramp.astype(np.float32) / 255)
    assert near(photographs.read(stored(tmp_path, real, "real.tiff"))[0, 0, -1], [255])
    two = stored(tmp_path, Image.fromarray(ramp > 100), "two.png")
    assert set(photographs.read(two).unique().tolist()) == {0, 255}


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    image = colourful().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.uint8([[0] * 20 + [255] * 20]), (24, 1))))
    found = photographs.read(stored(tmp_path, image))
    assert near(found[:, 12, 5], [255, 255, 255])
    assert near(found[:, 12, 35], [0, 0, 200])
    palette = colourful().quantize(4)
    first = palette.getpixel((5, 12))
    found = photographs.read(stored(tmp_path, palette, "palette.png", transparency=first))
    assert near(found[:, 12, 5], [255, 255, 255])
    assert near(found[:, 12, 35], [0, 0, 200], 3)
    grey = Image.merge("LA", [Image.new("L", (10, 10), 50), Image.new("L", (10, 10), 0)])
    assert near(photographs.read(stored(tmp_path, grey, "la.png"))[:, 5, 5], [255] * 3)


def test_a_photograph_is_turned_as_the_camera_noted(tmp_path: Path) -> None:
    turned = colourful()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    found = photographs.read(stored(tmp_path, turned, "photo.jpg", exif=exif, quality=95))
    assert found.shape == (3, 40, 24)
    assert near(found[:, 5, 10], [200, 0, 0], 12)
    assert near(found[:, 35, 10], [0, 0, 200], 12)


def test_cmyk_and_large_photographs(tmp_path: Path) -> None:
    found = photographs.read(stored(tmp_path, colourful().convert("CMYK"), "cmyk.jpg"))
    assert near(found[:, 12, 5], [200, 0, 0], 40)
    found = photographs.read(stored(tmp_path, Image.new("RGB", (4200, 40)), "wide.png"))
    assert found.shape == (3, 20, 2048)
    with pytest.raises(DataError, match="at least 8 pixels a side, got 2048 x 4 in"):
        photographs.read(stored(tmp_path, Image.new("RGB", (4096, 8)), "thin.png"))


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG that claims a size; nothing behind it."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x00\x00\x00\x01IDAT\x00"
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" + head + struct.pack(">I", zlib.crc32(head)) + data


def test_files_that_are_no_photograph_are_one_sentence(tmp_path: Path) -> None:
    whole = stored(tmp_path, colourful(200, 200), "whole.jpg").read_bytes()
    files = {
        "text.jpg": b"not a picture",
        "empty.png": b"",
        "half.jpg": whole[: len(whole) // 2],
        "half.png": stored(tmp_path, colourful(200, 200)).read_bytes()[:200],
        "bomb.png": png_of(60_000, 60_000),
        "large.png": png_of(10_000, 9_000),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DataError, match=r"^read expects a p[^\n]* in? ?[^\n]*\.$|got"
        ) as caught:
            photographs.read(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="at most 80 million pixels, got 10000 x 9000 in"):
        photographs.read(tmp_path / "large.png")
    for missing in (tmp_path / "nowhere.jpg", tmp_path):
        with pytest.raises(
            DataError, match="^read expects the file of a photograph, got .* no file"
        ):
            photographs.read(missing)
    with pytest.raises(DataError, match="at least 8 pixels a side, got 7 x 30 in"):
        photographs.read(stored(tmp_path, colourful(7, 30), "tiny.png"))
    with pytest.raises(ValueError, match="read expects file to be"):
        photographs.read(3)  # type: ignore[arg-type]


def test_upload_asks_colab_and_says_so_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r'^upload works in Colab only; elsewhere write read\("'):
        photographs.upload()
    stored(tmp_path, colourful(), "mine.png")
    monkeypatch.chdir(tmp_path)
    chosen = {"mine.png": b""}
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: chosen)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert photographs.upload().shape == (3, 24, 40)
    chosen.clear()
    with pytest.raises(DataError, match="upload expects a file, got none"):
        photographs.upload()


# --- Lab ---------------------------------------------------------------------------------------


def flat(*rgb: int) -> Tensor:
    return torch.tensor(rgb, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)


def test_lab_of_colours_that_are_known() -> None:
    # By hand: white 100, 0, 0; black 0, 0, 0; sRGB's red 53.24, 80.09, 67.20; blue 32.30, 79.19,
    # -107.86 (the values that every table of Lab for D65 gives).
    known = {
        (255, 255, 255): (100.0, 0.0, 0.0),
        (0, 0, 0): (0.0, 0.0, 0.0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 0, 255): (32.30, 79.19, -107.86),
    }
    for rgb, lab in known.items():
        found = photographs.to_lab(flat(*rgb))[:, 0, 0]
        torch.testing.assert_close(found, torch.tensor(lab), atol=0.02, rtol=0)
        assert torch.equal(photographs.to_rgb(photographs.to_lab(flat(*rgb))), flat(*rgb))


def test_lab_and_back_of_a_batch() -> None:
    torch.manual_seed(0)
    x = torch.randint(256, (2, 3, 16, 8), dtype=torch.uint8)
    assert torch.equal(photographs.to_rgb(photographs.to_lab(x)), x)
    assert torch.equal(photographs.to_lab(x)[1], photographs.to_lab(x[1]))


def test_colours_that_no_screen_shows_are_clipped_without_a_word() -> None:
    lab = torch.tensor([20.0, 0.0, 120.0])[:, None, None].expand(3, 8, 8).contiguous()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        assert photographs.to_rgb(lab)[2, 0, 0] == 0
        assert warnings.filters == filters
    assert not told


def test_a_flow_sees_light_and_draws_colours() -> None:
    x = torch.stack([flat(255, 0, 0), flat(128, 128, 128)]).repeat(1, 1, 4, 6)
    light, colours = photographs.light_and_colours(x, 16, 8)
    assert light.shape == (2, 1, 16, 16)
    assert colours.shape == (2, 2, 8, 8)
    assert colours.dtype == torch.uint8
    assert colours[0].unique(dim=1)[:, 0, 0].tolist() == [128 + 80, 128 + 67]
    assert colours[1].unique().tolist() == [128]
    assert torch.allclose(light[0], torch.tensor(53.24 / 50 - 1), atol=1e-3)


def test_small_colours_are_the_averages_of_large_ones() -> None:
    halves = torch.cat([flat(200, 0, 0), flat(0, 0, 200)], 2)[None]
    _, colours = photographs.light_and_colours(halves, 16, 2)
    lab = photographs.to_lab(halves[0])
    for k, x in ((0, 0), (1, 15)):
        expected = lab[1:, 0, x] + 128
        # Smoothing over the border pulls by less than half of the way.
        other = lab[1:, 0, 15 - x] + 128
        share = (colours[0, 1, 0, k] - expected[1]) / (other[1] - expected[1])
        assert 0 < share < 0.35


def test_paint_keeps_the_light_and_enlarges_the_colours() -> None:
    torch.manual_seed(0)
    photograph = torch.randint(60, 190, (3, 40, 60), dtype=torch.uint8)
    colours = torch.stack([torch.full((2, 4, 6), 128), torch.full((2, 4, 6), 140)])
    painted = photographs.paint(photograph, colours)
    assert painted.shape == (2, 3, 40, 60)
    assert painted.dtype == torch.uint8
    before, after = photographs.to_lab(photograph), photographs.to_lab(painted)
    assert (after[:, 0] - before[0]).abs().max() < 1
    assert after[0, 1:].abs().max() < 1
    assert (after[1, 1:] - 12).abs().mean() < 0.6
    with pytest.raises(DataError, match=r"paint expects colours of shape \(N, 2, h, w\), got \(2,"):
        photographs.paint(photograph, colours[0])


def test_a_photographs_own_colours_come_back_roughly() -> None:
    whole = torch.from_numpy(np.array(colourful(64, 64))).permute(2, 0, 1)
    _, colours = photographs.light_and_colours(whole[None], 64, 32)
    again = photographs.paint(whole, colours)[0]
    assert (again[:, 8:, 4:28].int() - whole[:, 8:, 4:28].int()).abs().max() <= 4


@pytest.mark.parametrize("name", ["to_lab", "to_rgb", "light_and_colours"])
def test_other_tensors_are_one_sentence(name: str) -> None:
    call = getattr(photographs, name)
    wanted = "float32" if name == "to_rgb" else "uint8"
    dtype = torch.float32 if name == "to_rgb" else torch.uint8
    for wrong in (torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.zeros(1, 2, 8, 8, dtype=dtype)):
        with pytest.raises(DataError, match=rf"^{name} expects {wanted} of shape .*, got .*\.$"):
            call(wrong)


# --- BSDS500 -----------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like BSDS500's with 3, 2 and 2 photographs, and no other place to look."""
    monkeypatch.setattr(
        archives, "PHOTOGRAPHS", {"train": ("train", 3), "valid": ("val", 2), "test": ("test", 2)}
    )
    monkeypatch.setattr(downloads, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(downloads, "clone_folder", lambda: None)
    monkeypatch.setenv("NFLIB_DATA", str(tmp_path / "data"))
    root = tmp_path / "data" / "BSDS500"
    for folder, count in archives.PHOTOGRAPHS.values():
        (root / folder).mkdir(parents=True)
        for k in range(count):
            size = (481, 321) if k % 2 == 0 else (321, 481)
            colour = (10 * k + 5, 100, {"train": 0, "val": 100, "test": 200}[folder])
            Image.new("RGB", size, colour).save(root / folder / f"{k}.jpg", quality=95)
    return root


def test_bsds500_from_a_folder(few: Path) -> None:
    for split, count, blue in (("train", 3, 0), ("valid", 2, 100), ("test", 2, 200)):
        found = archives.bsds500(split, download=False)
        assert found.x.shape == (count, 3, 321, 321)
        assert found.x.dtype == torch.uint8
        assert found.levels == 256
        assert near(found.x[:, 2, 100, 100], [blue] * count, 3)
        assert near(found.x[:, 0, 100, 100], [10 * k + 5 for k in range(count)], 3)


def test_bsds500_is_the_middle_square(few: Path) -> None:
    stripes = np.zeros((321, 481, 3), dtype=np.uint8)
    stripes[:, 80:401] = 255
    Image.fromarray(stripes).save(few / "train" / "0.jpg", quality=95)
    assert archives.bsds500("train", download=False).x[0].float().mean() > 253


def packed(root: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(root.glob("*/*.jpg")):
            archive.add(file, f"BSR/BSDS500/data/images/{file.relative_to(root)}")
        archive.add(root / "train" / "0.jpg", "BSR/documentation/other/0.jpg")
    return path


def test_bsds500_from_the_archive(few: Path, tmp_path: Path) -> None:
    expected = archives.bsds500("test", download=False).x
    packed(few, tmp_path / "all.tgz")
    few.rename(few.with_name("elsewhere"))
    few.mkdir()
    (tmp_path / "all.tgz").rename(few / "BSR_bsds500.tgz")
    assert torch.equal(archives.bsds500("test", download=False).x, expected)


def test_a_folder_that_is_not_whole_is_not_used(few: Path, tmp_path: Path) -> None:
    (few / "val" / "0.jpg").unlink()
    with pytest.raises(DataError, match="^bsds500 needs .*, found damaged at .*BSDS500"):
        archives.bsds500("train", download=False)
    (few / "val" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="damaged photograph"):
        archives.read_photographs(few)
    Image.new("RGB", (300, 200)).save(few / "val" / "0.jpg")
    with pytest.raises(ValueError, match="a photograph of 300 x 200 pixels"):
        archives.read_photographs(few)
    (tmp_path / "broken.tgz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="damaged archive"):
        archives.read_photographs(tmp_path / "broken.tgz")


def test_the_card_says_how_a_download_is_checked() -> None:
    card = data.card("bsds500")
    assert not card.embedded
    assert card.splits == {"train": 200, "valid": 100, "test": 200}
    assert "no checksum is published" in card.what
    (file,) = card.files
    assert file.sha256 is None
    assert file.check is archives.read_photographs
    assert {s: n for s, (_, n) in archives.PHOTOGRAPHS.items()} == card.splits
