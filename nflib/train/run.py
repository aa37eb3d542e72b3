"""The state of a training run: all that a step changes, that is validated, kept and resumed."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nflib import checkpoints
from nflib.cache import cached
from nflib.graphs import Replayed
from nflib.train.diagnosis import NonFiniteError, diagnose
from nflib.train.rows import Drawn, NoRows
from nflib.train.step import Loss, Step
from nflib.train.surroundings import seeded, start_random

if TYPE_CHECKING:
    from accelerate import Accelerator

# Steps between two looks at whether all is finite, where a look makes the host wait for the device.
LOOK_EVERY = 10


class GraphWarning(UserWarning):
    """A training step on a GPU is not replayed as a CUDA graph; the message says why."""


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


@dataclass(frozen=True)
class Plan:
    """How long a run goes on, and its learning rate on the way."""

    total: int | None
    seconds: float | None
    lr: float
    schedule: str
    warmup: int

    def used(self, at: Progress) -> float:
        """How much of the budget is used, 0 to 1."""
        parts = [at.step / self.total if self.total else 0.0]
        parts += [at.seconds / self.seconds if self.seconds else 0.0]
        return min(1.0, max(parts))

    def rate(self, at: Progress) -> float:
        """The learning rate of the next step."""
        factor = min(1.0, (at.step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * self.used(at)))
        return self.lr * factor


class Run:
    """Model, optimizer, averaged and best weights, progress; the same in all processes."""

    def __init__(
        self,
        model: nn.Module,
        rows: NoRows,
        accelerator: Accelerator,
        objective: Loss,
        checkpoint: str | Path | None,
    ) -> None:
        self.model, self.rows, self.accelerator = model, rows, accelerator
        self.objective, self.checkpoint = objective, checkpoint
        self.best: dict[str, Tensor] = {}
        self.progress = Progress()
        # What the last steps were called with: one of them may have gone wrong.
        self.recent: deque[Drawn] = deque(maxlen=LOOK_EVERY)
        self.saved = time.monotonic()

    def begin(
        self,
        *,
        weight_decay: float,
        clip: float,
        ema: float | None,
        seed: int,
        resume: bool,
        compile: Callable[[Any], Any] | None,
        capture: bool,
    ) -> None:
        """Start afresh or from the checkpoint; then accelerate takes the model over.

        Args:
            compile: what is put around the model that the loss calls, if its layers are compiled.
            capture: record the step where the device has graphs.
        """
        self.identity = {"seed": seed, "batch_size": self.rows.batch_size, "rows": self.rows.rows}
        # Only the main process knows for sure, for it is the one that writes.
        is_there = self.checkpoint is not None and Path(self.checkpoint).is_file()
        is_fresh = not (resume and self.everywhere([is_there])[0])
        first = self.rows.first() if is_fresh else []
        initialize = getattr(self.model, "initialize", None)
        if first and initialize is not None:
            initialize(*first[:2])
        self.step = Step(
            self.model,
            self.objective,
            take=self.rows.batch,
            weight_decay=weight_decay,
            clip=clip,
            ema=ema,
            autocast=self._autocast,
            compiled=compile is not None,
        )
        if not is_fresh:
            self._restore()
        # Here all processes get the main one's parameters and buffers, whatever noise each drew.
        prepared = self.accelerator.prepare(self.model)
        several = self.accelerator.num_processes > 1
        self.step.distribute(
            compile(prepared) if compile else prepared, self._sum if several else None
        )
        self.replayed = Replayed(self.step, self.accelerator.device, capture and not several)
        self._warn_of_emulation()
        self.started = time.monotonic() - self.progress.seconds
        self.model.train()

    def _warn_of_emulation(self) -> None:
        """GPUs before NVIDIA's Ampere, a T4 say, compute bfloat16 by way of float32."""
        asked = self.accelerator.mixed_precision == "bf16"
        if asked and self.accelerator.device.type == "cuda":
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                warnings.warn(
                    f"fit expects a GPU with bfloat16 to gain by mixed_precision='bf16', "
                    f"{torch.cuda.get_device_name()} has none and is slower with it.",
                    stacklevel=4,
                )

    def _autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 if it was asked for: torch's own, for accelerate's stays on after an error."""
        if self.accelerator.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def _sum(self, number: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.gather(number.reshape(1)).sum()

    def advance(self, drawn: Drawn, lr: float) -> None:
        """One step, and a look whether it can go on like this."""
        self.step.rate.fill_(lr)
        self.recent.append(drawn)
        self.replayed(*drawn.inputs)
        at = self.progress
        at.step, at.loss_count = at.step + 1, at.loss_count + 1
        if self.step.looks or at.step % LOOK_EVERY == 0:
            self.look()

    def look(self) -> None:
        """Raise `NonFiniteError` if a loss or a gradient was not finite; no weight has changed."""
        since = int(self.step.spoilt)
        if since == 0:
            return
        drawn = self.recent[-min(since, len(self.recent))]
        batch = self.rows.batch(*drawn.inputs)
        loss = self.step.last_loss()
        if loss is None:
            loss = float(self.step.gradient(*batch)[0])

        def place(row: int) -> str:
            return self.rows.place(drawn, row)

        text, row = diagnose(self.model, self.objective, batch, loss, place)
        kept = f"; the last good state is in {self.checkpoint}" if self.checkpoint else ""
        step = self.progress.step - since
        raise NonFiniteError(f"The training stopped at step {step} on {text}{kept}.", batch, row)

    def say_obstacle(self) -> None:
        """Why the step is not replayed where it could be, once."""
        if self.replayed.obstacle is not None:
            warnings.warn(
                f"fit trains without a CUDA graph, which would be faster: of the training step, "
                f"{self.replayed.obstacle}.",
                GraphWarning,
                stacklevel=4,
            )
            self.replayed.obstacle = None

    def tick(self, is_shared: bool) -> None:
        """Read the clock; processes that stop by it read the main one's."""
        elapsed = time.monotonic() - self.started
        self.progress.seconds = self.everywhere([elapsed])[0] if is_shared else elapsed

    def everywhere(self, numbers: list[float]) -> list[float]:
        """These numbers of all processes, one process after the other."""
        if self.accelerator.num_processes == 1:
            return numbers
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.gather(mine).tolist()

    def measure(self, lr: float, held_out: NoRows | None) -> None:
        """Add a record of the steps since the last one, validate, and save."""
        at = self.progress
        self.look()
        self._settle_loss()
        means = self.everywhere([at.loss_sum / at.loss_count])
        record = {
            "step": at.step,
            "epoch": at.step / self.rows.per_epoch if self.rows.per_epoch else math.nan,
            "train": sum(means) / len(means),
            "lr": lr,
            "seconds": at.seconds,
        }
        at.loss_sum, at.loss_count = 0.0, 0
        if self.accelerator.num_processes > 1:
            self._share_buffers()
        if held_out is not None:
            record["valid"] = self._validate(held_out)
        at.records.append(record)
        self.save()

    def _share_buffers(self) -> None:
        """Running statistics, which each process gathers on its rows, become the main one's."""
        from accelerate.utils import broadcast

        for buffer in self.model.buffers():
            broadcast(buffer)

    def _settle_loss(self) -> None:
        self.progress.loss_sum += float(self.step.loss_sum)
        self.step.loss_sum.zero_()

    def _validate(self, held_out: NoRows) -> float:
        """Mean loss on held-out rows; its random numbers are the same at every validation."""
        at = self.progress
        # The averaged weights are judged if there are any.
        model = self.step.refresh()
        was_training = model.training
        model.eval()
        total, count = torch.zeros((), device=self.accelerator.device, dtype=torch.float64), 0
        # Batches of other sizes would be compiled anew.
        with (
            seeded(0),
            torch.no_grad(),
            cached(model),
            self._autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            for part in held_out.once():
                total += self.objective(model, *part).double() * len(part[0])
                count += len(part[0])
        model.train(was_training)
        sums = self.everywhere([float(total), count])
        value = sum(sums[::2]) / sum(sums[1::2])
        if value < at.best:
            at.best, at.best_step, at.since_best = value, at.step, 0
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        else:
            at.since_best += 1
        return value

    def save(self, at_least_after: float = 0.0) -> None:
        """Write the checkpoint, if there is to be one and the last one is so many seconds old."""
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        if time.monotonic() - self.saved < at_least_after:
            return
        self.look()
        self._settle_loss()
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.step.average is not None:
            tensors |= {f"ema.{k}": v for k, v in self.step.refresh().state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, state in self.step.adam.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        tensors |= {f"rng.{k}": v for k, v in checkpoints.rng_state().items()}
        meta = {"run": self.identity, "progress": asdict(self.progress)}
        meta |= checkpoints.facts_of(self.model)
        checkpoints.write(self.checkpoint, tensors, meta)
        self.saved = time.monotonic()

    def _restore(self) -> None:
        """Take over all that `save` wrote."""
        assert self.checkpoint is not None
        tensors, meta = checkpoints.read(self.checkpoint)
        self._check_identity(meta)

        def part(kind: str) -> dict[str, Tensor]:
            prefix = f"{kind}."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        checkpoints.load_state(self.model, part("model"), self.checkpoint)
        if self.step.average is not None:
            self.step.average.load_state_dict(part("ema") or part("model"))
        self.best = {k: v.to(self.accelerator.device) for k, v in part("best").items()}
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimizer").items():
            i, name = key.split(".")
            states.setdefault(int(i), {})[name] = value
        self.step.load(states)
        self.progress = at = Progress(**meta["progress"])
        self.step.is_first = at.step == 0
        checkpoints.set_rng_state(part("rng"))
        if not self.accelerator.is_main_process:
            # Only the main one's state is stored; no two processes may draw the same noise.
            start_random(hash((self.identity["seed"], self.accelerator.process_index, at.step)))

    def _check_identity(self, meta: dict[str, Any]) -> None:
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

    def finish(self) -> None:
        """Leave the model with the weights that were judged best, the same in all processes."""
        if self.best:
            self.model.load_state_dict(self.best)
        elif self.step.average is not None:
            self.model.load_state_dict(self.step.refresh().state_dict())
        self.model.eval()
