"""A conditional flow colours photographs: p(a, b | L) on BSDS500, beside what it must beat.

    python -m benchmarks.colorization            # all rows; goes on where it was interrupted
    python -m benchmarks.colorization --only cinn

Models: ``cinn`` (the flow), ``mean network`` (one answer for each photograph, trained by squared
error, with as many parameters), each with the best learning rate of a shorter search; ``flow
without L`` (the same flow without its context), at its rate. Three seeds and as many steps each.
Controls: grey, the mean colours, the colours of other photographs. Needs BSDS500, see
`nflib.data.load`. Writes results/colorization.json, row by row, and the weights of seed 0 of the
flow and of the mean network: data/colorization.safetensors, data/colorization_mean.safetensors.
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
from nflib import checkpoints, data, models
from nflib.conditioning import FeaturePyramid
from nflib.data import photographs
from nflib.train import History, fit

SIZE, COLOURS = 64, 32
CROPS = 40  # of each training photograph
DIMENSIONS = 2 * COLOURS**2
MODEL = {
    **{"shape": (2, COLOURS, COLOURS), "context_dim": (1, SIZE, SIZE), "steps": 4, "hidden": 48},
    **{"levels": 3, "features": 24, "dropout": 0.1, "grey_levels": 256},
}
TRAINING = {"batch_size": 32, "warmup": 50, "ema": 0.99, "weight_decay": 1e-2, "clip": 50.0}
STEPS, SEARCH_STEPS, SEEDS = 1600, 400, (0, 1, 2)
KINDS = ("cinn", "mean network", "flow without L")
RATES = {"cinn": (5e-4, 1e-3, 2e-3), "mean network": (2.5e-4, 5e-4, 1e-3, 2e-3)}
CHOICES = 2000  # of eight other photographs
DRAWS = 8
OUT = machine.ROOT / "results" / "colorization.json"


class MeanNetwork(nn.Module):
    """One answer: a + 128 and b + 128 from L, by the conditioning network of the flow alone."""

    def __init__(self, features: int = 58) -> None:
        super().__init__()
        sizes = [(COLOURS >> k, COLOURS >> k) for k in range(4)]
        self.pyramid = FeaturePyramid((1, SIZE, SIZE), sizes, features)
        self.finest = self.pyramid.part(0)
        self.last = nn.Conv2d(features, 2, 3, padding=1)

    def forward(self, light: Tensor) -> Tensor:
        return photographs.ZERO + 20 * self.last(self.finest(self.pyramid(light)))


def squared_error(network: MeanNetwork, colours: Tensor, light: Tensor) -> Tensor:
    return F.mse_loss(network(light), colours.to(light.dtype))


def crops(squares: Tensor, each: int, seed: int) -> Tensor:
    """Random windows of squares, half of them in mirror order, all squeezed to SIZE x SIZE.

    Sides are 60 to 100 % of the square's, each by itself, so that shapes up to 5 : 3 occur.
    """
    random, side = torch.Generator().manual_seed(seed), squares.shape[-1]
    found = []
    for square in squares:
        for _ in range(each):
            share = 0.6 + 0.4 * torch.rand(2, generator=random)
            height, width = (share * side).int().tolist()
            top, left = (
                int(torch.randint(side - size + 1, (), generator=random))
                for size in (height, width)
            )
            window = square[None, :, top : top + height, left : left + width].float()
            small = F.interpolate(window, (SIZE, SIZE), mode="bilinear", antialias=True)
            flip = bool(torch.rand((), generator=random) < 0.5)
            found.append(small.flip(3) if flip else small)
    return torch.cat(found).round().clamp(0, 255).to(torch.uint8)


def both_ways(light: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures and their mirror images."""
    return torch.cat([light, light.flip(3)]), torch.cat([colours, colours.flip(3)])


def build(kind: str) -> nn.Module:
    if kind == "mean network":
        return MeanNetwork()
    if kind == "cinn":
        return models.cinn(**MODEL)
    options = {k: v for k, v in MODEL.items() if k not in ("context_dim", "features")}
    return models.glow(**options)


def train(kind: str, lr: float, seed: int, steps: int, sets: dict[str, Any]) -> dict[str, Any]:
    """Train one model; the row says where it stopped improving. The model is under "trained"."""
    torch.manual_seed(seed)
    model = build(kind)
    pairs = {name: (colours, light) for name, (light, colours) in sets.items()}
    fed = {name: pair[0] if kind == "flow without L" else pair for name, pair in pairs.items()}
    name = f"colorization_{kind.replace(' ', '_')}_{lr:g}_{seed}_{steps}.safetensors"
    history = fit(
        model,
        fed["train"],
        fed["valid"],
        steps=steps,
        lr=lr,
        validate_every=100,
        seed=seed,
        checkpoint=machine.ROOT / "_build" / name,
        resume=True,
        progress=False,
        loss=squared_error if kind == "mean network" else None,
        **TRAINING,
    )
    row = {"model": kind, "lr": lr, "seed": seed, "steps": steps}
    return {**row, **facts_of(model, history), "trained": model.eval()}


