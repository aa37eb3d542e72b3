"""WaveNet on real spoken digits, beside a histogram and linear predictors.

    python -m benchmarks.spoken_digits --seconds 1200 --threads 1   # 20 minutes of one CPU core
    python -m benchmarks.spoken_digits --seconds 1200 --resume      # go on after an interruption

Needs the Free Spoken Digit Dataset, see `nflib.data.load("spoken_digits", ...)`. All models predict
the same integers, the mu-law levels of the recordings as they are, and all are judged on the 100
whole test recordings: bits per sample, exact. Writes data/wavenet_digits.safetensors and
results/spoken_digits.json. The state of the run is kept in a file of its own until it is complete.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_toeplitz
from scipy.optimize import minimize
from scipy.signal import lfilter
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine
from nflib import audio, checkpoints, data
from nflib.data.archives import SPEAKERS
from nflib.train import fit
from nflib.wavenet import WaveNet, pad

LEVELS, CROP = 256, 2048
MODEL = {
    "levels": LEVELS,
    "channels": 32,
    "skip": 64,
    "blocks": 2,
    "layers": 9,
    "context_dim": 12,
}
TRAINING = {"batch_size": 8, "lr": 2e-3, "warmup": 100, "ema": 0.998, "seed": 0}
"""Crops a step, and so on: the arguments of `nflib.train.fit`."""

VALID_ROWS = 128


def recordings(split: str) -> tuple[Tensor, Tensor]:
    """Mu-law integers with padding, and the context: one-hot digit and one-hot speaker.

    The rows of a split are sorted by speaker, then digit; each speaker has the same number.
    """
    loaded = data.load("spoken_digits", split)
    assert loaded.lengths is not None
    assert loaded.y is not None
    levels = audio.mu_law(loaded.x.float() / 32768, LEVELS)
    speaker = torch.arange(len(loaded)) * 2 // len(loaded)
    context = torch.cat([F.one_hot(loaded.y, 10), F.one_hot(speaker, 2)], 1).float()
    return pad(levels, loaded.lengths), context


def crops(split: str, length: int = CROP) -> tuple[Tensor, Tensor]:
    """Recordings cut into pieces that overlap by half; the last ones end in padding."""
    x, context = recordings(split)
    rows, contexts = [], []
    for row, c in zip(x, context, strict=True):
        end = int((row >= 0).sum())
        for begin in range(0, max(1, end - length // 2), length // 2):
            piece = row[begin : begin + length]
            rows.append(F.pad(piece, (0, length - len(piece)), value=-1))
            contexts.append(c)
    return torch.stack(rows), torch.stack(contexts)


@torch.no_grad()
def bits_per_sample(model: WaveNet, x: Tensor, context: Tensor) -> tuple[float, float]:
    """Mean over all samples of all recordings, and the standard error over recordings."""
    nats, counts = [], []
    for row, c in zip(x, context, strict=True):
        known = row[row >= 0]
        nats.append(-model.log_prob(known[None], c[None]).item())
        counts.append(len(known))
    return _mean_bits(np.array(nats), np.array(counts))


def _mean_bits(nats: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    mean = nats.sum() / counts.sum()
    # A ratio of sums: its error comes from the recordings' deviations from the common mean.
    error = np.sqrt(((nats - mean * counts) ** 2).sum()) / counts.sum()
    return mean / math.log(2), error / math.log(2)


def unigram(train: Tensor, test: Tensor) -> tuple[float, float]:
    """The histogram of the training samples, one added to each level's count."""
    counts = torch.bincount(train[train >= 0].long(), minlength=LEVELS).double() + 1
    cost = -(counts / counts.sum()).log()
    rows = [cost[row[row >= 0].long()] for row in test]
    return _mean_bits(np.array([float(r.sum()) for r in rows]), np.array([len(r) for r in rows]))


