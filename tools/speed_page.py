"""Write speed.md and its pictures from results/: `python tools/speed_page.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "speed.md"
PICTURES = ROOT / "_static"
LIBRARIES = ("nflib", "zuko", "nflows", "normflows", "FrEIA", "floor")
COLORS = ("#009E73", "#999999", "#777777", "#555555", "#bbbbbb", "#0072B2")
OPERATIONS = {
    "train": "training step",
    "log_prob": "log p",
    "sample": "sampling",
    "train compiled": "training step, compiled",
    "log_prob compiled": "log p, compiled",
}
# Bytes a second through one GPU's link, in one direction.
LINKS = {"NVLink, 450 GB/s": 450e9, "400 Gb/s network": 50e9, "25 Gb/s network": 3.125e9}

INTRO = """\
# Speed and memory

Measured, not promised: every number on this page was made by a command that is printed beside it,
on the machine it names. The commands are in `benchmarks/`, the numbers in `results/`.

## Beside other libraries

`benchmarks/peers.py` builds the same architectures in nflib, zuko, nflows, normflows and FrEIA and
times them in one process. {facts} All use the same conditioners, the same data and the same
optimizer. The **floor** is nflib's conditioners alone: what any flow with these networks has to
pay. Milliseconds a call, medians; the fastest library of a row is bold.

    {command}

```{{figure}} _static/speed.png
:alt: {alt}

Milliseconds of a training step, of log p and of a sample of one batch. Bars are medians, thin lines
go from the 10th to the 90th percentile of {repeats} blocks of calls. Blue: the conditioners alone.
```
"""

ALT = (
    "Bar charts, one for each architecture and operation. A bar for each library and one for the "
    "conditioners alone; the numbers are in the tables below."
)

GAPS = """\
What is left above the floor in the small models is the fixed cost of calls: an affine
coupling makes some twenty of them (parting the event, the bounded scale, its exponential, the
shift, putting the event together, the sum of the log-det), each of a few microseconds, whatever
the batch. Medians that differ by less than the thin lines of the chart are not told apart.
"""

HOW = """\
## How it is done

- **No work in a call that can be done once.** Masks are index tensors made at construction, or
  nothing at all where the two halves of a coupling are contiguous.
- **Matrices are kept while nothing can change.** Inside of `with cached(flow):` the weights of
  masked layers, of LU layers and the inverse of a 1x1 convolution are assembled once, see
  [cache](api/cache.md). `evaluate` and the inverses that take many steps do so themselves.
- **Parameters are prepared together.** What LU layers, actnorms and masked layers make of their
  parameters is made for a whole model at once when `fit` trains, see [prepared](api/prepared.md).
- **Each unit once.** Sampling a MAF evaluates every hidden unit when its last input is known, see
  [autoregressive](api/autoregressive.md).
- **No branch on values**, no `.item()`, no boolean indexing: `torch.compile(fullgraph=True)` takes
  every layer.
- **Started once.** On an NVIDIA GPU `fit` records its training step as a CUDA graph and replays it,
  and so do the samplers of PixelCNN and WaveNet with theirs, see [graphs](api/graphs.md).
- **Log-dets stay in float32.** Under bfloat16 autocast only the conditioners are narrow, and of
  these only the wide ones, see [precision](api/precision.md).

## Kernels of a layer

A GPU that computes for less time than it takes to start a kernel waits, so that the number of
kernels is the time of a small model, see [chapter 23](chapters/23_mixerflow_on_gpu.ipynb).
Operations of a forward and a backward pass that are no views, for one layer more, as `fit` trains
it: at commit e0a1acc and now.

    {command}
"""

MACHINES = """\
## One GPU, eight, sixty-four

`nflib.train.fit` leaves devices, processes and precision to the accelerate library. One command
trains any model of `nflib.models` anywhere, see [train](api/train.md); the batch size is that of
all processes together, so that the loss is that of one process with the same batch, up to the noise
that each process draws for integers (a test runs two processes on real numbers and compares).

    TRAIN="nflib.train glow --data mnist --levels 2 --steps 16 --hidden 256 --epochs 50
           --batch-size 512 --mixed-precision bf16 --compile --resume"

    python -m $TRAIN                                       # one GPU, or the CPU
    accelerate launch --num_processes 8 -m $TRAIN          # eight GPUs of one machine
    accelerate launch --num_machines 8 --num_processes 64 \\
        --machine_rank $RANK --main_process_ip $ADDRESS --main_process_port 29500 -m $TRAIN

The last command runs on each of the eight machines, with its number 0 to 7 as `RANK` and the
address of the first one. The first process writes the checkpoint; after a crash the same command
goes on from it. [Chapter 23](chapters/23_mixerflow_on_gpu.ipynb) does all this step by step with a
MixerFlow.

