"""A conditional flow enlarges photographs four times: p(large | small) on BSDS500.

    python -m benchmarks.superresolution            # all rows; goes on where it was interrupted
    python -m benchmarks.superresolution --only srflow

Models: ``srflow`` (the flow) and ``mean network`` (one answer, trained by squared error, with as
many parameters), each with the best of three learning rates of a shorter search and three seeds.
The flow is asked at several temperatures. Controls: the nearest small pixel, bicubic interpolation,
the large image itself. Needs BSDS500, see `nflib.data.load`. Writes results/superresolution.json,
row by row, and the weights of seed 0: data/superresolution.safetensors and
data/superresolution_mean.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.colorization import energy_distance, facts_of, floor
from nflib import checkpoints, data, models
from nflib.conditioning import DenseEncoder
from nflib.data import photographs
from nflib.metrics import evaluate, psnr, ssim
from nflib.train import fit

SIZE, SCALE = 64, 4
WINDOWS = {"train": 60, "valid": 2, "test": 2}  # of each photograph
MODEL = {
    **{"shape": (3, SIZE, SIZE), "scale": SCALE, "steps": 4, "hidden": 18, "levels": 3},
    **{"features": 16, "blocks": 2, "grey_levels": 256},
}
TRAINING = {"batch_size": 16, "warmup": 100, "ema": 0.999, "weight_decay": 1e-2, "clip": 500.0}
STEPS = {"srflow": 4_000, "mean network": 3_000}
SEARCH_STEPS = {"srflow": 300, "mean network": 300}
RATES = (5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
TEMPERATURES = (0.0, 0.4, 0.6, 0.8, 0.9, 1.0)
DRAWS = 4
# Of equal images the ratio is infinite; here no image counts for more decibels than this.
MOST = 60.0
OUT = machine.ROOT / "results" / "superresolution.json"

# Low-resolution images as a flow sees them, and high-resolution ones.
Pair = tuple[Tensor, Tensor]


class MeanNetwork(nn.Module):
    """One answer, 0 .. 255: bicubic interpolation, and what the flow's encoder adds to it."""

    def __init__(self, features: int = 35, blocks: int = 2) -> None:
        super().__init__()
        self.encoder = DenseEncoder(3, features, blocks)
        self.last = nn.Conv2d(self.encoder.features, 3 * SCALE**2, 3, padding=1)

    def forward(self, low: Tensor) -> Tensor:
        detail = F.pixel_shuffle(self.last(self.encoder(low)), SCALE)
        return 127.5 * (bicubic(low) + detail + 1)


def bicubic(low: Tensor) -> Tensor:
    return F.interpolate(low, scale_factor=float(SCALE), mode="bicubic")


def squared_error(network: MeanNetwork, high: Tensor, low: Tensor) -> Tensor:
    return F.mse_loss(network(low) / 127.5, high.to(low.dtype) / 127.5)


def windows(squares: Tensor, each: int, seed: int) -> Tensor:
    """Random windows of SIZE x SIZE pixels, half of them in mirror order."""
    random, last = torch.Generator().manual_seed(seed), squares.shape[-1] - SIZE
    found = []
    for square in squares:
        for _ in range(each):
            top, left = torch.randint(last + 1, (2,), generator=random).tolist()
            window = square[:, top : top + SIZE, left : left + SIZE]
            is_mirrored = bool(torch.rand((), generator=random) < 0.5)
            found.append(window.flip(2) if is_mirrored else window)
    return torch.stack(found)


def prepare() -> dict[str, Pair]:
    sets = {}
    for seed, (split, each) in enumerate(WINDOWS.items()):
        squares = data.load("bsds500", split).x
        sets[split] = photographs.low_and_high(windows(squares, each, seed), SCALE)
    return sets


def build(kind: str) -> nn.Module:
    return MeanNetwork() if kind == "mean network" else models.srflow(**MODEL)