class LinearPredictor:
    """x_t predicted from the ``order`` samples before it, and a logistic residual.

    The weights are the least-squares solution over the training recordings with silence on both
    sides (the autocorrelation method). P(level) is the logistic mass of the level's bin, from edge
    to edge, around the prediction. Its scale is either one number or follows the last residuals,
    ``log s_t = a + b log(e_t)`` with e_t an average of |residual| that forgets at a rate r; a, b, r
    and the first e are fitted by maximum likelihood on a tenth of the training recordings.

    Args:
        order: samples that it looks back.
        scale: ``"levels"`` works on the mu-law levels, evenly spaced; ``"waveform"`` on the
            waveform, where the bins are narrow near silence.
        adaptive: whether the residual's scale follows the last residuals.
    """

    def __init__(self, order: int, scale: str, adaptive: bool) -> None:
        self.order, self.adaptive = order, adaptive
        between = torch.arange(1, LEVELS, dtype=torch.float64) - 0.5
        centres = torch.arange(LEVELS, dtype=torch.float64)
        if scale == "levels":
            inner, values = between - LEVELS // 2, centres - LEVELS // 2
        else:
            inner, values = (audio.mu_law_inverse(k, LEVELS) for k in (between, centres))
        self.edges = np.concatenate([[-np.inf], inner.numpy(), [np.inf]])
        self.values = values.numpy()
        # Keeps the logarithm of a residual finite.
        self.least = 0.1 * np.diff(self.values).min()

    def fit(self, rows: list[np.ndarray]) -> LinearPredictor:
        total = np.zeros(self.order + 1)
        for row in rows:
            size = 1 << (len(row) + self.order).bit_length()
            power = np.abs(np.fft.rfft(self.values[row], size)) ** 2
            total += np.fft.irfft(power, size)[: self.order + 1]
        # A trace of white noise keeps the system well-conditioned.
        first = total[:-1].copy()
        first[0] *= 1 + 1e-6
        self.weights = solve_toeplitz(first, total[1:])
        some = [(row, self.predict(row)) for row in rows[::10]]
        count = sum(len(row) for row, _ in some)

        def loss(theta: np.ndarray) -> float:
            return sum(self._nats(row, p, theta).sum() for row, p in some) / count

        typical = np.log(np.mean([np.abs(self.values[r] - p).mean() for r, p in some]))
        start = [0.0, 1.0, 3.0, typical] if self.adaptive else [typical]
        self.theta = minimize(loss, start, method="Nelder-Mead", options={"maxiter": 300}).x
        return self

    def predict(self, row: np.ndarray) -> np.ndarray:
        """The prediction for every sample, from silence before the beginning."""
        size = 1 << (len(row) + self.order).bit_length()
        spectrum = np.fft.rfft(self.values[row], size) * np.fft.rfft(self.weights, size)
        return np.concatenate([[0.0], np.fft.irfft(spectrum, size)[: len(row) - 1]])

    def _nats(self, row: np.ndarray, prediction: np.ndarray, theta: np.ndarray) -> np.ndarray:
        scale = np.full(len(row), math.exp(theta[0]))
        if self.adaptive:
            rate, first = 1 / (1 + math.exp(theta[2])), math.exp(theta[3])
            residual = np.abs(self.values[row] - prediction) + self.least
            mean, _ = lfilter([rate], [1, rate - 1], residual, zi=[(1 - rate) * first])
            # The scale at t knows the residuals before t only.
            scale = np.exp(theta[0] + theta[1] * np.log(np.concatenate([[first], mean[:-1]])))
        a, b = ((self.edges[row + side] - prediction) / scale for side in (0, 1))
        # log(sigma(b) - sigma(a)) without cancellation.
        return np.logaddexp(0, -b) + np.logaddexp(0, a) - np.log(-np.expm1(a - b))

    def bits_per_sample(self, rows: list[np.ndarray]) -> tuple[float, float]:
        nats = [self._nats(row, self.predict(row), self.theta).sum() for row in rows]
        return _mean_bits(np.array(nats), np.array([len(row) for row in rows]))


def without_padding(x: Tensor) -> list[np.ndarray]:
    return [row[row >= 0].long().numpy() for row in x]


def histograms() -> dict[str, list[int]]:
    """How often each level occurs in the training recordings, quantized in either way."""
    loaded = data.load("spoken_digits", "train")
    assert loaded.lengths is not None
    known = torch.arange(loaded.x.shape[1]) < loaded.lengths[:, None]
    x = loaded.x[known].float() / 32768
    ways = {"mu-law": audio.mu_law(x, LEVELS), "linear": audio.linear(x, LEVELS)}
    return {name: torch.bincount(k, minlength=LEVELS).tolist() for name, k in ways.items()}


