"""One loop that trains any model with ``log_prob``, and can be stopped and resumed anywhere.

Devices, mixed precision and several processes come from the accelerate library. What makes a
resumed run equal an uninterrupted one, bit for bit on CPU: the order of the data is a function of
seed and epoch, the learning rate one of the step, and the checkpoint holds everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from nflib.arguments import Count, NonNegative, Positive, Rule, Share, Size, checked
from nflib.train.compiling import compiled
from nflib.train.rows import NoRows, Target, source_of
from nflib.train.run import Plan, Run
from nflib.train.surroundings import matrix_precision, start_random, undisturbed


@dataclass
class History:
    """What happened, one record a validation: step, epoch, train and valid loss, lr, seconds.

    Losses are in nats for one row of data unless ``fit`` got another loss. ``train`` is the mean
    over all steps since the last record, of the whole batch also with several processes.
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


def _objective(value: Any) -> Any:
    if isinstance(value, type) or not callable(value):
        raise TypeError
    return value


Objective = Annotated[Callable[..., Tensor], Rule("a function loss(model, x)", _objective)]


@checked
def fit(
    model: nn.Module,
    data: object,
    valid: object = None,
    *,
    epochs: Positive | None = None,
    steps: Size | None = None,
    seconds: Positive | None = None,
    batch_size: Size | None = None,
    lr: Positive = 1e-3,
    weight_decay: NonNegative = 0.0,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: Count = 0,
    clip: Positive = 50.0,
    ema: Share | None = None,
    validate_every: Size | None = None,
    patience: Size | None = None,
    loss: Objective | None = None,
    seed: Count = 0,
    checkpoint: str | Path | None = None,
    save_every: NonNegative = 30.0,
    resume: bool = False,
    progress: bool = True,
    mixed_precision: Literal["no", "tf32", "bf16"] | None = None,
    compile: bool = False,
    capture: bool = True,
) -> History:
    """Train by maximum likelihood: minimise ``-log_prob`` with AdamW.

    The model ends with its best weights if ``valid`` is given, else with the averaged ones if
    ``ema`` is, else with the last. Random numbers outside of it go on as if it had not been called.

    Args:
        model: any model with ``log_prob``; it is trained in place.
        data: one of

            - rows ``(n, *event)`` as a tensor or NumPy array, a tuple ``(x, context)`` of them, or
              a set of `nflib.data` (its ``x``); they move to the device as a whole;
            - a map-style `torch.utils.data.Dataset` of such rows, which move batch by batch;
            - a ``DataLoader``, or another iterable of batches that can start anew; it batches and
              shuffles as it does. An ``IterableDataset`` gives single rows. Data of unknown
              length need a budget of steps or seconds;
            - None, for a ``loss`` that draws for itself.

            Floating-point numbers are converted to the model's dtype, whole numbers are not.
        valid: held-out data of any of these kinds; measured every ``validate_every`` steps.
        epochs, steps, seconds: the budget; at least one. The first to run out ends the training.
        batch_size: rows a step, over all processes together; 128 by default. Not for data that
            come in batches.
        lr: peak learning rate.
        weight_decay: of AdamW, decoupled from the gradient.
        schedule: ``"cosine"`` (to zero at the end of the budget) or ``"constant"``.
        warmup: steps over which the learning rate rises from zero.
        clip: largest norm of the gradient; longer ones are shortened to it.
        ema: decay of an exponential moving average of the weights, e.g. 0.99; it is what is
            validated.
        validate_every: steps between validations, by default one epoch (if it has no known
            length, one validation at the end).
        patience: validations without a new best after which to stop.
        loss: ``loss(model, x)``, ``loss(model, x, context)``, or ``loss(model)`` without data: a
            mean over rows to minimise in place of ``-log_prob``.
        seed: of the order of the data and of all random numbers of the run.
        checkpoint: a safetensors file for the state of the run, written at every validation, at
            least every ``save_every`` seconds, and when interrupted.
        resume: continue from the checkpoint if it exists; exact with one process.
        progress: show a progress bar.
        mixed_precision: ``"bf16"`` runs the conditioners in bfloat16, those with matrices large
            enough to gain by it; every log-det and density stays in float32. ``"tf32"`` lets an
            NVIDIA GPU round the factors of all float32 matrix products, the flow's own as well, to
            10 bits behind the point.
        compile: run the model's layers through ``torch.compile``, each kind of layer once; the
            first steps then take long.
        capture: on an NVIDIA GPU record the training step as a CUDA graph and replay it, with the
            same numbers; a `GraphWarning` says why where that is not possible. Elsewhere it has
            no effect.

    Returns: the `History`; ``nflib.plot.history`` draws it.

    Raises:
        NonFiniteError: at the first loss or gradient that is not finite, which never reaches the
            weights; on a GPU it is noticed within ten steps. The last checkpoint is kept.
        ValueError: for data with NaN, an empty data set, no budget, arguments that do not fit.
        CheckpointError: if the checkpoint cannot be written, or is of another run.
    """
    from accelerate import Accelerator

    _check_arguments(model, data, valid, loss, ema, patience, checkpoint, resume)
    with undisturbed(model), matrix_precision(mixed_precision), compiled(model, compile) as wrap:
        accelerator = Accelerator(mixed_precision="bf16" if mixed_precision == "bf16" else "no")
        # Noise and dropout differ between processes, the order of the data does not.
        start_random(seed + accelerator.process_index)
        target = _target(model, accelerator)
        rows = source_of(data, "data", batch_size, seed, target)
        held_out = None if valid is None else source_of(valid, "valid", None, seed, target)
        rows.check(model)
        if held_out is not None:
            held_out.check(model)
        plan = _plan(rows, epochs, steps, seconds, lr, schedule, warmup)
        every = validate_every or rows.per_epoch or math.inf
        run = Run(model, rows, accelerator, loss or negative_log_likelihood, checkpoint)
        run.begin(
            weight_decay=weight_decay,
            clip=clip,
            ema=ema,
            seed=seed,
            resume=resume,
            compile=wrap if compile else None,
            capture=capture,
        )
        at, batches = run.progress, rows.batches(run.progress.step)
        bar = _bar(progress and accelerator.is_main_process, plan.total, at.step)
        try:
            while plan.used(at) < 1 and not (patience and at.since_best >= patience):
                rate = plan.rate(at)
                run.advance(next(batches), rate)
                run.tick(is_shared=seconds is not None)
                run.say_obstacle()
                bar.update()
                if at.step % every == 0:
                    run.measure(rate, held_out)
                    bar.set_postfix(_shown(at.records[-1]))
                else:
                    run.save(at_least_after=save_every)
            if at.loss_count:
                # The budget ended between two validations: the last weights are judged as well.
                run.measure(rate, held_out)
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


