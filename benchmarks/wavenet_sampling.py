"""How fast sound is made, one second of it at 8 kHz: naive, with kept activations, in parallel.

    python -m benchmarks.wavenet_sampling --threads 1            # trains both, then measures
    python -m benchmarks.wavenet_sampling --threads 1 --resume   # goes on where it stopped

A teacher (WaveNet with a mixture of logistics) learns the notes of `nflib.audio.whistles`, whose
density is known, by maximum likelihood; a student (Parallel WaveNet) is distilled from it. Writes
their weights, data/wavenet_teacher.safetensors and data/wavenet_student.safetensors, and
results/wavenet_sampling.json: how near they come to the truth, and the seconds that one second of
sound takes. The naive way is also measured on the larger model of `benchmarks.spoken_digits`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.spoken_digits import MODEL as DIGITS
from nflib import audio, checkpoints
from nflib.core import StandardLogistic
from nflib.discrete import LogisticMixture
from nflib.train import fit
from nflib.train.distillation import distill
from nflib.wavenet import (
    ParallelWaveNet,
    WaveNet,
    distillation_loss,
    mixture_log_density,
)

LEVELS, CLASSES, LENGTH, SECOND = 256, len(audio.PITCHES), 1024, audio.RATE
COMPONENTS = 5
TEACHER = {"levels": LEVELS, "channels": 16, "skip": 32, "layers": 8, "context_dim": CLASSES}
STUDENT = {
    "flows": 3,
    "channels": 12,
    "skip": 12,
    "layers": 7,
    "context_dim": CLASSES,
    "scale": 0.05,
}
TEACHING = {"batch_size": 8, "lr": 4e-3, "warmup": 50, "ema": 0.99, "seed": 0}
LEARNING = {"batch_size": 8, "lr": 3e-3, "warmup": 50, "ema": 0.99, "seed": 0}


def teacher_model() -> WaveNet:
    return WaveNet(head=LogisticMixture(LEVELS, components=COMPONENTS), **TEACHER)


def student_model() -> ParallelWaveNet:
    return ParallelWaveNet(**STUDENT)


def notes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Waveforms and one-hot pitches."""
    x, pitch = audio.whistles(n, LENGTH, seed)
    return x, F.one_hot(pitch, CLASSES).float()


def true_log_density(x: Tensor, pitch: Tensor, skip: int = 2) -> Tensor:
    """The density of whistles in nats a sample, given the two samples before; ``(batch,)``."""
    r = math.exp(-1 / (0.006 * audio.RATE))
    angle = 2 * math.pi * torch.tensor(audio.PITCHES, dtype=torch.float64)[pitch] / audio.RATE
    sigma = audio.whistle_noise()[pitch][:, None]
    x = x.double()
    expected = 2 * r * angle.cos()[:, None] * x[:, 1:-1] - r * r * x[:, :-2]
    e = (x[:, skip:] - expected) / sigma
    return (-0.5 * (e.square() + math.log(2 * math.pi)) - sigma.log()).mean(1)


def seconds(action: Callable[[], Any], repeats: int) -> float:
    """The shortest of some runs, after one that warms up."""
    action()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


@torch.no_grad()
def quality(teacher: WaveNet, student: ParallelWaveNet) -> dict[str, float]:
    """Cross-entropies of held-out notes and divergences, in nats a sample."""
    x, context = notes(64, seed=2)
    pitch = context.argmax(1)
    parameters = teacher.stack(x.unsqueeze(1), context)
    assert isinstance(teacher.head, LogisticMixture)
    torch.manual_seed(0)
    z = StandardLogistic(LENGTH).sample(64)
    made, _, log_scale = student.conditionals(z, context)
    to_teacher, _ = distillation_loss(student, teacher, z, context, draws=16)
    # Exact: -log q(x) = sum of log-scales minus log-density of the noise.
    own = StandardLogistic(LENGTH).log_prob(z) / LENGTH - log_scale.mean(1)
    levels = audio.linear(x, LEVELS)
    bits = -teacher.log_prob(levels, context).mean().item() / LENGTH / math.log(2)
    return {
        "truth on notes": -true_log_density(x, pitch).mean().item(),
        "teacher on notes": -mixture_log_density(teacher.head, x, parameters)[:, 2:].mean().item(),
        "student on notes": -student.log_prob(x, context).mean().item() / LENGTH,
        "teacher, bits/sample": bits,
        "KL(student || teacher)": to_teacher.item(),
        "KL(student || truth)": (own - true_log_density(made, pitch)).mean().item(),
        "standard deviation of notes": x.std().item(),
        "standard deviation of student": made.std().item(),
    }