def example(row: int = 35) -> dict[str, Any]:
    """One test recording, for the chapter that has no data set at hand."""
    x, context = recordings("test")
    levels = x[row][x[row] >= 0]
    digit, speaker = int(context[row, :10].argmax()), int(context[row, 10:].argmax())
    return {
        "name": f"{digit}_{SPEAKERS[speaker]}_{row % 5}.wav",
        "source": "Free Spoken Digit Dataset, CC BY-SA 4.0",
        "digit": digit,
        "speaker": SPEAKERS[speaker],
        "levels": levels.tolist(),
    }


@torch.no_grad()
def as_classifier(model: WaveNet, x: Tensor, context: Tensor) -> dict[str, float]:
    """How often the true digit is the most likely one, given the speaker, by Bayes' rule.

    And the bits per sample under the context of the next digit, a wrong one.
    """
    right, nats, count = 0, 0.0, 0
    for row, c in zip(x, context, strict=True):
        known = row[row >= 0]
        contexts = torch.cat([torch.eye(10), c[10:].expand(10, -1)], 1)
        scores = model.log_prob(known.expand(10, -1), contexts)
        digit = int(c[:10].argmax())
        right += int(scores.argmax()) == digit
        nats, count = nats - scores[(digit + 1) % 10].item(), count + len(known)
    return {"accuracy": right / len(x), "wrong digit": nats / count / math.log(2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200.0, help="of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--run", type=Path, default=machine.ROOT / "_build" / "wavenet_digits.safetensors"
    )
    parser.add_argument(
        "--weights", type=Path, default=machine.ROOT / "data" / "wavenet_digits.safetensors"
    )
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "spoken_digits.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(TRAINING["seed"])
    model = WaveNet(**MODEL)
    valid = crops("valid")
    spread = torch.linspace(0, len(valid[0]) - 1, VALID_ROWS).long()
    history = fit(
        model,
        crops("train"),
        (valid[0][spread], valid[1][spread]),
        seconds=options.seconds,
        validate_every=250,
        checkpoint=options.run,
        resume=options.resume,
        **TRAINING,
    )
    model.cpu()
    train, test = recordings("train")[0], recordings("test")
    rows: dict[str, Any] = {}

    def add(name: str, bits: tuple[float, float], parameters: int) -> None:
        rows[name] = {"test": bits[0], "standard_error": bits[1], "parameters": parameters}
        print(f"{name}: {bits[0]:.3f} +- {bits[1]:.3f} bits/sample", flush=True)

    add("uniform", (math.log2(LEVELS), 0.0), 0)
    add("unigram", unigram(train, test[0]), LEVELS - 1)
    order = model.receptive_field
    for scale in ("levels", "waveform"):
        for adaptive in (False, True):
            predictor = LinearPredictor(order, scale, adaptive).fit(without_padding(train))
            bits = predictor.bits_per_sample(without_padding(test[0]))
            name = f"linear predictor of the {scale}{', adaptive scale' if adaptive else ''}"
            add(name, bits, order + len(predictor.theta))
    count = sum(p.numel() for p in model.parameters())
    add("WaveNet", bits_per_sample(model, *test), count)
    rows["WaveNet"] |= as_classifier(model, *test)
    for speaker, name in enumerate(SPEAKERS):
        mine = test[1][:, 10 + speaker] == 1
        rows["WaveNet"][name] = bits_per_sample(model, test[0][mine], test[1][mine])[0]
    last = history.records[-1]
    facts = {
        "model": MODEL,
        "receptive_field": order,
        "training": TRAINING
        | {"crop": CROP, "seconds": round(last["seconds"], 1), "steps": last["step"]},
        "epochs": last["epoch"],
        "samples": {name: int((x >= 0).sum()) for name, x in (("train", train), ("test", test[0]))},
    }
    checkpoints.save(model, options.weights, facts=facts)
    what = (
        "bits per sample of the 100 test recordings of spoken_digits, as mu-law levels of 256 at "
        "8 kHz: exact; standard errors over recordings"
    )
    curve = [{k: r[k] for k in ("step", "train", "valid") if k in r} for r in history.records]
    command = f"python -m benchmarks.spoken_digits --seconds {options.seconds:g} --threads "
    result = {"what": what, **machine.facts("benchmarks.spoken_digits"), **facts, "rows": rows}
    result["command"] = f"{command}{options.threads}"
    result |= {"histograms": histograms(), "example": example()}
    machine.write(options.out, result | {"history": curve})


if __name__ == "__main__":
    main()