What to expect: in each step every GPU sends and receives the gradients once around a ring, about
$2 P \\cdot 4$ bytes for $P$ parameters in float32, whatever the number of GPUs. Divided by the
bandwidth of its link this is the time that communication takes. It runs beside the backward pass,
so it costs nothing until it is longer. Worked out, not measured:
"""


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def share(value: float) -> str:
    return f"{100 * value:.1f} %" if value > 0 else "none that can be measured"


def times(rows: dict[str, Any]) -> str:
    """Medians of one configuration, libraries across, the fastest bold."""
    present = [name for name in LIBRARIES if "ms" in rows.get(name, {})]
    body = []
    for key, label in OPERATIONS.items():
        found = {n: rows[n]["ms"][key][1] for n in present if key in rows[n]["ms"]}
        libraries = [found[n] for n in found if n != "floor"]
        if not libraries:
            continue
        cells = []
        for name in present:
            text = number(found[name]) if name in found else ""
            is_best = name in found and name != "floor" and found[name] == min(libraries)
            cells.append(f"**{text}**" if is_best else text)
        body.append([label, *cells])
    counts = [f"{rows[n]['parameters']:,}" if "parameters" in rows[n] else "" for n in present]
    body.append(["parameters", *counts])
    breaks = [str(rows[n].get("graph breaks", "")) for n in present]
    body.append(["graph breaks of log p", *breaks])
    return table(["milliseconds", *present], body)


def precision(configurations: dict[str, Any]) -> str:
    """How far bfloat16 moves log p: the largest difference in nats a dimension."""
    names = LIBRARIES[:-1]
    body = []
    for config, rows in configurations.items():
        cells = []
        for name in names:
            found = rows.get(name, {}).get("bf16", {})
            value = found.get("max nats per dim")
            cells.append("" if not found else "fails" if value is None else f"{value:.4f}")
        if any(c not in ("", "0.0000") for c in cells):
            body.append([config, *cells])
    return table(["largest change of log p, nats/dim", *names], body)


def kernels(counts: dict[str, Any]) -> str:
    """Operations a layer, before and now."""
    before, now = counts["before"]["rows"], counts["now"]["rows"]
    body = []
    for model, row in now.items():
        pair = before[model]["operations a layer"], row["operations a layer"]
        body.append([model, *map(str, pair), f"{pair[1] / pair[0]:.2f}"])
    return table(["operations a layer", "before", "now", "now / before"], body)


def memory_rows(rows: dict[str, Any]) -> str:
    body = []
    for model, row in rows.items():
        for depth, found in row["depths"].items():
            plain, rebuilt = found["plain"], found["reversible"]
            body.append(
                [
                    model,
                    depth,
                    f"{plain['bytes'] / 2**20:.1f}",
                    f"{rebuilt['bytes'] / 2**20:.1f}",
                    f"{rebuilt['milliseconds'] / plain['milliseconds']:.2f}",
                    f"{found['relative error of the gradient']:.0e}",
                ]
            )
    head = ["model", "depth", "plain, MiB", "reversible, MiB", "time of a step, times plain"]
    return table([*head, "float32 gradient, relative error"], body)


def communication() -> str:
    body = []
    for name, count in {"1 million": 1e6, "10 million": 1e7, "100 million": 1e8}.items():
        spent = [f"{1e3 * 8 * count / bandwidth:,.2f} ms" for bandwidth in LINKS.values()]
        body.append([name, f"{8 * count / 1e6:,.0f} MB", *spent])
    return table(["parameters", "sent and received a step", *LINKS], body)


def page() -> str:
    """The whole page as MyST Markdown."""
    peers, memory, loop = results("peers"), results("memory"), results("training_loop")
    versions = ", ".join(f"{name} {version}" for name, version in peers["versions"].items())
    facts = f"{peers['hardware']}, {peers['threads']} thread, torch {peers['torch']}; {versions}."
    parts = [INTRO.format(facts=facts, command=peers["command"], alt=ALT, repeats=peers["repeats"])]
    for name, rows in peers["configurations"].items():
        parts.append(f"### {name}\n\n{times(rows)}")
        notes = [f"{n}: {rows[n]['note']}." for n in LIBRARIES if "note" in rows.get(n, {})]
        missing = [f"{n}: {r['skipped']}." for n, r in rows.items() if "skipped" in r]
        if name in peers.get("steps", {}):
            notes.append(peers["steps"][name] + ".")
        parts.append(" ".join(notes + missing) + "\n" if notes + missing else "")
    parts.append(GAPS)
    parts.append("## Precision\n")
    parts.append(
        "A batch's log p under bfloat16 autocast against float32, after a few training steps from "
        "random weights. In nflib only the conditioners leave float32.\n"
    )
    parts.append(precision(peers["configurations"]))
    parts.append("## Memory that does not grow with depth\n")
    parts.append(
        "With `reversible.Reversible(*layers)`, or `reversible.turn_on(model)`, the backward "
        "pass rebuilds activations from the output by the layers' inverses, see "
        "[reversible](api/reversible.md). Peak bytes of a forward and backward pass, without the "
        f"parameters and their gradients; {memory['hardware']}, {memory['threads']} thread, torch "
        f"{memory['torch']}.\n\n    {memory['command']}\n"
    )
    parts.append(
        "```{figure} _static/memory.png\n:alt: Three panels of memory against the number of "
        "layers, on logarithmic axes. The plain line rises in proportion, the reversible one is "
        "flat.\n\nMemory of a training step against depth.\n```\n"
    )
    parts.append(memory_rows(memory["rows"]))
    parts.append(
        "Each rebuilt activation carries the rounding of the inverses behind it. Couplings hardly "
        "add any; a long chain of matrices that are far from rotations does, as the spline "
        "couplings with an LU layer before each show. Look at this number before you train very "
        "deep, or keep activations every so many layers by composing several reversible parts.\n"
    )
    parts.append(
        "What it costs in time: every conditioner runs once more, which is a third of its forward "
        "and backward pass, and every small operation of the layer twice more, for its inverse and "
        "for its graph. In small models these operations are as dear as the networks.\n"
    )
    parts.append(HOW.format(command="python -m benchmarks.kernels"))
    parts.append(kernels(results("kernels")["counts"]))
    parts.append("## What training costs beside the model\n")
    parts.append(
        "Data that fit in memory need no worker processes: `fit` takes batches by index, on the "
        "device. Seconds for an epoch by `fit` against its bare steps (loss, backward pass, "
        f"clipping, optimizer); {loop['hardware']}, {loop['threads']} thread.\n\n"
        f"    {loop['command']}\n"
    )
    parts.append(
        table(
            ["model", "bare steps, s", "fit, s", "outside of the steps"],
            [
                [name, f"{r['bare']:.2f}", f"{r['fit']:.2f}", share(r["outside"])]
                for name, r in loop["rows"].items()
            ],
        )
    )
    parts.append(MACHINES)
    parts.append(communication())
    return "\n".join(parts).rstrip() + "\n"


def draw_speed(path: Path) -> None:
    import matplotlib.pyplot as plt

    tables = results("peers")["configurations"]
    operations = ["train", "log_prob", "sample"]
    figure, axes = plt.subplots(
        len(tables), 3, figsize=(10, 1.5 * len(tables)), layout="constrained", facecolor="white"
    )
    for row, (config, rows) in zip(axes, tables.items(), strict=True):
        for ax, operation in zip(row, operations, strict=True):
            names = [n for n in LIBRARIES if operation in rows.get(n, {}).get("ms", {})]
            spans = [rows[n]["ms"][operation] for n in names]
            colors = [COLORS[LIBRARIES.index(n)] for n in names]
            for y, (low, middle, high) in enumerate(spans):
                ax.barh(y, middle, color=colors[y], height=0.7)
                ax.plot([low, high], [y, y], color="black", linewidth=1)
            ax.set_yticks(range(len(names)), names, fontsize=8)
            ax.tick_params(axis="x", labelsize=8)
            ax.invert_yaxis()
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_title(f"{config}: {OPERATIONS[operation]}", fontsize=9)
            if not names:
                ax.axis("off")
                ax.set_title("")
    figure.savefig(path, dpi=110)


def draw_memory(path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = results("memory")["rows"]
    figure, axes = plt.subplots(
        1, len(rows), figsize=(10, 2.6), layout="constrained", facecolor="white"
    )
    for ax, (model, row) in zip(axes, rows.items(), strict=True):
        depths = [int(depth) for depth in row["depths"]]
        for kind, color, marker in (("plain", "#999999", "o"), ("reversible", "#009E73", "s")):
            sizes = [found[kind]["bytes"] / 2**20 for found in row["depths"].values()]
            ax.loglog(depths, sizes, marker=marker, color=color, label=kind)
        ax.set_xticks(depths, depths)
        ax.minorticks_off()
        ax.set_title(model, fontsize=10)
        ax.set_xlabel("couplings or steps")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("MiB")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    PAGE.write_text(page())
    draw_speed(PICTURES / "speed.png")
    draw_memory(PICTURES / "memory.png")
    print(f"wrote {PAGE.name}, speed.png and memory.png")
