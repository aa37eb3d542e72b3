"""Train a model of `nflib.models`, or a VAE, from the command line: ``python -m nflib.train ...``.

    python -m nflib.train mixerflow --data mnist --patch 4 --layers 8 --seconds 600
    python -m nflib.train glow --data cifar10 --steps 4 --epochs 20 --mixed-precision bf16 --compile
    python -m nflib.train vae --data binarized_mnist --flow planar --steps 10 --epochs 30 \\
        --warm-up 2000 --samples 200
    accelerate launch --num_processes 8 -m nflib.train mixerflow --data mnist --epochs 50

The model's own options are those of its function, with dashes: ``--hidden 128,128`` is
``hidden=(128, 128)``, and ``--hidden 128`` is ``hidden=128``. (Of a VAE ``--warm-up`` is of the
KL's weight, ``--warmup`` as ever of the learning rate.) The budget is given in epochs,
updates of the weights, or seconds. Three files stand beside each other: the result (``--out``,
JSON), the weights (``.safetensors``) and the state of the run (``.state.safetensors``), from which
the same command with ``--resume`` goes on after an interruption, to the same weights.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nflib import checkpoints, data, models, reversible
from nflib.core import Model
from nflib.elementwise import (
    Additive,
    Affine,
    LogisticMixtureCDF,
    MonotoneNet,
    RationalQuadraticSpline,
)
from nflib.metrics import Score, evaluate
from nflib.train.hardware import hardware
from nflib.train.loop import History, fit
from nflib.train.surroundings import seeded
from nflib.variational import vae

MODELS: dict[str, Callable[..., Model]] = {
    name: getattr(models, name)
    for name in (
        "nice",
        "realnvp",
        "spline_flow",
        "naf",
        "maf",
        "iaf",
        "glow",
        "flowpp",
        "mixerflow",
        "ferumal",
    )
} | {"vae": vae}
# The models that take images as images; for the others all numbers of an image are one vector.
OF_IMAGES = ("realnvp", "glow", "flowpp", "mixerflow", "vae")
MAPS = {
    "additive": Additive,
    "affine": Affine,
    "spline": RationalQuadraticSpline,
    "mixture": LogisticMixtureCDF,
    "monotone": MonotoneNet,
}
# Options of the run that are arguments of `nflib.train.fit` under the same name.
TRAINING = (
    "epochs",
    "seconds",
    "batch_size",
    "lr",
    "weight_decay",
    "schedule",
    "warmup",
    "clip",
    "ema",
    "validate_every",
    "patience",
    "seed",
    "mixed_precision",
    "compile",
    "capture",
    "resume",
)
# What the command sets from the data, or cannot express.
NOT_OPTIONS = (
    "shape",
    "dim",
    "grey_levels",
    "context_dim",
    "network",
    "kernel",
    "options",
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, train, judge, write; returns the result. A user's mistake ends in one sentence."""
    try:
        return run(*parse(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, ArithmeticError) as error:
        raise SystemExit(f"nflib.train: {error}") from error


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options of the run, and those of the model."""
    parser = argparse.ArgumentParser(
        prog="python -m nflib.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", choices=list(MODELS))
    add("--data", required=True, metavar="NAME", help="of a data set, see nflib.data.names()")
    add("--rows", type=int, help="of the training split to use, by default all")
    add("--valid-rows", type=int, help="of the validation split to use, by default all")
    add("--epochs", type=float, help="budget; at least one of epochs, updates and seconds")
    add("--updates", type=int, help="budget in steps of the optimizer")
    add("--seconds", type=float, help="budget of training time")
    add("--batch-size", type=int, default=128, help="over all processes together")
    add("--lr", type=float, default=2e-3, help="peak of the learning rate")
    add("--weight-decay", type=float, default=0.0)
    add("--schedule", choices=["cosine", "constant"], default="cosine")
    add("--warmup", type=int, default=0, help="steps over which the learning rate rises")
    add("--clip", type=float, default=50.0, help="largest norm of the gradient")
    add("--ema", type=float, help="decay of the weights' moving average")
    add("--validate-every", type=int, help="steps, by default one epoch")
    add("--patience", type=int, help="validations without a new best after which to stop")
    add("--seed", type=int, default=0)
    add("--mixed-precision", choices=["tf32", "bf16"], help="of the matrix products, see fit")
    add("--compile", action="store_true", help="by torch.compile")
    add(
        "--capture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the step as a CUDA graph, on a GPU",
    )
    add("--memory", choices=["plain", "reversible"], default="plain", help="see nflib.reversible")
    add("--threads", type=int, help="of the CPU")
    add("--samples", type=int, default=1, help="draws of noise behind a test row's bound")
    add("--out", type=Path, help="the result, by default runs/MODEL_DATA.json")
    add("--resume", action="store_true", help="go on with an interrupted run")
    options, rest = parser.parse_known_args(arguments)
    if options.out is None:
        options.out = Path("runs") / f"{options.model}_{options.data}.json"
    return options, model_options(options.model, rest)


def model_options(model: str, words: Sequence[str]) -> dict[str, Any]:
    """``--name value`` pairs as arguments of the model's function."""
    function = MODELS["maf"] if model == "iaf" else MODELS[model]
    known = {
        n: p for n, p in inspect.signature(function).parameters.items() if n not in NOT_OPTIONS
    }
    found = {}
    for key, *value in _pairs(words):
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or name not in known or len(value) != 1:
            names = ", ".join(f"--{n.replace('_', '-')}" for n in known)
            got = " ".join([key, *value])
            raise ValueError(f"{model} expects options with one value among {names}, got {got!r}.")
        found[name] = _value(value[0], str(known[name].annotation))
    return found


def _pairs(words: Sequence[str]) -> list[list[str]]:
    """Words in groups that begin with an option."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append(word.split("=", 1))
        else:
            groups[-1].append(word)
    return groups


def _value(text: str, annotation: str) -> Any:
    if "Elementwise" in annotation:
        if text not in MAPS:
            raise ValueError(f"--elementwise expects one of {', '.join(MAPS)}, got {text!r}.")
        return MAPS[text]()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def rows_for(model: str, x: Tensor) -> Tensor:
    """A data set's examples as the model takes them: images, or all their numbers in a row."""
    return x if model in OF_IMAGES and x.ndim == 4 else x.flatten(1)


def build(model: str, rows: Tensor, levels: int | None, options: dict[str, Any]) -> Model:
    """The model for events of these rows."""
    shape = tuple(rows.shape[1:])
    return MODELS[model](shape if len(shape) == 3 else shape[0], grey_levels=levels, **options)


def run(options: argparse.Namespace, of_model: dict[str, Any]) -> dict[str, Any]:
    """Train one model, judge it on the test split, and write what came of it."""
    from accelerate import PartialState

    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = {"train": options.rows, "valid": options.valid_rows, "test": None}
    sets = {
        split: data.load(options.data, split, n=wanted[split])
        for split in data.card(options.data).splits
    }
    rows = {split: rows_for(options.model, found.x) for split, found in sets.items()}
    levels = sets["train"].levels
    with seeded(options.seed):
        flow = build(options.model, rows["train"], levels, of_model)
    if options.memory == "reversible":
        reversible.turn_on(flow)
    history = fit(
        flow,
        rows["train"],
        rows.get("valid"),
        steps=options.updates,
        checkpoint=options.out.with_suffix(".state.safetensors"),
        **{name: getattr(options, name) for name in TRAINING},
    )
    result = facts(options, of_model, flow, history)
    batch = min(options.batch_size, len(rows["train"]))
    result["rows a second"] = result["steps"] * batch / result["seconds"]
    if PartialState().is_main_process:
        with seeded(0):
            test = rows["test"].to(next(flow.parameters()).device)
            score = evaluate(flow, test, batch_size=500, samples=options.samples)
        result |= judged(score, levels)
        print(f"{options.model} on {options.data}: {summary(result)}")
        checkpoints.save(flow, options.out.with_suffix(".safetensors"), facts=result)
        options.out.write_text(json.dumps(result | {"history": history.records}, indent=1) + "\n")
    return result


def facts(
    options: argparse.Namespace, of_model: dict[str, Any], flow: Model, history: History
) -> dict[str, Any]:
    """What was trained, how, on what, and how long it took."""
    from accelerate import PartialState

    last = history.records[-1]
    training = {name: getattr(options, name) for name in TRAINING}
    return {
        "command": " ".join(["python -m nflib.train", *sys.argv[1:]]),
        "model": options.model,
        "options": {name: str(value) for name, value in of_model.items()},
        "data": options.data,
        "training": training | {"updates": options.updates, "memory": options.memory},
        "hardware": hardware(),
        "processes": PartialState().num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "parameters": sum(p.numel() for p in flow.parameters()),
        "steps": int(last["step"]),
        "epochs": last["epoch"],
        "best_step": history.best_step,
        "seconds": last["seconds"],
    }


def judged(score: Score, levels: int | None) -> dict[str, Any]:
    """What a result says of the test split: nats, and of integers bits/dim beside them."""
    kind = {"likelihood": score.likelihood, "samples": score.samples, "test_rows": score.rows}
    kind |= {"nats": score.nats, "standard_error": score.standard_error}
    return kind if levels is None else kind | {"bits_per_dim": score.bits_per_dim()}


def summary(result: dict[str, Any]) -> str:
    """The result in one line."""
    bits = f"{result['bits_per_dim']:.3f} bits/dim, " if "bits_per_dim" in result else ""
    number = f"{bits}{result['nats']:.3f} nats"
    return (
        f"{number} ({result['likelihood']}, test), {result['parameters']:,} parameters, "
        f"{result['steps']:,} steps in {result['seconds']:.0f} s, "
        f"{result['rows a second']:,.0f} rows a second"
    )