def facts_of(model: nn.Module, history: History) -> dict[str, Any]:
    """How long a model was trained, how large it is, and where it stopped improving."""
    last = history.records[-1]
    curve = [{k: r[k] for k in ("step", "train", "valid") if k in r} for r in history.records]
    return {
        **{"epochs": last["epoch"], "seconds": last["seconds"]},
        "parameters": sum(p.numel() for p in model.parameters()),
        **{"best_step": history.best_step, "history": curve},
        "valid": min(r["valid"] for r in curve if "valid" in r),
    }


@torch.no_grad()
def bits(flow: nn.Module, light: Tensor, colours: Tensor, repeats: int = 8) -> float:
    """Bits per number of a and b, a bound from above: the mean over draws of uniform noise."""
    torch.manual_seed(0)
    context = {} if flow.context_shape is None else {"context": light}
    nats = torch.stack([-flow.log_prob(colours, **context).mean() for _ in range(repeats)])
    return float(nats.mean()) / DIMENSIONS / torch.log(torch.tensor(2.0)).item()


# Of the numbers of `statistics`, those that know nothing of the lightness.
COLOUR_NUMBERS = 8


def statistics(light: Tensor, colours: Tensor) -> Tensor:
    """Eleven numbers of each picture that tell how it is coloured, ``(N, 11)``.

    Means and spreads of a and b, mean and largest chroma, roughness, and how the colours go with
    the lightness: with its values and with its edges.
    """
    ab = colours.float() - photographs.ZERO
    grey = F.interpolate(light, ab.shape[2:], mode="area")[:, 0]
    flat = ab.flatten(2)
    chroma = ab.square().sum(1).sqrt().flatten(1)

    def edges(x: Tensor) -> Tensor:
        return (x[..., 1:, :-1] - x[..., :-1, :-1]).abs() + (
            x[..., :-1, 1:] - x[..., :-1, :-1]
        ).abs()

    def together(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.flatten(1), y.flatten(1)
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-3)

    rough = edges(ab).mean((2, 3))
    columns = [
        *flat.mean(2).unbind(1),
        *(flat.std(2) + 1).log().unbind(1),
        (chroma.mean(1) + 1).log(),
        (chroma.quantile(0.95, 1) + 1).log(),
        *(rough + 1).log().unbind(1),
        *(together(grey, ab[:, k]) for k in range(2)),
        together(edges(grey), edges(ab).sum(1)),
    ]
    return torch.stack(columns, 1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, unbiased: 0 for equal distributions, can be below."""

    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


def floor(x: Tensor, splits: int = 200) -> dict[str, float]:
    """The energy distance of two random halves of photographs, which is 0 up to this noise."""
    random, half = torch.Generator().manual_seed(0), len(x) // 2
    orders = [torch.randperm(len(x), generator=random) for _ in range(splits)]
    found = [energy_distance(x[order[:half]], x[order[half:]]) for order in orders]
    values = torch.tensor(found)
    return {"splits": splits, "mean": float(values.mean()), "largest": float(values.max())}


class Judge:
    """Measures draws ``(k, N, 2, h, w)`` for the test photographs."""

    def __init__(self, sets: dict[str, Any]) -> None:
        self.light, self.colours = sets["test"]
        train = statistics(*sets["train photographs"])
        self.scale = train.std(0)
        self.real = statistics(*sets["test"]) / self.scale
        self.floor = floor(torch.cat([train / self.scale, self.real]))

    def __call__(self, draws: Tensor) -> dict[str, float]:
        draws = draws.float()
        error = (draws - self.colours.float()).square().mean((2, 3, 4))
        found = [statistics(self.light, draw) / self.scale for draw in draws]

        def distance(columns: slice) -> float:
            real = self.real[:, columns]
            return sum(energy_distance(f[:, columns], real) for f in found) / len(found)

        chroma = (draws - photographs.ZERO).square().sum(2).sqrt().mean()
        return {
            "draws": len(draws),
            "error": float(error.mean()),
            "best_of_8": float(error.min(0).values.mean()),
            "error_of_mean": float((draws.mean(0) - self.colours.float()).square().mean()),
            "variance": float(draws.var(0).mean()) if len(draws) > 1 else 0.0,
            "energy_distance": distance(slice(None)),
            "energy_of_colours": distance(slice(0, COLOUR_NUMBERS)),
            "energy_with_lightness": distance(slice(COLOUR_NUMBERS, None)),
            "chroma": float(chroma),
        }


@torch.no_grad()
def draws_of(kind: str, model: nn.Module, light: Tensor, temperature: float = 1.0) -> Tensor:
    """DRAWS colourings of each photograph; of the mean network its one answer."""
    if kind == "mean network":
        return model(light)[None]
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": temperature, "generator": generator}
    if kind == "cinn":
        return model.sample((DRAWS,), light, **options)
    draws = model.sample(DRAWS * len(light), **options)
    return draws.unflatten(0, (DRAWS, len(light)))


def controls(sets: dict[str, Any], judge: Judge) -> list[dict[str, Any]]:
    light, colours = sets["test"]
    grey = torch.full((1, *colours.shape), photographs.ZERO)
    mean = sets["train"][1].float().mean(0).expand(1, *colours.shape)
    random = torch.Generator().manual_seed(0)
    own = sets["train photographs"][1]
    others = [own[torch.randperm(len(own), generator=random)[: len(colours)]] for _ in range(DRAWS)]
    rows = [("grey", grey), ("mean colours", mean), ("other photographs", torch.stack(others))]
    rows.append(("the photograph itself", colours[None]))
    found = [{"model": name, **judge(draws)} for name, draws in rows]
    # Errors of the colours of every training photograph on every test photograph.
    errors = torch.cdist(own.float().flatten(1), colours.float().flatten(1)) ** 2 / DIMENSIONS
    best = []
    for _ in range(CHOICES):
        orders = [torch.randperm(len(own), generator=random)[: len(colours)] for _ in range(DRAWS)]
        tried = torch.stack([errors[order, torch.arange(len(colours))] for order in orders])
        best.append(tried.min(0).values.mean())
    choices = torch.stack(best)
    percent = choices.quantile(torch.linspace(0, 1, 101)).tolist()
    found[2] |= {"choices": CHOICES, "best_of_8": float(choices.mean())}
    found[2] |= {"best_of_8_std": float(choices.std()), "best_of_8_percentiles": percent}
    return found


def histogram_bits(sets: dict[str, Any]) -> float:
    """Bits per number of a model that takes all numbers for independent, exact."""
    _, train = sets["train"]
    _, test = sets["test"]
    total = 0.0
    for k in range(2):
        counts = torch.bincount(train[:, k].flatten().long(), minlength=256).double() + 1
        total += float(-(counts / counts.sum()).log2()[test[:, k].flatten().long()].mean())
    return total / 2


def prepare() -> dict[str, Any]:
    cache = machine.ROOT / "_build" / "colorization_crops.pt"
    if cache.is_file():
        return torch.load(cache, weights_only=True)
    squares = {split: data.load("bsds500", split).x for split in ("train", "valid", "test")}
    whole = {k: photographs.light_and_colours(v, SIZE, COLOURS) for k, v in squares.items()}
    small = crops(squares["train"], CROPS, seed=0)
    sets = {
        "train": photographs.light_and_colours(small, SIZE, COLOURS),
        "train photographs": whole["train"],
        "valid": both_ways(*whole["valid"]),
        "test": whole["test"],
    }
    torch.save(sets, cache)
    return sets


def save(result: dict[str, Any], out: Path) -> None:
    part = out.with_suffix(".part")
    machine.write(part, result)
    os.replace(part, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=KINDS, help="one of the models")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    (machine.ROOT / "_build").mkdir(exist_ok=True)
    sets = prepare()
    judge = Judge(sets)
    fresh = {
        "what": "bits per number of a and b (bounds from above), squared errors in units of Lab",
        **machine.facts("benchmarks.colorization"),
        "model": MODEL,
        "training": TRAINING,
        "rates": RATES,
        "rows_of_data": {name: len(pair[0]) for name, pair in sets.items()},
        **{"floor": judge.floor, "histogram_bits": histogram_bits(sets)},
        **{"controls": controls(sets, judge), "search": [], "rows": []},
    }
    result = json.loads(options.out.read_text()) if options.out.is_file() else fresh
    for kind in [options.only] if options.only else KINDS:
        tried = {row["lr"]: row["valid"] for row in result["search"] if row["model"] == kind}
        for lr in [rate for rate in RATES.get(kind, ()) if rate not in tried]:
            row = train(kind, lr, 0, SEARCH_STEPS, sets)
            row.pop("trained")
            tried[lr] = row["valid"]
            result["search"].append(row)
            save(result, options.out)
        # The flow without L learns as the one with L, at the rate that was found for that one.
        best = min(tried, key=lambda lr: tried[lr]) if tried else result["rows"][0]["lr"]
        done = {row["seed"] for row in result["rows"] if row["model"] == kind}
        for seed in [seed for seed in SEEDS if seed not in done]:
            row = train(kind, best, seed, STEPS, sets)
            model = row.pop("trained")
            if kind != "mean network":
                row["bits"] = bits(model, *sets["test"])
                cold = judge(draws_of(kind, model, sets["test"][0], 0.7))
                row["temperature 0.7"] = cold
            row |= judge(draws_of(kind, model, sets["test"][0]))
            result["rows"].append(row)
            keep(kind, seed, model, row)
            save(result, options.out)
            print(kind, seed, {k: v for k, v in row.items() if k != "history"}, flush=True)


def keep(kind: str, seed: int, model: nn.Module, row: dict[str, Any]) -> None:
    """Weights of seed 0 that the course ships."""
    names = {"cinn": "colorization", "mean network": "colorization_mean"}
    if seed == 0 and kind in names:
        facts = {k: row[k] for k in ("lr", "seed", "steps", "best_step", "parameters")}
        path = machine.ROOT / "data" / f"{names[kind]}.safetensors"
        checkpoints.save(model, path, facts=facts)


if __name__ == "__main__":
    main()
