"""Sound: reading it, turning it into integers, hearing it, seeing it, and tones that need no data.

A waveform is a float tensor ``(length,)`` or ``(batch, length)`` in [-1, 1] and a rate in samples a
second. Autoregressive models predict integers 0 .. k-1; two pairs of functions make them, evenly
(`linear`) or finely near silence and coarsely where it is loud (`mu_law`).
"""

from __future__ import annotations

import base64
import io
import math
import warnings
import wave
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from nflib.arguments import Levels, Positive, Size, checked
from nflib.core import ShapeError
from nflib.plot.arrays import array
from nflib.plot.look import DATA, one_axes
from nflib.wavenet.spectrum import spectrum_power

__all__ = [
    "PITCHES",
    "RATE",
    "AudioError",
    "Player",
    "linear",
    "linear_inverse",
    "load_wav",
    "mu_law",
    "mu_law_inverse",
    "player",
    "spectrogram",
    "spectrum_power",
    "tones",
    "wav_bytes",
    "waveform",
    "whistle_noise",
    "whistles",
]

RATE = 8000
"""Samples a second that the course works with: the rate of telephones."""

PITCHES = (262, 294, 330, 349, 392, 440, 494, 523)
"""The classes of `tones` in Hz: C major from C4 to C5, rounded."""


class AudioError(ValueError):
    """A recording that cannot be used; the message says why."""


@checked
def mu_law(x: Tensor, levels: Levels = 256) -> Tensor:
    """Waveforms in [-1, 1] to integers 0 .. levels-1, with levels that are finer near zero.

    With mu = levels - 1:

        f = sign(x) log(1 + mu |x|) / log(1 + mu),    k = floor((f + 1) / 2 mu + 1/2)

    Returns int64 of x's shape. ITU-T G.711; van den Oord et al. 2016,
    https://arxiv.org/abs/1609.03499.
    """
    _check_waveform(x, "mu_law")
    mu = levels - 1
    return _nearest(x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu), mu)


@checked
def mu_law_inverse(k: Tensor, levels: Levels = 256) -> Tensor:
    """The waveform in [-1, 1] that integers of `mu_law` stand for: ``sign(f) (levels^|f| - 1)/mu``.

    float32, or k's own dtype where it is a floating one (float64 say), in which case k may lie
    between the levels.
    """
    f = linear_inverse(k, levels)
    top = torch.tensor(math.log(levels), dtype=f.dtype, device=f.device)
    # expm1(log k) in the place of k - 1: the ends are exactly -1 and 1.
    return f.sign() * torch.expm1(f.abs() * top) / torch.expm1(top)


@checked
def linear(x: Tensor, levels: Levels = 256) -> Tensor:
    """Waveforms in [-1, 1] to integers 0 .. levels-1, evenly.

    ``k = floor((x + 1) / 2 (levels - 1) + 1/2)``, int64 of x's shape.
    """
    _check_waveform(x, "linear")
    return _nearest(x, levels - 1)


@checked
def linear_inverse(k: Tensor, levels: Levels = 256) -> Tensor:
    """The waveform that integers of `linear` stand for: ``2 k / (levels - 1) - 1``."""
    k = k if k.is_floating_point() else k.to(torch.float32)
    return 2 * k / (levels - 1) - 1


def _nearest(f: Tensor, mu: int) -> Tensor:
    return ((f + 1) / 2 * mu + 0.5).floor().long()


