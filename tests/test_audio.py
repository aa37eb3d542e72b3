"""Sound: integers and back, every kind of WAV file, the player, pictures, tones."""

from __future__ import annotations

import base64
import io
import re
import warnings
import wave
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torch import Tensor

from nflib import audio
from nflib.audio import AudioError, load_wav
from nflib.core import ShapeError


def sine(seconds: float = 0.5, rate: int = 8000, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("levels", [2, 3, 16, 256, 65536])
@pytest.mark.parametrize("name", ["mu_law", "linear"])
def test_levels_survive_the_way_to_sound_and_back(name: str, levels: int) -> None:
    to, back = getattr(audio, name), getattr(audio, f"{name}_inverse")
    k = torch.arange(levels)
    x = back(k.double(), levels)
    assert torch.equal(to(x, levels), k)
    assert (x[0], x[-1]) == (-1, 1)
    assert (x.diff() > 0).all()
    torch.testing.assert_close(x, -x.flip(0))
    if levels <= 256:
        assert torch.equal(to(back(k, levels), levels), k)
        assert back(k, levels).dtype == torch.float32


def test_mu_law_is_the_papers_formula_and_fine_near_silence() -> None:
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    f = np.sign(x.numpy()) * np.log(1 + 255 * np.abs(x.numpy())) / np.log(256)
    assert torch.equal(audio.mu_law(x), torch.from_numpy(np.floor((f + 1) / 2 * 255 + 0.5)).long())
    assert audio.mu_law(torch.zeros(1)).item() == 128
    steps = audio.mu_law_inverse(torch.arange(256)).diff()
    assert steps[127] < 2.0e-4
    assert steps[-1] > 0.04
    # A sample lies within half a level of its integer, on the scale of the levels.
    back = audio.mu_law_inverse(audio.mu_law(x).double())
    g = torch.sign(back) * torch.log1p(255 * back.abs()) / np.log(256)
    assert (torch.from_numpy(f) - g).abs().max() <= 1 / 255 + 1e-12


@pytest.mark.parametrize("function", [audio.mu_law, audio.linear])
def test_what_is_no_waveform_is_one_sentence(function) -> None:
    for wrong in (torch.tensor([1.1]), torch.tensor([float("nan")]), torch.tensor([3])):
        with pytest.raises(ValueError, match=r"^\w+ expects .* in \[-1, 1\], got .*\.$"):
            function(wrong)
    with pytest.raises(ValueError, match=r"expects levels to be .* at least 2, got 1\.$"):
        function(torch.zeros(2), 1)


@pytest.mark.parametrize("kind", ["uint8", "int16", "int24", "int32", "float32", "float64"])
def test_every_width_of_sample_is_read(kind: str, tmp_path: Path) -> None:
    path, x = tmp_path / "x.wav", sine()
    if kind == "int24":
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(3)
            file.setframerate(8000)
            whole = np.round(x * (2**23 - 1)).astype("<i4")
            file.writeframes(whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes())
    elif kind == "uint8":
        wavfile.write(path, 8000, np.round(x * 127 + 128).astype(np.uint8))
    elif kind.startswith("int"):
        wavfile.write(path, 8000, np.round(x * np.iinfo(kind).max).astype(kind))
    else:
        wavfile.write(path, 8000, x.astype(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_wav(path)
    assert found.dtype == torch.float32
    assert found.shape == (4000,)
    np.testing.assert_allclose(found.numpy(), x, atol=0.01 if kind == "uint8" else 4e-5)


def test_another_rate_and_two_channels_are_converted_with_one_note(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    both = np.stack([sine(rate=44100), 0 * sine(rate=44100)], 1)
    wavfile.write(path, 44100, both.astype(np.float32))
    note = r"x\.wav: its 2 channels were averaged and it was resampled from 44,100 to 8,000"
    with pytest.warns(UserWarning, match=note) as caught:
        found = load_wav(path)
    assert len(caught) == 1
    assert found.shape == (4000,)
    np.testing.assert_allclose(found[200:-200].numpy(), 0.5 * sine()[200:-200], atol=2e-3)
    with pytest.warns(UserWarning, match="averaged.$"):
        assert len(load_wav(path, rate=44100)) == 22050


def content(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, 8000, samples)
    return file.getvalue()


BAD = {
    "truncated": (content(sine().astype(np.float32))[:-100], r"is truncated: it declares 16,0\d\d"),
    "a cut header": (content(sine().astype(np.float32))[:20], "is truncated"),
    "not a WAV": (b"ID3 this is an mp3", "is not a WAV file"),
    "no bytes": (b"", "is not a WAV file"),
    "empty": (content(np.zeros(0, np.int16)), "is empty: it holds no samples"),
    "silent": (content(np.zeros(800, np.int16)), "is silent: all of its 800 samples are equal"),
    "constant": (content(np.full(800, 7, np.uint8)), "is silent"),
    "not finite": (content(np.array([0.0, np.nan], np.float32)), "not finite"),
    "damaged": (content(sine().astype(np.float32)).replace(b"fmt ", b"xxxx"), "no readable WAV"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    written, message = BAD[name]
    path = tmp_path / "bad.wav"
    path.write_bytes(written)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AudioError, match=message) as caught:
            load_wav(path)
    assert re.fullmatch(rf"{re.escape(str(path))} .*\.", str(caught.value))
    assert isinstance(caught.value, ValueError)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"^There is no file .*none\.wav\.$"):
        load_wav(tmp_path / "none.wav")


def test_other_programs_chunks_and_unknown_sizes_are_read(tmp_path: Path) -> None:
    whole = content((sine() * 32767).astype(np.int16))
    extra = b"abcd" + (4).to_bytes(4, "little") + b"note"
    longer = whole + extra
    size = (len(longer) - 8).to_bytes(4, "little")
    path = tmp_path / "x.wav"
    path.write_bytes(longer[:4] + size + longer[8:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_wav(path)) == 4000


class Parsed(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def sounds(html: str) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in Parsed(html).tags if tag == "audio"]


def test_the_player_carries_its_sound_and_its_name() -> None:
    x = torch.from_numpy(sine(1.0)).float()
    shown = audio.player(x, label="A4 <440 Hz>")
    (found,) = sounds(shown.html)
    assert "controls" in found
    assert found["aria-label"] == "Play: A4 <440 Hz>"
    assert "<script" not in shown.html
    assert " id=" not in shown.html
    kind, data = str(found["src"]).split(",")
    assert kind == "data:audio/wav;base64"
    with wave.open(io.BytesIO(base64.b64decode(data))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 1)
        heard = np.frombuffer(file.readframes(9000), np.uint8)
    np.testing.assert_allclose((heard - 128.0) / 127, 0.9 * x / x.abs().max(), atol=0.005)
    assert len(shown.html) < 12_000
    assert str(shown) == "Sound to play: A4 <440 Hz> (1.0 s)"
    assert shown._repr_mimebundle_() == {"text/html": shown.html, "text/plain": str(shown)}


def test_quiet_sounds_are_played_loud_unless_told_otherwise() -> None:
    x = torch.tensor([0.0, 0.01, -0.01, 0.0])
    for normalize, largest in ((True, 0.9), (False, 0.01)):
        (heard,) = audio.player(x, normalize=normalize).sounds.values()
        samples = np.frombuffer(heard[-4:], np.uint8).astype(float) - 128
        assert abs(samples).max() == round(127 * largest)
    # Silence stays silence.
    assert set(audio.player(torch.zeros(3)).sounds["sound"][-3:]) == {128}


def test_several_sounds_share_a_row() -> None:
    shown = audio.player({"one": torch.rand(80), "two": torch.rand(90)}, 4000)
    assert [s["aria-label"] for s in sounds(shown.html)] == ["Play: one", "Play: two"]
    assert shown.seconds == {"one": 0.02, "two": 0.0225}
    for wrong in (torch.rand(2, 80), torch.rand(0)):
        with pytest.raises(ShapeError, match=r"^player expects a waveform .*, got .*\.$"):
            audio.player({"one": torch.rand(80), "two": wrong})


def test_a_spectrum_of_white_noise_is_its_variance() -> None:
    torch.manual_seed(0)
    power = audio.spectrum_power(0.3 * torch.randn(20, 4000, dtype=torch.float64), 128)
    assert power.shape == (20, 65, 1 + (4000 - 128) // 32)
    inner = power.mean((0, 2))[1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.09), rtol=0.15, atol=0)
    with pytest.raises(ShapeError, match="^spectrum_power .* length >= 256.*, got"):
        audio.spectrum_power(torch.zeros(1, 255))
    with pytest.raises(ValueError, match="^spectrum_power expects .*window .* at least 4"):
        audio.spectrum_power(torch.zeros(1, 255), 3)


def test_a_spectrum_finds_a_tones_frequency() -> None:
    x = torch.from_numpy(sine(frequency=1000.0))[None]
    assert audio.spectrum_power(x, 256).mean(2).argmax().item() == 1000 / (8000 / 256)


def test_pictures_have_seconds_and_kilohertz() -> None:
    x = torch.from_numpy(sine()).float().requires_grad_()
    ax = audio.waveform(x)
    assert ax.get_xlim() == (0, 0.5)
    ax = audio.spectrogram(x)
    assert tuple(ax.images[0].get_extent()) == (0, 0.5, 0, 4)
    shown = ax.images[0].get_array()
    # 440 Hz of 4 kHz, counted from below.
    assert abs(shown.mean(1).argmax() / (len(shown) - 1) * 4 - 0.44) < 0.03


def test_tones_are_what_they_say() -> None:
    x, y = audio.tones(40, 4000, seed=1)
    again, classes = audio.tones(40, 4000, seed=1)
    assert torch.equal(x, again)
    assert torch.equal(y, classes)
    assert not torch.equal(x, audio.tones(40, 4000, seed=2)[0])
    assert x.dtype == torch.float32
    assert x.shape == (40, 4000)
    loudest = x.abs().amax(1)
    assert (loudest.min() >= 0.5, loudest.max() <= 0.9) == (True, True)
    assert set(y.tolist()) == set(range(8))
    # The strongest lines of each note are multiples of its pitch; notes fade.
    power = torch.fft.rfft(x.double()).abs().square()
    for row, pitch in zip(power, torch.tensor(audio.PITCHES)[y], strict=True):
        strongest = row.argmax() * 8000 / 4000 / pitch
        assert abs(strongest - strongest.round()) < 0.02
    assert x[:, -1000:].square().mean() < 0.2 * x[:, :1000].square().mean()
    for make in (audio.tones, audio.whistles):
        for argument, wrong in (("n", (0, 10)), ("length", (10, 0))):
            with pytest.raises(ValueError, match=rf"^\w+ expects {argument} to be .*, got 0\.$"):
                make(*wrong)


def test_shapes_and_gradients_pass_through_the_inverse() -> None:
    k = torch.rand(2, 3, dtype=torch.float64).mul(255).requires_grad_()
    out: Tensor = audio.mu_law_inverse(k)
    assert out.dtype == torch.float64
    assert torch.autograd.grad(out.sum(), k)[0].gt(0).all()