def train(kind: str, lr: float, seed: int, steps: int, sets: dict[str, Pair]) -> dict[str, Any]:
    """Train one model; the row says where it stopped improving. The model is under "trained"."""
    torch.manual_seed(seed)
    model = build(kind)
    name = f"superresolution_{kind.replace(' ', '_')}_{lr:g}_{seed}_{steps}.safetensors"
    history = fit(
        model,
        sets["train"][::-1],
        sets["valid"][::-1],
        steps=steps,
        lr=lr,
        validate_every=max(1, steps // 40),
        seed=seed,
        checkpoint=machine.ROOT / "_build" / name,
        resume=True,
        progress=False,
        loss=squared_error if kind == "mean network" else None,
        **TRAINING,
    )
    row = {"model": kind, "lr": lr, "seed": seed, "steps": steps}
    return {**row, **facts_of(model, history), "trained": model.eval()}


def statistics(images: Tensor) -> Tensor:
    """Twelve numbers of each image ``(N, 3, H, W)`` that tell what its fine structure is like.

    Of three bands, details of 2, 4 and 8 pixels: how strong they are, how sparse, and how alike
    neighbours are, down and across.
    """
    rest, columns = images.float().mean(1, keepdim=True), []
    for _ in range(3):
        coarse = F.avg_pool2d(rest, 2)
        band = (rest - F.interpolate(coarse, scale_factor=2.0, mode="bilinear"))[:, 0]
        power = band.square().mean((1, 2))
        spread = power.sqrt()
        columns += [(spread + 0.5).log(), band.abs().mean((1, 2)) / (spread + 0.5)]
        for one, other in (
            (band[:, 1:], band[:, :-1]),
            (band[:, :, 1:], band[:, :, :-1]),
        ):
            columns.append((one * other).mean((1, 2)) / (power + 0.25))
        rest = coarse
    return torch.stack(columns, 1)


class Judge:
    """Measures draws ``(k, N, 3, SIZE, SIZE)`` of whole grey levels for the test images."""

    def __init__(self, sets: dict[str, Pair]) -> None:
        self.high = sets["test"][1]
        self.small = photographs.shrink(self.high, SCALE)
        found = statistics(sets["train"][1][:: WINDOWS["train"] // WINDOWS["test"]])
        self.scale = found.std(0)
        self.real = statistics(self.high) / self.scale
        self.floor = floor(torch.cat([found / self.scale, self.real]))

    def __call__(self, draws: Tensor) -> dict[str, float]:
        draws = draws.float().round().clamp(0, 255)
        smaller = photographs.shrink(draws, SCALE)
        looks = [energy_distance(statistics(draw) / self.scale, self.real) for draw in draws]
        ratios = psnr(draws, self.high).clamp(max=MOST)
        return {
            "draws": len(draws),
            "psnr": float(ratios.mean()),
            "best_psnr": float(ratios.max(0).values.mean()),
            "psnr_of_mean": float(psnr(draws.mean(0), self.high).clamp(max=MOST).mean()),
            "ssim": float(ssim(draws, self.high).mean()),
            "lr_psnr": float(psnr(smaller, self.small).clamp(max=MOST).mean()),
            "diversity": float(draws.var(0).mean().sqrt()) if len(draws) > 1 else 0.0,
            "energy_distance": sum(looks) / len(looks),
        }


@torch.no_grad()
def draws_of(flow: nn.Module, low: Tensor, temperature: float) -> Tensor:
    """DRAWS images for each small one; without noise they are all alike, and one is enough."""
    generator = torch.Generator().manual_seed(0)
    count = DRAWS if temperature else 1
    parts = [
        flow.sample((count,), some, temperature=temperature, generator=generator).to(torch.uint8)
        for some in low.split(100)
    ]
    return torch.cat(parts, 1)


@torch.no_grad()
def measure(kind: str, model: nn.Module, sets: dict[str, Pair], judge: Judge) -> dict[str, Any]:
    low, high = sets["test"]
    if kind == "mean network":
        return judge(torch.cat([model(some) for some in low.split(100)])[None])
    torch.manual_seed(0)
    score = evaluate(model, high, low, batch_size=100)
    found = [{"temperature": t, **judge(draws_of(model, low, t))} for t in TEMPERATURES]
    return {"bits": score.bits_per_dim(), "temperatures": found}


def controls(sets: dict[str, Pair], judge: Judge) -> list[dict[str, Any]]:
    low, high = sets["test"]
    nearest = F.interpolate(low, scale_factor=float(SCALE))
    rows = {"nearest": 127.5 * (nearest + 1), "bicubic": 127.5 * (bicubic(low) + 1)}
    rows["the image itself"] = high
    return [{"model": name, **judge(images[None])} for name, images in rows.items()]


def save(result: dict[str, Any], out: Path) -> None:
    part = out.with_suffix(".part")
    machine.write(part, result)
    os.replace(part, out)


def keep(kind: str, model: nn.Module, row: dict[str, Any]) -> None:
    """Weights of seed 0 that the course ships."""
    names = {"srflow": "superresolution", "mean network": "superresolution_mean"}
    facts = {k: row[k] for k in ("lr", "seed", "steps", "best_step", "parameters")}
    checkpoints.save(model, machine.ROOT / "data" / f"{names[kind]}.safetensors", facts=facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(STEPS), help="one of the models")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    (machine.ROOT / "_build").mkdir(exist_ok=True)
    sets = prepare()
    judge = Judge(sets)
    fresh = {
        "what": "bits per dimension (bounds from above), decibels, grey levels 0 .. 255",
        **machine.facts("benchmarks.superresolution"),
        "model": MODEL,
        "training": TRAINING,
        "rates": RATES,
        "rows_of_data": {name: len(pair[0]) for name, pair in sets.items()},
        "floor": judge.floor,
        **{"controls": controls(sets, judge), "search": [], "rows": []},
    }
    result = json.loads(options.out.read_text()) if options.out.is_file() else fresh
    for kind in [options.only] if options.only else list(STEPS):
        tried = {row["lr"]: row["valid"] for row in result["search"] if row["model"] == kind}
        for lr in [rate for rate in RATES if rate not in tried]:
            row = train(kind, lr, 0, SEARCH_STEPS[kind], sets)
            row.pop("trained")
            tried[lr] = row["valid"]
            result["search"].append(row)
            save(result, options.out)
        best = min(tried, key=lambda lr: tried[lr])
        done = {row["seed"] for row in result["rows"] if row["model"] == kind}
        for seed in [seed for seed in SEEDS if seed not in done]:
            row = train(kind, best, seed, STEPS[kind], sets)
            model = row.pop("trained")
            row |= measure(kind, model, sets, judge)
            if seed == 0:
                keep(kind, model, row)
            result["rows"].append(row)
            save(result, options.out)
            print({k: v for k, v in row.items() if k != "history"}, flush=True)


if __name__ == "__main__":
    main()