def _check_waveform(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise ShapeError(f"{name} expects floating-point numbers in [-1, 1], got {x.dtype}.")
    largest = x.abs().max().item() if x.numel() else 0.0
    if not largest <= 1:
        raise ValueError(f"{name} expects a waveform in [-1, 1], got values up to {largest:g}.")


def load_wav(path: str | Path, rate: int = RATE) -> Tensor:
    """A WAV file as one channel of floats in [-1, 1], ``(length,)``, at ``rate`` samples a second.

    Takes 8, 16, 24 and 32 bits and floating point. Several channels are averaged and another rate
    is resampled; one warning says so.

    Raises: AudioError, in one sentence, if the file is missing, no WAV file, truncated, empty,
        silent (all samples equal) or not finite.
    """
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    path = Path(path)
    if not path.is_file():
        raise AudioError(f"There is no file {path}.")
    head = path.read_bytes()[:8]
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64"):
        raise AudioError(f"{path} is not a WAV file: it does not begin with RIFF.")
    declared = int.from_bytes(head[4:8], "big" if head[:4] == b"RIFX" else "little") + 8
    # A recorder that writes to a pipe cannot know the size and declares the largest.
    if path.stat().st_size < declared < 2**32:
        raise AudioError(
            f"{path} is truncated: it declares {declared:,} bytes and has {path.stat().st_size:,}."
        )
    try:
        with warnings.catch_warnings():
            # Chunks of other programs beside the sound.
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            found, samples = wavfile.read(path)
    except Exception as error:
        # scipy meets damage with errors of many types.
        raise AudioError(f"{path} is no readable WAV file: {str(error).rstrip('.')}.") from error
    if samples.size == 0:
        raise AudioError(f"{path} is empty: it holds no samples.")
    notes = []
    waveform = _unit(samples)
    if waveform.ndim == 2 and waveform.shape[1] > 1:
        notes.append(f"its {waveform.shape[1]} channels were averaged")
    waveform = waveform.reshape(len(waveform), -1).mean(1)
    if not np.isfinite(waveform).all():
        raise AudioError(f"{path} holds samples that are not finite.")
    if waveform.min() == waveform.max():
        raise AudioError(f"{path} is silent: all of its {len(waveform):,} samples are equal.")
    if found != rate:
        common = math.gcd(found, rate)
        waveform = resample_poly(waveform, rate // common, found // common)
        notes.append(f"it was resampled from {found:,} to {rate:,} samples a second")
    if notes:
        warnings.warn(f"{path.name}: {' and '.join(notes)}.", stacklevel=2)
    return torch.from_numpy(waveform.clip(-1, 1)).float()


def _unit(samples: NDArray[Any]) -> NDArray[np.float64]:
    """Samples of any WAV type as float64 in [-1, 1)."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        # scipy returns 24 bits as the upper ones of 32.
        return samples.astype(np.float64) / (np.iinfo(samples.dtype).max + 1.0)
    return samples.astype(np.float64)


def wav_bytes(x: Any, rate: int = RATE) -> bytes:
    """A WAV file of 8 bits and one channel from a waveform in [-1, 1]: one byte a sample."""
    samples = np.clip(np.round(array(x) * 127 + 128), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())
    return file.getvalue()


class Player:
    """Sounds with their names, shown with controls where it is a notebook cell's last expression.

    Attributes:
        sounds: WAV files by name.
        seconds: how long each is.
        html: the controls as HTML without ids, scripts or anything outside itself.
    """

    def __init__(self, sounds: dict[str, bytes], seconds: dict[str, float]) -> None:
        self.sounds, self.seconds = sounds, seconds

    def __str__(self) -> str:
        names = ", ".join(f"{name} ({self.seconds[name]:.1f} s)" for name in self.sounds)
        return f"Sound to play: {names}"

    __repr__ = __str__

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": str(self)}

    @property
    def html(self) -> str:
        return (
            '<div class="nflib-sounds" data-lm-suppress-shortcuts="true" style="display:flex;'
            'flex-wrap:wrap;gap:0.6em 1.2em;margin:0.6em 0;color:inherit">'
            f"{''.join(map(self._sound, self.sounds))}</div>"
        )

    def _sound(self, name: str) -> str:
        data = base64.b64encode(self.sounds[name]).decode()
        label = escape(name)
        # The browser's own controls: they work by keyboard and are known to screen readers.
        return (
            '<figure style="margin:0;max-width:100%">'
            f'<figcaption style="color:inherit;font:inherit;margin:0">{label}</figcaption>'
            f'<audio controls preload="metadata" aria-label="Play: {label}" '
            f'style="width:15em;max-width:100%;height:2.6em" '
            f'src="data:audio/wav;base64,{data}"></audio></figure>'
        )


def player(x: Any, rate: int = RATE, label: str | None = None, *, normalize: bool = True) -> Player:
    """Hear a waveform, or several side by side, in a notebook and on a static page.

    The sound is part of the page, with 8 bits a sample: about 11 kB a second at 8 kHz.

    Args:
        x: a waveform ``(length,)`` in [-1, 1], or a mapping from names to waveforms.
        rate: samples a second.
        label: what one hears; the name of a single waveform.
        normalize: play each as loud as possible, so that quiet recordings use the 8 bits, too.

    Raises: ShapeError if a waveform has another shape or no samples.
    """
    given = x if isinstance(x, Mapping) else {label or "sound": x}
    sounds, seconds = {}, {}
    for name, waveform in given.items():
        samples = array(waveform)
        if samples.ndim != 1 or samples.size == 0:
            raise ShapeError(
                f"player expects a waveform of shape (length,), got {tuple(samples.shape)}."
            )
        largest = np.abs(samples).max()
        if normalize and largest > 0:
            samples = 0.9 * samples / largest
        sounds[str(name)] = wav_bytes(samples, rate)
        seconds[str(name)] = len(samples) / rate
    return Player(sounds, seconds)


def waveform(x: Any, ax: Axes | None = None, rate: int = RATE, color: str = DATA) -> Axes:
    """Draw a waveform ``(length,)`` over time in seconds."""
    ax = one_axes(ax, (5.4, 1.8))
    samples = array(x)
    ax.plot(np.arange(len(samples)) / rate, samples, color=color, linewidth=0.6)
    ax.set_xlim(0, len(samples) / rate)
    ax.set_xlabel("seconds")
    return ax


def spectrogram(
    x: Any, ax: Axes | None = None, rate: int = RATE, window: int = 256, span: float = 60.0
) -> Axes:
    """Draw which frequencies a waveform holds when: power in decibels, darker is more.

    Args:
        x: ``(length,)`` with at least ``window`` samples.
        rate: samples a second.
        window: samples that share one spectrum (Hann window, three quarters overlap).
        span: decibels from white to the darkest blue, which is the largest power.
    """
    ax = one_axes(ax, (5.4, 2.2))
    power = spectrum_power(torch.as_tensor(array(x)).double()[None], window)[0]
    decibel = 10 * torch.log10(power.clamp_min(1e-12))
    ax.imshow(
        decibel.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, len(array(x)) / rate, 0, rate / 2000),
        vmin=float(decibel.max()) - span,
        vmax=float(decibel.max()),
        interpolation="bilinear",
    )
    ax.set_xlabel("seconds")
    ax.set_ylabel("kHz")
    return ax


@checked
def tones(
    n: Size, length: Size = RATE // 2, seed: int = 0, rate: Size = RATE
) -> tuple[Tensor, Tensor]:
    """Plucked notes: sound to learn from without any file.

    A note has one of the `PITCHES` f and four harmonics of random strength, which fade the faster
    the higher they are:

        x(t) = A sum_h w_h exp(-h t / tau) sin(2 pi h f t + phi_h)

    Args:
        n: number of notes.
        length: samples of each.
        seed: the same seed makes the same notes.
        rate: samples a second.

    Returns: waveforms float32 ``(n, length)`` whose largest value is between 0.5 and 0.9, and the
        classes int64 ``(n,)``, the index of each note's pitch.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    classes = torch.randint(len(PITCHES), (n,), generator=generator)
    pitch = torch.tensor(PITCHES, dtype=torch.float64)[classes][:, None]
    harmonic = torch.arange(1.0, 5.0, dtype=torch.float64)
    strength = (0.2 + 0.8 * uniform(n, 4)) / harmonic
    phase, fade = 2 * math.pi * uniform(n, 4), 0.1 + 0.2 * uniform(n, 1)
    time = torch.arange(length, dtype=torch.float64) / rate
    x = torch.zeros(n, length, dtype=torch.float64)
    for h in range(4):
        order = h + 1
        wave_h = torch.sin(2 * math.pi * order * pitch * time + phase[:, h : h + 1])
        x += strength[:, h : h + 1] * torch.exp(-order * time / fade) * wave_h
    loudest = 0.5 + 0.4 * uniform(n, 1)
    return (loudest * x / x.abs().amax(1, keepdim=True)).float(), classes


@checked
def whistles(
    n: Size, length: Size = RATE // 2, seed: int = 0, rate: Size = RATE, fade: Positive = 0.006
) -> tuple[Tensor, Tensor]:
    """Breathy notes: white noise through a resonator, ``x_t = a_1 x_{t-1} + a_2 x_{t-2} + e_t``.

    With pitch f, ``r = exp(-1 / (fade rate))``: ``a_1 = 2 r cos(2 pi f / rate)``, ``a_2 = -r^2``.
    A process in its stationary state whose density is known, see `whistle_noise`: the least that
    any model can reach.

    Args:
        n: number of notes.
        length: samples of each.
        seed: the same seed makes the same notes.
        rate: samples a second.
        fade: seconds in which the resonator forgets all but 1/e of its state.

    Returns: waveforms float32 ``(n, length)`` of standard deviation 0.15, and the classes int64
        ``(n,)``, the index of each note's pitch among `PITCHES`.
    """
    from scipy.signal import lfilter

    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(len(PITCHES), (n,), generator=generator)
    # Ten times its memory before the note begins, the resonator has forgotten its start.
    before = math.ceil(10 * fade * rate)
    noise = torch.randn(n, before + length, generator=generator, dtype=torch.float64).numpy()
    r, sigma = math.exp(-1 / (fade * rate)), whistle_noise(rate, fade).numpy()
    rows = []
    for row, label in zip(noise, classes.tolist(), strict=True):
        turn = 2 * r * math.cos(2 * math.pi * PITCHES[label] / rate)
        rows.append(lfilter([sigma[label]], [1, -turn, r * r], row)[before:])
    return torch.from_numpy(np.clip(np.stack(rows), -1, 1)).float(), classes


@checked
def whistle_noise(rate: Size = RATE, fade: Positive = 0.006) -> Tensor:
    """The standard deviation of e_t in `whistles` for each of the `PITCHES`, float64.

    That of x_t given all before it. On levels so narrow that rounding does not matter the notes'
    entropy is ``1/2 log2(2 pi e sigma^2) - log2(width)`` bits a sample.
    """
    r = math.exp(-1 / (fade * rate))
    angle = 2 * math.pi * torch.tensor(PITCHES, dtype=torch.float64) / rate
    # The variance of an autoregression of order 2 over that of its noise.
    a1, a2 = 2 * r * angle.cos(), -r * r
    gain = (1 - a2) / ((1 + a2) * ((1 - a2) ** 2 - a1.square()))
    return 0.15 / gain.sqrt()