def _check_arguments(
    model: nn.Module,
    data: Any,
    valid: Any,
    loss: Any,
    ema: float | None,
    patience: int | None,
    checkpoint: Any,
    resume: bool,
) -> None:
    """What one argument asks of another."""
    if loss is None and not hasattr(model, "log_prob"):
        raise ValueError(
            f"fit expects model to have log_prob, or a loss, got {type(model).__name__}."
        )
    if data is None and (loss is None or valid is not None):
        missing = "a loss" if loss is None else "no valid"
        raise ValueError(f"fit expects {missing} when it is called without data.")
    if ema == 0:
        raise ValueError("fit expects ema to be a number between 0 and 1, got 0.")
    if patience is not None and valid is None:
        raise ValueError(
            f"fit expects valid to measure patience by, got patience={patience} alone."
        )
    if resume and checkpoint is None:
        raise ValueError("fit expects a checkpoint to resume from, got none.")


def _target(model: nn.Module, accelerator: Any) -> Target:
    """The model on its device, and where its batches go."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"fit expects a model with parameters, {type(model).__name__} has none.")
    model.to(accelerator.device)
    return Target(
        accelerator.device,
        parameters[0].dtype,
        accelerator.process_index,
        accelerator.num_processes,
    )


def _plan(
    rows: NoRows,
    epochs: float | None,
    steps: int | None,
    seconds: float | None,
    lr: float,
    schedule: str,
    warmup: int,
) -> Plan:
    if epochs is None and steps is None and seconds is None:
        raise ValueError("fit expects a budget of epochs, steps or seconds, got none.")
    if epochs is not None and rows.per_epoch is None:
        raise ValueError(
            f"fit expects a budget of steps or seconds for data of unknown length, "
            f"got epochs={epochs:g}."
        )
    limits = [steps] if steps is not None else []
    if epochs is not None and rows.per_epoch is not None:
        limits.append(max(1, round(epochs * rows.per_epoch)))
    total = min(limits, default=None)
    if total is not None and warmup > total:
        raise ValueError(f"fit expects a warmup within its {total} steps, got {warmup}.")
    return Plan(total, seconds, lr, schedule, warmup)


def _shown(record: dict[str, float]) -> dict[str, str]:
    return {name: f"{record[name]:.3f}" for name in ("train", "valid") if name in record}


def _bar(show: bool, total: int | None, initial: int) -> Any:
    from tqdm import tqdm

    # None lets TQDM_DISABLE decide; a notebook keeps no bar in its stored outputs.
    return tqdm(
        total=total, initial=initial, unit="step", disable=None if show else True, leave=False
    )