@torch.no_grad()
def timings(teacher: WaveNet, student: ParallelWaveNet, repeats: int) -> dict[str, Any]:
    """Seconds for one second of sound, one recording at a time."""
    context, digit = torch.eye(CLASSES)[:1], torch.eye(12)[:1]
    digits = WaveNet(**DIGITS).eval()
    checkpoints.load(digits, machine.ROOT / "data" / "wavenet_digits.safetensors")
    result: dict[str, Any] = {}
    for name, model, c in (("digits", digits, digit), ("teacher", teacher, context)):
        cached = seconds(lambda m=model, c=c: m.sample(1, SECOND, c), repeats)
        begin = time.perf_counter()
        model.sample(1, SECOND, c, cached=False)
        naive = time.perf_counter() - begin
        double = WaveNet(head=model.head, **(DIGITS if name == "digits" else TEACHER)).double()
        double.load_state_dict(model.state_dict())
        u = torch.rand(1, model.head.uniforms, 1500, dtype=torch.float64)
        both = [double.sample(1, 1500, c.double(), u=u, cached=way) for way in (True, False)]
        result[name] = {
            "naive": naive,
            "cached": cached,
            "naive / cached": naive / cached,
            "identical": torch.equal(*both),
            "receptive_field": model.receptive_field,
            "parameters": count(model),
        }
        print(f"{name}: naive {naive:.1f} s, cached {cached:.2f} s", flush=True)
    parallel = seconds(lambda: student.sample(1, SECOND, context), 10 * repeats)
    result["student"] = {
        "parallel": parallel,
        "teacher cached / student": result["teacher"]["cached"] / parallel,
        "digits cached / student": result["digits"]["cached"] / parallel,
        "parameters": count(student),
    }
    print(f"student: {1000 * parallel:.1f} ms", flush=True)
    return result


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teaching", type=float, default=500.0, help="seconds for the teacher")
    parser.add_argument("--learning", type=float, default=1500.0, help="seconds for the student")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--build", type=Path, default=machine.ROOT / "_build")
    parser.add_argument("--data", type=Path, default=machine.ROOT / "data")
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "results" / "wavenet_sampling.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.build.mkdir(parents=True, exist_ok=True)
    train, valid = notes(1600, seed=0), notes(32, seed=1)
    common = {"validate_every": 100, "resume": options.resume}
    torch.manual_seed(0)
    teacher = teacher_model()
    taught = fit(
        teacher,
        (audio.linear(train[0], LEVELS), train[1]),
        (audio.linear(valid[0], LEVELS), valid[1]),
        seconds=options.teaching,
        checkpoint=options.build / "wavenet_teacher.safetensors",
        **common,
        **TEACHING,
    )
    student = student_model()
    learnt = distill(
        student,
        teacher,
        train,
        valid,
        seconds=options.learning,
        checkpoint=options.build / "wavenet_student.safetensors",
        **common,
        **LEARNING,
    )
    facts: dict[str, Any] = {
        "teacher": TEACHER | {"components": COMPONENTS},
        "student": STUDENT,
        "teaching": TEACHING | budget(taught),
        "learning": LEARNING | budget(learnt) | {"draws": 4, "power": 1.0},
    }
    for name, model in (("teacher", teacher), ("student", student)):
        checkpoints.save(model.cpu(), options.data / f"wavenet_{name}.safetensors", facts=facts)
    nats = quality(teacher, student)
    print("\n".join(f"{name}: {value:.4f}" for name, value in nats.items()), flush=True)
    what = (
        "seconds that one second of sound takes at 8 kHz, one recording at a time; and nats a "
        "sample: cross-entropies of held-out whistles as densities on [-1, 1], and divergences"
    )
    result = {
        "what": what,
        **machine.facts("benchmarks.wavenet_sampling"),
        **facts,
        "nats": nats,
        "seconds": timings(teacher.eval(), student.eval(), options.repeats),
        "history": {
            name: [{k: r[k] for k in ("step", "train", "valid") if k in r} for r in history.records]
            for name, history in (("teacher", taught), ("student", learnt))
        },
    }
    machine.write(options.out, result)


def budget(history: Any) -> dict[str, float]:
    last = history.records[-1]
    return {"seconds": round(last["seconds"], 1), "steps": last["step"]}


if __name__ == "__main__":
    main()
