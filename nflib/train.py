"""One loop that trains any model with ``log_prob``, and can be stopped and resumed anywhere.

Devices, mixed precision and several processes come from the accelerate library. What makes a
resumed run equal an uninterrupted one, bit for bit on CPU: the order of the data is a function of
seed and epoch, the learning rate one of the step, and the checkpoint holds everything else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nflib import checkpoints
from nflib.core import Bijection
from nflib.data import check_finite

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[..., Tensor]


class NonFiniteError(ArithmeticError):
    """The loss or a gradient became NaN or infinite; the message says when and in which layer."""


@dataclass
class History:
    """What happened, one record a validation: step, epoch, train and valid loss, lr, seconds.

    Losses are in nats for one row of data unless ``fit`` got another loss.
    """

    records: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None

    def column(self, name: str) -> list[float]:
        """One quantity over all records, NaN where it was not measured."""
        return [record.get(name, math.nan) for record in self.records]

    def __repr__(self) -> str:
        if not self.records:
            return "History of 0 steps"
        last = self.records[-1]
        text = f"History of {last['step']:.0f} steps: train {last['train']:.3f}"
        if self.best_step is None:
            return text
        best = min(v for v in self.column("valid") if not math.isnan(v))
        return f"{text}, best valid {best:.3f} at step {self.best_step}"


@dataclass
class Progress:
    """Where a run stands; together with the tensors, all that a resumed run needs."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int | None = None
    since_best: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    records: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: nn.Module,
    data: Any,
    valid: Any = None,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup: int = 0,
    clip: float = 50.0,
    ema: float | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    save_every: float = 30.0,
    resume: bool = False,
    progress: bool = True,
    mixed_precision: str | None = None,
    compile: bool = False,
) -> History:
    """Train by maximum likelihood: minimise ``-log_prob`` with AdamW.

    The model ends with its best weights if ``valid`` is given, else with the averaged ones if
    ``ema`` is, else with the last.

    Args:
        model: any model with ``log_prob``; it is trained in place.
        data: rows ``(n, *event)``, a tuple ``(x, context)``, or a data set with field ``x``.
        valid: the same, held out; measured every ``validate_every`` steps.
        epochs, steps, seconds: the budget; at least one. The first to run out ends the training.
        batch_size: rows a step, over all processes together.
        lr: peak learning rate.
        weight_decay: of AdamW, decoupled from the gradient.
        schedule: ``"cosine"`` (to zero at the end of the budget) or ``"constant"``.
        warmup: steps over which the learning rate rises from zero.
        clip: largest norm of the gradient; longer ones are shortened to it.
        ema: decay of an exponential moving average of the weights, e.g. 0.99; it is what is
            validated.
        validate_every: steps between validations, by default one epoch.
        patience: validations without a new best after which to stop.
        loss: ``loss(model, x)`` or ``loss(model, x, context)``, a mean over rows to minimise in
            place of ``-log_prob``.
        seed: of the order of the data and of torch's random numbers.
        checkpoint: a safetensors file for the state of the run, written at every validation, at
            least every ``save_every`` seconds, and when interrupted.
        resume: continue from the checkpoint if it exists.
        progress: show a progress bar.
        mixed_precision: ``"bf16"`` runs the conditioners in bfloat16.
        compile: run the model through ``torch.compile``; the first step then takes long.

    Returns: the `History`; ``nflib.plot.history`` draws it.

    Raises:
        NonFiniteError: at the first loss or gradient that is not finite, before it reaches the
            weights on CPU (within ten steps on other devices); the last checkpoint is kept.
        ValueError: for data with NaN, an empty data set, or no budget.
        CheckpointError: if the checkpoint cannot be written, or is of another run.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    tensors = as_tensors(data, "data")
    held_out = None if valid is None else as_tensors(valid, "valid")
    check_data = getattr(model, "check_data", None)
    for rows_of in (tensors, held_out):
        if check_data is not None and rows_of is not None:
            check_data(rows_of[0])
    budget = {"epochs": epochs, "steps": steps, "seconds": seconds}
    given = {name: value for name, value in budget.items() if value is not None}
    if not given or min(given.values()) <= 0:
        raise ValueError(
            f"fit expects a budget of epochs, steps or seconds above zero, got {given or 'none'}."
        )
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"fit expects schedule 'cosine' or 'constant', got {schedule!r}.")
    if resume and checkpoint is None:
        raise ValueError("fit expects a checkpoint to resume from, got none.")

    # The precision belongs to a run, while accelerate keeps it for the life of the process.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=mixed_precision, dynamo_backend="inductor" if compile else None
    )
    # Noise and dropout differ between processes, the order of the data does not.
    set_seed(seed, device_specific=True)
    rows = len(tensors[0])
    batch = min(batch_size, rows)
    if batch % accelerator.num_processes:
        raise ValueError(
            f"fit expects a batch_size that {accelerator.num_processes} processes can share "
            f"evenly, got {batch}."
        )
    per_epoch = rows // batch
    limits = [steps] if steps else []
    limits += [max(1, round(epochs * per_epoch))] if epochs else []
    total = min(limits, default=None)
    every = validate_every or per_epoch

    run = _Run(model, accelerator, lr, weight_decay, ema, checkpoint)
    run.identity = {"seed": seed, "batch_size": batch, "rows": rows}
    tensors = [tensor.to(accelerator.device) for tensor in tensors]
    held_out = held_out and [tensor.to(accelerator.device) for tensor in held_out]
    if not (resume and checkpoint is not None and Path(checkpoint).is_file() and run.restore()):
        initialize = getattr(model, "initialize", None)
        if initialize is not None:
            initialize(*(t[_order(rows, seed, 0, t.device)[:batch]] for t in tensors))
        run.start()
    at = run.progress
    objective = loss or negative_log_likelihood

    def fraction() -> float:
        """How much of the budget is used, 0 to 1."""
        parts = [at.step / total if total else 0.0, at.seconds / seconds if seconds else 0.0]
        return min(1.0, max(parts))

    saved = time.monotonic()

    def measure(rate: float) -> None:
        nonlocal saved
        record = run.record(per_epoch, rate)
        if held_out is not None:
            record["valid"] = run.validate(objective, held_out, batch_size)
        at.records.append(record)
        bar.set_postfix({k: f"{record[k]:.3f}" for k in ("train", "valid") if k in record})
        run.save()
        saved = time.monotonic()

    order = torch.empty(0)
    started = time.monotonic() - at.seconds
    bar = _bar(progress and accelerator.is_main_process, total, at.step)
    model.train()
    try:
        while fraction() < 1.0 and not (patience is not None and at.since_best >= patience):
            epoch, position = divmod(at.step, per_epoch)
            if position == 0 or len(order) == 0:
                order = _order(rows, seed, epoch, tensors[0].device)
            index = order[position * batch : (position + 1) * batch]
            index = index[accelerator.process_index :: accelerator.num_processes]
            picked = [tensor[index] for tensor in tensors]
            factor = min(1.0, (at.step + 1) / warmup) if warmup else 1.0
            if schedule == "cosine":
                factor *= 0.5 * (1 + math.cos(math.pi * fraction()))
            value, norm = run.gradient(objective, picked, clip)
            if accelerator.device.type == "cpu" or at.step % 10 == 0:
                if not bool(torch.isfinite(value) & torch.isfinite(norm)):
                    raise NonFiniteError(run.diagnose(picked, objective, checkpoint))
            run.step(lr * factor)
            at.step += 1
            at.seconds = _shared(time.monotonic() - started, accelerator, seconds)
            run.add_loss(value)
            bar.update()
            if at.step % every == 0:
                measure(lr * factor)
            elif checkpoint is not None and time.monotonic() - saved > save_every:
                run.save()
                saved = time.monotonic()
        if at.loss_count:
            # The budget ended between two validations: the last weights are judged as well.
            measure(lr * factor)
    except KeyboardInterrupt:
        run.save()
        bar.write(f"Interrupted at step {at.step}; the model has its best weights so far.")
    finally:
        bar.close()
    run.finish()
    return History(at.records, at.best_step)


def negative_log_likelihood(model: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """``-mean log_prob`` in nats a row; calling the model is ``log_prob``."""
    log_prob = model(x) if context is None else model(x, context)
    return -log_prob.mean()


def as_tensors(data: Any, name: str) -> list[Tensor]:
    """Data as tensors of equal length, or a ValueError that says what is wrong with them."""
    data = getattr(data, "x", data)
    tensors = list(data) if isinstance(data, (tuple, list)) else [data]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"fit expects {name} as tensors, got {type(tensor).__name__}.")
        if len(tensor) == 0 or len(tensor) != len(tensors[0]):
            raise ValueError(
                f"fit expects {name} with the same number of rows, at least one, "
                f"got {[len(t) for t in tensors]}."
            )
        check_finite(tensor, name)
    return tensors


class _Run:
    """The mutable side of a training run: model, optimizer, average, best weights, progress."""

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        lr: float,
        weight_decay: float,
        ema: float | None,
        checkpoint: str | Path | None,
    ) -> None:
        self.accelerator, self.checkpoint, self.ema_decay = accelerator, checkpoint, ema
        self.model = model.to(accelerator.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                f"fit expects a model with parameters, {type(model).__name__} has none."
            )
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        self.parameters = parameters
        self.prepared, self.optimizer = accelerator.prepare(model, optimizer)
        self.average: torch.optim.swa_utils.AveragedModel | None = None
        self.best: dict[str, Tensor] = {}
        self.progress = Progress()
        self.identity: dict[str, Any] = {}
        self.loss_sum: Tensor | float = 0.0

    def start(self) -> None:
        if self.ema_decay is not None:
            self.average = torch.optim.swa_utils.AveragedModel(
                self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(self.ema_decay)
            )

    @property
    def shown(self) -> nn.Module:
        """The weights that are judged: the averaged ones if there are any."""
        return self.model if self.average is None else self.average.module

    def gradient(
        self, objective: Loss, batch: Sequence[Tensor], clip: float
    ) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            value = objective(self.prepared, *batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(value)
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        return value.detach(), norm

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def add_loss(self, value: Tensor) -> None:
        # Summed on the device: reading it at every step would make the device wait.
        self.loss_sum = self.loss_sum + value.double()
        self.progress.loss_count += 1

    def _settle_loss(self) -> None:
        at = self.progress
        at.loss_sum, self.loss_sum = at.loss_sum + float(self.loss_sum), 0.0

    def record(self, per_epoch: int, lr: float) -> dict[str, float]:
        at = self.progress
        self._settle_loss()
        record = {
            "step": at.step,
            "epoch": at.step / per_epoch,
            "train": at.loss_sum / at.loss_count,
            "lr": lr,
            "seconds": at.seconds,
        }
        at.loss_sum, at.loss_count = 0.0, 0
        return record

    def validate(self, objective: Loss, tensors: Sequence[Tensor], batch_size: int) -> float:
        """Mean loss on held-out rows; its random numbers are the same at every validation."""
        at, model = self.progress, self.shown
        was_training = model.training
        model.eval()
        with _frozen_rng(), torch.no_grad():
            torch.manual_seed(0)
            parts = list(zip(*(t.split(max(batch_size, 1024)) for t in tensors), strict=True))
            total = sum(objective(model, *part).double() * len(part[0]) for part in parts)
        model.train(was_training)
        value = float(total) / len(tensors[0])
        if value < at.best:
            at.best, at.best_step, at.since_best = value, at.step, 0
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        else:
            at.since_best += 1
        return value

    def save(self) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        self._settle_loss()
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"ema.{k}": v for k, v in self.average.module.state_dict().items()}
            tensors["averaged"] = self.average.n_averaged
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        tensors |= {f"rng.{k}": v for k, v in checkpoints.rng_state().items()}
        meta = {"run": self.identity, "progress": asdict(self.progress)}
        checkpoints.write(self.checkpoint, tensors, meta)

    def restore(self) -> bool:
        assert self.checkpoint is not None
        tensors, meta = checkpoints.read(self.checkpoint)
        if "progress" not in meta:
            raise checkpoints.CheckpointError(
                f"{self.checkpoint} holds weights without the state of a training run; "
                "load it with checkpoints.load instead of resuming."
            )
        for name, value in self.identity.items():
            if meta["run"].get(name) != value:
                raise checkpoints.CheckpointError(
                    f"{self.checkpoint} is of a run with {name} {meta['run'].get(name)}, "
                    f"this one has {value}."
                )

        def part(kind: str) -> dict[str, Tensor]:
            prefix = f"{kind}."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        checkpoints.load_state(self.model, part("model"), self.checkpoint)
        self.start()
        if self.average is not None and part("ema"):
            self.average.module.load_state_dict(part("ema"))
            self.average.n_averaged.copy_(tensors["averaged"])
        self.best = {k: v.to(self.accelerator.device) for k, v in part("best").items()}
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimizer").items():
            i, name = key.split(".")
            states.setdefault(int(i), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        checkpoints.set_rng_state(part("rng"))
        self.progress = Progress(**meta["progress"])
        return True

    def finish(self) -> None:
        """Leave the model with the weights that were judged best, and without autocast."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.__dict__.pop("forward", None)  # accelerate leaves the class's own there
        if self.best:
            self.model.load_state_dict(self.best)
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.model.eval()

    def diagnose(
        self, batch: Sequence[Tensor], objective: Loss, checkpoint: str | Path | None
    ) -> str:
        """One sentence on which layer went bad first, found by running the batch once more."""
        found: list[str] = []

        def watch(name: str, layer: nn.Module) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if not (isinstance(output, tuple) and len(output) == 2):
                    return
                for what, tensor in zip(("output", "log_det"), output, strict=True):
                    if not bool(torch.isfinite(tensor).all()):
                        found.append(f"{name} ({type(layer).__name__}), whose {what} is not finite")

            return layer.register_forward_hook(hook)

        hooks = [
            watch(name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, Bijection)
        ]
        try:
            with torch.no_grad():
                objective(self.model, *batch)
        finally:
            for hook in hooks:
                hook.remove()
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        if found:
            where = f"the first layer to go wrong is {found[0]}"
        elif bad:
            where = f"the gradient of {bad[0]} is not finite"
        else:
            where = "no layer shows it when the batch is run again"
        kept = f"; the last good state is in {checkpoint}" if checkpoint is not None else ""
        return (
            f"The training stopped at step {self.progress.step} on a loss that is not finite: "
            f"{where}{kept}."
        )


def _order(rows: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The order of the rows in an epoch, a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).to(device)


@contextmanager
def _frozen_rng() -> Iterator[None]:
    state = checkpoints.rng_state()
    try:
        yield
    finally:
        checkpoints.set_rng_state(state)


def _shared(elapsed: float, accelerator: Accelerator, budget: float | None) -> float:
    """The main process's clock: all processes must stop at the same step."""
    if budget is None or accelerator.num_processes == 1:
        return elapsed
    from accelerate.utils import broadcast

    clock = torch.tensor(elapsed, dtype=torch.float64, device=accelerator.device)
    return float(broadcast(clock))


def _bar(show: bool, total: int | None, initial: int) -> Any:
    from tqdm import tqdm

    # None lets TQDM_DISABLE decide; a notebook keeps no bar in its stored outputs.
    return tqdm(
        total=total, initial=initial, unit="step", disable=None if show else True, leave=False
    )


if __name__ == "__main__":
    from nflib.cli import main

    main()
