"""Is what a device computes right? Against autograd, the CPU, the slow way, the ordinary way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.layers import EVENTS, Make
from benchmarks.gpu.place import Place
from benchmarks.gpu.stepping import ready, stepping
from nflib import data, models
from nflib.checks import jacobian, randomize_parameters
from nflib.core import Layer
from nflib.pixel import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN
from nflib.train import fit
from nflib.wavenet import WaveNet

WHAT = (
    "largest differences in float64: log_det from autograd's log|det J|, a round trip, the device "
    "from the CPU; share of equal pixels of cached and naive sampling; relative difference of the "
    "losses of replayed steps from ordinary ones; of the weights of a resumed run"
)
SHAPE = (1, 8, 8)
# Above this a difference from the CPU is looked for layer by layer.
NOTICED = 1e-9


def rows(place: Place) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for name, build in REPLAYED.items():
        found[f"replayed: {name}"] = partial(replayed, build, place)
    for precision in ("no", "bf16"):
        found[f"resumed, mixed precision {precision}"] = partial(resumed, precision, place)
    for name, build in SAMPLERS.items():
        found[f"sampler: {name}"] = partial(sampler, build, place)
    found["sampler: WaveNet"] = partial(sound, place)
    for name, (make, event) in EVENTS.items():
        found[f"bijection: {name}"] = partial(bijection, make, event, place)
    return found


# --- bijections ------------------------------------------------------------------------------


def bijection(make: Make, event: tuple[int, ...], place: Place) -> dict[str, Any]:
    """One layer with random parameters at four points."""
    torch.manual_seed(0)
    layer = make().double().eval()
    randomize_parameters(layer, seed=0)
    x = torch.rand(4, *event, dtype=torch.float64)
    here, there = copy.deepcopy(layer).to(place.device), layer
    at = x.to(place.device)
    with torch.no_grad():
        z, log_det = here(at)
        back, _ = here.inverse(z)
        other, other_log_det = there(x)
    truth = torch.linalg.slogdet(jacobian(lambda a: here(a)[0], at))[1]
    row: dict[str, Any] = {
        "log_det": gap(log_det, truth),
        "round trip": gap(back, at),
        "from the CPU": max(gap(z, other), gap(log_det, other_log_det)),
        "largest output": z.abs().max().item(),
    }
    if row["from the CPU"] > NOTICED:
        row["where"] = where(there, here, x, at)
    return row


def gap(one: Tensor, other: Tensor) -> float:
    return (one.cpu() - other.cpu()).abs().max().item()


@torch.no_grad()
def where(there: nn.Module, here: nn.Module, x: Tensor, at: Tensor) -> list[dict[str, Any]]:
    """How the difference between two devices grows through the parts of a model.

    For every layer that is no composition of others: the difference of its outputs, and that of
    its outputs for the very same input, which is its own share.

    Args:
        x, at: the same numbers, on either device.
    """
    calls = [recorded(there, x), recorded(here, at)]
    found = []
    parts = dict(here.named_modules())
    for (name, given, made), (_, _, other) in zip(*calls, strict=True):
        again, _ = parts[name](given.to(other.device))
        part = f"{name} ({type(parts[name]).__name__})"
        row = {"part": part, "difference": gap(made, other), "own": gap(made, again)}
        found.append(row | {"largest output": made.abs().max().item()})
    return found


def recorded(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Name, input and output of every innermost layer, in the order in which they are called."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    hooks = []
    for name, part in model.named_modules():
        inner = any(isinstance(p, Layer) for p in part.modules() if p is not part)
        if isinstance(part, Layer) and not inner:
            hooks.append(
                part.register_forward_hook(
                    lambda _, given, made, name=name: calls.append((name, given[0], made[0]))
                )
            )
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


# --- samplers --------------------------------------------------------------------------------

SAMPLERS: dict[str, Callable[[], Any]] = {
    "PixelCNN": lambda: PixelCNN(SHAPE, 17, 16, 2),
    "Gated PixelCNN": lambda: GatedPixelCNN(SHAPE, 17, 8, 2),
    "PixelCNN++": lambda: PixelCNNPP(SHAPE, 17, 8, 1, 1),
    "PixelRNN, Row LSTM": lambda: PixelRNN(SHAPE, 17, "row", 8, 1),
}


def sampler(build: Callable[[], Any], place: Place) -> dict[str, Any]:
    """Share of pixels that both ways of sampling draw alike from the same uniform numbers."""
    torch.manual_seed(0)
    model = build().double().to(place.device).eval()
    randomize_parameters(model, seed=0, scale=0.1)
    u = torch.rand(4, model.head.uniforms, *SHAPE[1:], dtype=torch.float64, device=place.device)
    # The second time a GPU replays what it has recorded the first time.
    first, second = (model.sample(4, cached=True, u=u) for _ in range(2))
    slow = model.sample(4, cached=False, u=u)
    return {"equal": share(first, slow), "equal once more": share(second, slow)}


def sound(place: Place) -> dict[str, Any]:
    """The same for a WaveNet."""
    torch.manual_seed(0)
    model = WaveNet(64, channels=8, skip=8, layers=5).double().to(place.device).eval()
    u = torch.rand(2, model.head.uniforms, 100, dtype=torch.float64, device=place.device)
    first, second = (model.sample(2, 100, cached=True, u=u) for _ in range(2))
    slow = model.sample(2, 100, cached=False, u=u)
    return {"equal": share(first, slow), "equal once more": share(second, slow)}


def share(one: Tensor, other: Tensor) -> float:
    return (one == other).double().mean().item()


# --- steps -----------------------------------------------------------------------------------

digits: dict[str, Any] = {"shape": SHAPE, "grey_levels": 17}
REPLAYED: dict[str, Callable[[], Any]] = {
    "MixerFlow": partial(models.mixerflow, patch=2, layers=2, hidden=(32,), **digits),
    "MixerFlow of MAF flows": partial(
        models.mixerflow, patch=2, layers=2, hidden=(32,), flow="maf", **digits
    ),
    "Glow": partial(models.glow, levels=2, steps=2, hidden=16, **digits),
    "Flow++": partial(models.flowpp, hidden=8, blocks=1, couplings=(1, 1, 1), **digits),
}


def replayed(build: Callable[[], Any], place: Place, steps: int = 100) -> dict[str, Any]:
    """Losses of the same steps on the same data with the same noise, ordinary and replayed."""
    x = data.load("digits").x.to(place.device)
    losses, obstacle = {}, None
    for mode in ("eager", "captured"):
        flow = ready(build, x)
        with stepping(flow, place, mode, lr=1e-3) as run:
            step: Any = run.function
            found = []
            for k in range(10 if place.small else steps):
                run(x[64 * (k % 20) :][:64])
                found.append(step.value.double().clone())
            obstacle = run.obstacle
        losses[mode] = torch.stack(found)
    one, other = losses.values()
    row: dict[str, Any] = {
        "relative difference": ((one - other).abs() / one.abs()).max().item(),
        "steps": len(one),
        "first and last loss": [one[0].item(), one[-1].item()],
    }
    return row | ({"obstacle": obstacle} if obstacle else {})


def resumed(precision: Any, place: Place) -> dict[str, Any]:
    """Weights after so many steps, with an end and a new start in the middle, and without."""
    x = data.load("digits").x
    steps = 20 if place.small else 100
    name = f"resumed_{precision}"
    weights = []
    for parts in ((steps,), (steps // 2, steps)):
        checkpoint = place.runs / f"{name}_{len(parts)}.safetensors"
        checkpoint.unlink(missing_ok=True)
        for seed, end in enumerate(parts):
            # Another beginning: what is resumed must not depend on it.
            torch.manual_seed(seed)
            flow = models.mixerflow(SHAPE, 2, 2, (32,), grey_levels=17)
            # A constant rate does not ask where the end is.
            history = fit(
                flow,
                x,
                x[:64],
                steps=end,
                schedule="constant",
                ema=0.9,
                validate_every=10,
                checkpoint=checkpoint,
                resume=True,
                progress=False,
                mixed_precision=precision,
            )
        checkpoint.unlink()
        weights.append(torch.cat([p.detach().flatten() for p in flow.parameters()]))
    return {"largest difference of a weight": gap(*weights), "steps": history.records[-1]["step"]}
