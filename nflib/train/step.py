"""One step of training. All that it changes stands in tensors, so that a GPU can replay it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nflib import graphs
from nflib.prepared import Prepared

Loss = Callable[..., Tensor]


class Step:
    """Loss, gradient, clipping, AdamW and averaged weights, for one batch.

    Nothing of it waits for the device: the learning rate, the sum of the losses and whether any of
    them was not finite are tensors, read when somebody wants to know.

    Args:
        model: whose parameters learn.
        objective: ``objective(call, *batch)``, a mean over rows.
        take: makes the batch, a list of tensors, of what a step is called with.
        weight_decay, clip, ema: see `nflib.train.fit`.
        autocast: makes the context in which the loss is computed.
        compiled: whether the model's layers are compiled, which then arrange their own parameters.

    Attributes:
        call: what the objective calls, the model unless a wrapper replaces it.
        rate: the learning rate, a number on the device.
        average: a model with the averaged weights, or None. `refresh` brings its buffers.
        loss_sum: of all steps since it was last set to zero, float64.
        spoilt: how many steps ago loss or gradient was first not finite, that step included, or 0.
            From that step on no weight changes.
        looks: whether every step reads it, as where there are no graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Loss,
        *,
        take: Callable[..., Sequence[Tensor]] = lambda *batch: batch,
        weight_decay: float = 0.0,
        clip: float = 50.0,
        ema: float | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        compiled: bool = False,
    ) -> None:
        self.model, self.call, self.objective, self.take = model, model, objective, take
        self.clip, self.autocast = clip, autocast
        self.parameters: Any = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.rate = torch.zeros((), device=device)
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.spoilt = torch.zeros((), device=device)
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=self.rate,
            weight_decay=weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.total: Callable[[Tensor], Tensor] | None = None
        # Where reading a number costs nothing, each step looks before it changes a weight.
        self.looks = graphs.recorder_for(device) is None
        self.value: Tensor | None = None
        self.prepare = nullcontext if compiled else Prepared(model)
        self.is_first = True
        self.average = None if ema is None else copy.deepcopy(model)
        if self.average is not None:
            assert ema is not None
            self.average.requires_grad_(False)
            self._blend = get_ema_multi_avg_fn(ema)
            averages = self.average.parameters()
            pairs = zip(averages, model.parameters(), strict=True)
            self._averages: Any = [average for average, p in pairs if p.requires_grad]

    def distribute(self, call: Any, total: Callable[[Tensor], Tensor] | None) -> None:
        """Take over what stands for the model in a distributed run.

        Args:
            total: the sum of a number over all processes.
        """
        self.call, self.total = call, total

    def load(self, states: dict[int, dict[str, Tensor]]) -> None:
        """Take over the optimizer's state, by the number of the parameter."""
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": states, "param_groups": groups})
        for group in self.adam.param_groups:
            group["lr"] = self.rate  # where torch has put a copy

    def __call__(self, *drawn: Tensor) -> None:
        self.value, norm = self.gradient(*self.take(*drawn))
        # Neither is finite if their sum is not, for a norm is never negative infinity.
        total = self.value + norm
        if self.total is not None:
            total = self.total(total)
        if not self.looks:
            is_bad = torch.isfinite(total).logical_not_()
            self.spoilt.add_(is_bad.logical_or_(self.spoilt))
            # The optimizer's own way to let a step pass, made for the scaling of gradients.
            self.adam.found_inf = self.spoilt.clamp(max=1)  # type: ignore[attr-defined]
        elif not math.isfinite(float(total)):
            self.spoilt.fill_(1)
            return
        nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.adam.step()
        if self.average is not None:
            self._follow()
        self.loss_sum.add_(self.value)

    def last_loss(self) -> float | None:
        """The loss of the step that went wrong, or None if others came after it."""
        return float(self.value) if self.looks and self.value is not None else None

    def gradient(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the norm of its gradient, which stands in the parameters."""
        with self.autocast(), self.prepare():
            value = self.objective(self.call, *batch)
        self.adam.zero_grad()
        value.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return value.detach(), nn.utils.get_total_norm(gradients)

    def _follow(self) -> None:
        """Move the averaged weights; the first step's are the average of one."""
        if self.is_first:
            self.is_first = False
            with torch.no_grad():
                torch._foreach_copy_(self._averages, self.parameters)
        else:
            self._blend(self._averages, self.parameters, torch.empty(0))

    def refresh(self) -> nn.Module:
        """The model to judge: that of averaged weights if there is one, with today's buffers."""
        if self.average is None:
            return self.model
        for mine, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
            mine.copy_(theirs)
        return self.average
