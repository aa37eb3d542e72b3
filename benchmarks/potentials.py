"""Four flows fitted to four densities of the plane by variational inference, three seeds each.

    python -m benchmarks.potentials --threads 1     # all rows, goes on where it stopped

The densities are U1 to U4 of `nflib.data.potential`, known up to their constant. Each flow
minimises KL(q || p) over its own samples. Its learning rate is the best of five on U3, each trained
in full: after a short training such rates win as are too high for a long one. A row has both
divergences of the end, in nats: KL(q || p) over 20,000 samples of the flow, and KL(p || q) over
10,000 samples of the density, which sees what the flow left out. `halfway` is KL(q || p) of a
training with half the steps, from seed 0. Writes results/potentials.json after every row, and the
flows of seed 0 to data/potentials.safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from nflib import checkpoints, data
from nflib.core import Flow, Inverse, StandardNormal
from nflib.train import fit
from nflib.variational import posterior_flow, reverse_kl

FLOWS: dict[str, dict[str, Any]] = {
    "planar": {"steps": 16},
    "radial": {"steps": 16},
    "realnvp": {"steps": 4, "hidden": (32, 32)},
    "iaf": {"steps": 8, "hidden": (32, 32)},
}
POTENTIALS = ("u1", "u2", "u3", "u4")
RATES = (5e-3, 1e-2, 2e-2, 5e-2, 0.1)
STEPS, DRAWS, SEEDS = 6000, 256, 3
WALL = 50  # nats for a squared unit beyond the square of side 8


def build(kind: str) -> Flow:
    """q: noise goes forward through the steps, so the flow's bijection is their inverse."""
    steps = posterior_flow(kind, 2, **FLOWS[kind])
    assert steps is not None
    return Flow(Inverse(steps), StandardNormal(2))


def target(potential: str) -> Callable[[Tensor], Tensor]:
    """log p on the whole plane, in nats: -U, with a steep wall where the densities of data end."""
    energy = data.potential(potential)

    def unnormalised(z: Tensor) -> Tensor:
        return -energy(z) - WALL * (z.abs() - 4).clamp_min(0).square().sum(1)

    side = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    cell = (side[1] - side[0]).item() ** 2
    log_z = unnormalised(torch.cartesian_prod(side, side)).logsumexp(0).item() + math.log(cell)
    return lambda z: unnormalised(z) - log_z


def trained(kind: str, potential: str, seed: int, lr: float, steps: int) -> Flow:
    torch.manual_seed(seed)
    flow = build(kind)
    log_density = target(potential)
    fit(
        flow,
        None,
        loss=lambda q: reverse_kl(q, log_density, DRAWS),
        steps=steps,
        lr=lr,
        warmup=100,
        clip=5.0,
        seed=seed,
    )
    return flow


@torch.no_grad()
def divergence(flow: Flow, potential: str) -> float:
    """KL(q || p) over 20,000 samples of the flow."""
    torch.manual_seed(1)
    return reverse_kl(flow, target(potential), 20_000).item()


@torch.no_grad()
def missed(flow: Flow, potential: str) -> float:
    """KL(p || q) over 10,000 samples of the density, which ends at the sides of its square."""
    x = data.load(potential, "test", n=10_000).x
    return (data.log_density(potential)(x) - flow.log_prob(x)).mean().item()


def row(kind: str, potential: str, seed: int, lr: float) -> tuple[dict[str, Any], Flow]:
    halfway = None
    if seed == 0:
        halfway = divergence(trained(kind, potential, seed, lr, STEPS // 2), potential)
    begin = time.perf_counter()
    flow = trained(kind, potential, seed, lr, STEPS)
    return {
        "flow": kind,
        "potential": potential,
        "seed": seed,
        "lr": lr,
        "updates": STEPS,
        "draws": DRAWS,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "seconds": time.perf_counter() - begin,
        "halfway": halfway,
        "kl_q_p": divergence(flow, potential),
        "kl_p_q": missed(flow, potential),
    }, flow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    root = machine.ROOT
    parser.add_argument("--out", type=Path, default=root / "results" / "potentials.json")
    parser.add_argument("--weights", type=Path, default=root / "data" / "potentials.safetensors")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    result = {
        "what": "divergences between flows and the densities U1 to U4, in nats, lower is better",
        **machine.facts("benchmarks.potentials"),
        "flows": FLOWS,
        "search": before.get("search", {}),
        "rows": before.get("rows", []),
    }
    flows = nn.ModuleDict({f"{k}_{u}": build(k) for k in FLOWS for u in POTENTIALS})
    if options.weights.exists():
        checkpoints.load(flows, options.weights)
    for kind in FLOWS:
        if kind not in result["search"]:
            found = {
                rate: divergence(trained(kind, "u3", 100, rate, STEPS), "u3") for rate in RATES
            }
            result["search"][kind] = {"kl": found, "lr": min(found, key=found.__getitem__)}
            machine.write(options.out, result)
    for seed in range(SEEDS):
        for kind in FLOWS:
            for potential in POTENTIALS:
                done = [(r["flow"], r["potential"], r["seed"]) for r in result["rows"]]
                if (kind, potential, seed) in done:
                    continue
                found, flow = row(kind, potential, seed, result["search"][kind]["lr"])
                print(found, flush=True)
                result["rows"].append(found)
                if seed == 0:
                    flows[f"{kind}_{potential}"].load_state_dict(flow.state_dict())
                    checkpoints.save(flows, options.weights)
                machine.write(options.out, result)


if __name__ == "__main__":
    main()
