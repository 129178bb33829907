"""Optimizer, checkpoints, log and progress of one training stage of the demo model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


class Trainer:
    """Optimizer, averaging and checkpoints of one stage.

    The model runs in ``dtype``, the optimizer keeps float32 master weights, and their
    exponential moving average is what the stage leaves in the model. Muon takes the
    hidden matrices, convolutions included: with Adam alone the autoencoder stays gray
    for thousands of steps.
    """

    def __init__(
        self,
        work: Path,
        stage: str,
        model: nn.Module,
        steps: int,
        *,
        peak: float,
        dtype: torch.dtype,
    ) -> None:
        self._work, self._stage, self._total, self._peak = work, stage, steps, peak
        self._model = model.float()
        self._dtype = dtype
        # A convolution's weight is a matrix from its inputs to its channels.
        self._master = [
            p.detach().clone().contiguous().flatten(1)
            if p.ndim > 2
            else p.detach().clone()
            for p in model.parameters()
        ]
        self._average = [p.clone() for p in self._master]
        hidden = ("blocks.", "block.", "layers.")
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for (name, _), master in zip(
            model.named_parameters(), self._master, strict=True
        ):
            is_hidden = master.ndim == 2 and any(key in name for key in hidden)
            (matrices if is_hidden else others).append(master)
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, peak, weight_decay=0.01),
            torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._start = 0
        self._path = work / f"{stage}.pt"
        if self._path.exists():
            self._resume()
        self._model.to(self._dtype)
        self._copy_to_model(self._master)
        self._losses: list[float] = []
        self._helpers: list[float] = []
        self._clock = time.monotonic()

    def steps(self) -> Iterator[int]:
        """The steps still to do; afterwards the model holds the average."""
        yield from progress(self._stage, range(self._start, self._total))
        if self._start < self._total:
            self._save(self._total)
        self._model.float()
        self._copy_to_model(self._average)

    def update(self, step: int, loss: Tensor, helper: Tensor | None = None) -> None:
        """One optimizer step from a loss, plus a tenth of a helper's where given."""
        helper = torch.zeros_like(loss) if helper is None else helper
        (loss + 0.1 * helper).backward()
        for master, live in zip(self._master, self._model.parameters(), strict=True):
            gradient = live.grad
            live.grad = None
            master.grad = (
                None if gradient is None else (gradient.float().reshape(master.shape))
            )
        nn.utils.clip_grad_norm_(self._master, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._peak * schedule(step, self._total)
            optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(self._average, self._master, 1 - decay)
        self._copy_to_model(self._master)
        self._losses.append(loss.item())
        self._helpers.append(helper.item())
        if (step + 1) % 50 == 0:
            elapsed = (time.monotonic() - self._clock) / len(self._losses)
            log(
                self._work,
                stage=self._stage,
                step=step + 1,
                loss=sum(self._losses) / len(self._losses),
                helper=sum(self._helpers) / len(self._helpers),
                seconds_per_step=elapsed,
            )
            self._losses, self._helpers = [], []
            self._clock = time.monotonic()
        if (step + 1) % 250 == 0:
            self._save(step + 1)

    @torch.no_grad()
    def _copy_to_model(self, source: list[Tensor]) -> None:
        for live, value in zip(self._model.parameters(), source, strict=True):
            live.copy_(value.view(live.shape))

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "master": self._master,
            "average": self._average,
            "optimizers": [o.state_dict() for o in self._optimizers],
        }
        save(state, self._path)

    def _resume(self) -> None:
        state = torch.load(self._path)
        self._start = state["step"]
        for mine, stored in ((self._master, "master"), (self._average, "average")):
            for tensor, value in zip(mine, state[stored], strict=True):
                tensor.copy_(value)
        for optimizer, stored in zip(
            self._optimizers, state["optimizers"], strict=True
        ):
            optimizer.load_state_dict(stored)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal, in float32.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, with
    updates as large as Adam's (Liu et al., 2025, arXiv:2502.16982). PyTorch's works in
    bfloat16, which takes a CPU without such instructions most of a step.
    """

    def __init__(
        self, matrices: list[Tensor], lr: float, *, weight_decay: float
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure is ever given
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].lerp_(matrix.grad, 0.05)
                update = orthogonal(matrix.grad.lerp(momentum, 0.95))
                size = 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """Makes all singular values about 1, by five Newton-Schulz iterations."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


def attention(query: Tensor, key: Tensor, value: Tensor, **_options: object) -> Tensor:
    """Attention of ``(B, H, S, D)`` as two products, in place of PyTorch's own.

    On a CPU the backward of its fused one takes five times as long, and its plain one
    spends a fifth of a step on masks that are not there.
    """
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value


def schedule(step: int, total: int) -> float:
    """Warm-up over 2 %, flat, then linear decay over the last 40 %."""
    return min(1.0, (step + 1) / (0.02 * total), (total - step) / (0.4 * total))


def save(state: object, path: Path) -> None:
    """Writes a checkpoint that is either whole or absent."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def log(work: Path, **values: object) -> None:
    """Appends one JSON line to the training log."""
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def progress(name: str, steps: Iterable[int]) -> Iterator[int]:
    """A progress bar over a stage."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        yield from bar.track(steps, description=name)
