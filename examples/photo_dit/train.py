"""Train the photo transformer by flow matching, small pictures first.

    python -m examples.photo_dit.train --work-dir out/photo_dit_train

A stage is GRID:WINDOW:BATCH:STEPS: pictures of GRID x GRID patches, of which each sample sees a
window of WINDOW x WINDOW. Windows teach full-resolution detail at a sixteenth of the attention;
the last stage sees whole pictures, because attention over 4,096 tokens is what inference does.
A run that was stopped goes on from its checkpoint when the same command is given again.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import PHOTOS, Batch, PhotoSet
from .figure import save_loss
from .model import DiTConfig, PhotoDiT
from .sampling import euler_step, noise, shift_time, time_grid, to_uint8
from .weights import WEIGHTS, save_weights

# Up to here attention as two bfloat16 matrix products beats the fused kernel on a CPU; beyond, the
# score matrix no longer fits a cache.
UNFUSED_TOKENS = 1024

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    grid: int
    window: int
    batch: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Stage":
        try:
            return cls(*(int(part) for part in text.split(":")))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"a stage is GRID:WINDOW:BATCH:STEPS, four integers; got {text!r}"
            ) from None

    def __str__(self) -> str:
        whole = f"{self.grid}x{self.grid} patches"
        if self.window == self.grid:
            return whole
        return f"{whole}, windows of {self.window}x{self.window}"

    @property
    def work(self) -> float:
        """Relative cost of the stage: its tokens."""
        return self.steps * self.batch * self.window**2


DEFAULT_STAGES = (
    Stage(16, 16, 16, 800),
    Stage(32, 32, 4, 250),
    Stage(64, 16, 16, 900),
    Stage(64, 32, 4, 500),
    Stage(64, 64, 1, 50),
    Stage(64, 32, 4, 100),
    Stage(64, 64, 1, 60),
)


@dataclass
class Position:
    """Where in the list of stages a run is."""

    step: int  # all steps so far
    stage: Stage
    done: float  # fraction of the planned tokens, 0 to 1


def positions(stages: list[Stage], start: int) -> Iterator[Position]:
    """Every step from number `start` on."""
    total = sum(stage.work for stage in stages)
    step, work = 0, 0.0
    for stage in stages:
        for index in range(stage.steps):
            if step >= start:
                yield Position(step, stage, (work + stage.work * index / stage.steps) / total)
            step += 1
        work += stage.work


def rate(done: float, step: int, warmup: int = 100) -> float:
    """Learning rate as a fraction of its peak: warm-up, plateau, then a cosine to nearly zero."""
    if step < warmup:
        return (step + 1) / warmup
    falling = max(0.0, (done - 0.4) / 0.6)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling))


def optimizers(model: PhotoDiT, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and p.shape[0] != 6]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def flow_loss(model: Network, batch: Batch, shift: float, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at random times, one per sample."""
    count = batch.pixels.shape[0]
    # One time in each of `count` equal strata: less variance than independent draws.
    strata = torch.arange(count) + torch.rand(count, generator=generator)
    t = shift_time(strata / count, shift)
    start = torch.randn(batch.pixels.shape, generator=generator)
    weight = t[:, None, None, None]
    noisy = (1 - weight) * start + weight * batch.pixels
    attention = (
        SDPBackend.MATH
        if batch.pixels[0, 0].numel() <= UNFUSED_TOKENS * 16
        else SDPBackend.FLASH_ATTENTION
    )
    with sdpa_kernel(attention), torch.autocast("cpu", torch.bfloat16):
        velocity = model(noisy, t, batch.label, batch.view)
    error = velocity.float() - (batch.pixels - start)
    return error.square().mean()


class Average:
    """Exponential moving average of the weights, quick at first."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict()
        torch._foreach_lerp_(list(self.state.values()), [state[k] for k in self.state], 1 - decay)


@torch.inference_mode()
def preview(run: "Run", grid: int, path: Path) -> None:
    """Whole pictures from the averaged weights, one of each of the first few classes."""
    model, average, args = run.model, run.average, run.args
    sampler = PhotoDiT(model.config)
    sampler.load_state_dict(average.state)
    side = grid * model.config.patch
    count = min(args.preview_classes, len(PHOTOS))
    sheet = Image.new("RGB", (side * count, side))
    times = time_grid(args.preview_steps)
    with torch.autocast("cpu", torch.bfloat16):
        for index in range(count):
            x, label = noise(index, side), torch.tensor([index])
            for begin, end in itertools.pairwise(times):
                x = euler_step(sampler, x, label, begin, end)
            picture = Image.fromarray(to_uint8(x)[0].permute(1, 2, 0).numpy())
            sheet.paste(picture, (side * index, 0))
    sheet.save(path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.photo_dit.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work-dir", type=Path, default=Path("out/photo_dit_train"))
    parser.add_argument("--stages", type=Stage.parse, nargs="+", default=list(DEFAULT_STAGES))
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--shift", type=float, default=2.0, help="of the times towards noise")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds")
    parser.add_argument("--preview-every", type=int, default=1000, help="steps")
    parser.add_argument("--preview-steps", type=int, default=16)
    parser.add_argument("--preview-classes", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="train through Inductor")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file to write at the end")
    return parser.parse_args(argv)


class Run:
    """The state of a training run, which is what a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.model = PhotoDiT(DiTConfig(classes=len(PHOTOS)))
        self.network: Network = torch.compile(self.model) if args.compile else self.model
        self.optimizers = optimizers(self.model, args.learning_rate)
        self.average = Average(self.model, args.ema)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.history: list[tuple[int, int, float]] = []
        self.step = 0
        self.checkpoint = args.work_dir / "checkpoint.pt"

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "history": self.history,
        }

    def save(self) -> None:
        # Written aside and renamed, so that a run killed here keeps its last checkpoint.
        aside = self.checkpoint.with_suffix(".new")
        torch.save(self.state(), aside)
        os.replace(aside, self.checkpoint)
        records = [{"step": s, "grid": g, "loss": round(v, 6)} for s, g, v in self.history]
        (self.args.work_dir / "loss.json").write_text(json.dumps(records) + "\n")
        spans = [(str(stage), stage.steps) for stage in self.args.stages]
        losses = [(step, loss) for step, _, loss in self.history]
        save_loss(losses, spans, self.args.work_dir / "loss.png")

    def resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.state = state["average"]
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.generator.set_state(state["generator"])
        self.history = [tuple(entry) for entry in state["history"]]

    def advance(self, position: Position, photos: PhotoSet) -> float:
        """One optimiser step; returns its loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.learning_rate * rate(position.done, position.step)
            optimizer.zero_grad(set_to_none=True)
        batch = photos.batch(position.stage.batch, position.stage.window, self.generator)
        loss = flow_loss(self.network, batch, self.args.shift, self.generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step = position.step + 1
        self.average.update(self.model, self.step)
        return loss.item()


def train(run: Run, progress: Progress) -> None:
    """All remaining steps, with checkpoints, previews and a loss history."""
    args = run.args
    total = sum(stage.steps for stage in args.stages)
    task = progress.add_task("train", total=total, completed=run.step)
    photos: dict[int, PhotoSet] = {}
    recent: list[float] = []
    saved = time.monotonic()
    for position in positions(args.stages, run.step):
        grid = position.stage.grid
        if grid not in photos:
            photos[grid] = PhotoSet(grid, run.model.config.patch)
        recent.append(run.advance(position, photos[grid]))
        if run.step % 20 == 0 or run.step == total:
            run.history.append((run.step, grid, sum(recent) / len(recent)))
            progress.update(task, description=f"{grid}x{grid} loss {run.history[-1][2]:.4f}")
            recent.clear()
        progress.update(task, completed=run.step)
        if run.step % args.preview_every == 0:
            path = args.work_dir / f"preview_{run.step:06d}.png"
            preview(run, grid, path)
        if time.monotonic() - saved > args.save_every:
            run.save()
            saved = time.monotonic()
    run.save()


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # applies to the CPU as well
    args.work_dir.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    run.resume()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        train(run, progress)
    given = sys.argv[1:] if argv is None else argv
    last = [loss for _, _, loss in run.history[-5:]]  # 100 steps: single ones are noisy
    origin = {
        "command": shlex.join(["python", "-m", "examples.photo_dit.train", *given]),
        "seed": args.seed,
        "steps": run.step,
        "loss": round(sum(last) / len(last), 5),
        "torch": torch.__version__,
    }
    save_weights(run.average.state, run.model.config, origin, args.weights)


if __name__ == "__main__":
    main()
