"""What the three examples have in common: arguments, placement, compilation, report."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch

import pisa_compile as pisa

from .tiny import TINY

DEFAULT_PROMPT = "a red fox on a snowy hill at sunrise, film grain"


def arguments(description: str | None, name: str, steps: int) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT)
    parser.add_argument("--output", type=Path, default=Path("out") / name)
    parser.add_argument("--steps", type=int, default=steps, help=f"denoising steps ({steps})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsity", type=float, help="of attention (that of the model's preset)")
    parser.add_argument("--dense", action="store_true", help="compile without pisa, to compare")
    parser.add_argument("--offload", action="store_true", help="keep idle models in main memory")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a pipeline with tiny random weights: nothing is downloaded, noise comes out",
    )
    return parser


def place(pipe: Any, args: argparse.Namespace) -> None:
    """Put a pipeline where it runs, and name its progress bar."""
    pipe.set_progress_bar_config(desc="denoising")
    if args.tiny:
        return
    if not torch.accelerator.is_available():
        raise SystemExit("no accelerator found; --tiny runs a small random pipeline on the CPU")
    if args.offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(torch.accelerator.current_accelerator())


def compile_transformer(pipe: Any, args: argparse.Namespace, first_block: str) -> None:
    """The line that this is about. The first layer is dense and, by the preset, the first steps."""
    if args.dense:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        return
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("pisa_compile").setLevel(logging.INFO)
    options: dict[str, Any] = {}
    if args.tiny:  # two layers and a few hundred tokens, and no time lost in Inductor
        options |= {"preset": None, "min_tokens": 0, "block_size": 16, "inner": "eager"}
    if args.sparsity is not None:
        options["sparsity"] = args.sparsity
    # Blocks that are compiled one by one do not know their place, so the layer is named.
    pisa.set_policy(pipe.transformer, {first_block: pisa.DENSE})
    pisa.attach(pipe)  # the scheduler tells which step it is
    pipe.transformer.compile_repeated_blocks(backend="pisa", fullgraph=True, options=options)


def generate(pipe: Any, args: argparse.Namespace, name: str, **settings: Any) -> Any:
    """Run the pipeline and say how long it took, compilation included.

    Args:
        name: of the pipeline class, to find the arguments of its tiny version.
        **settings: size and guidance for the published weights.
    """
    if args.tiny:
        call = TINY[name].arguments() | TINY[name].sizes[0]
    else:
        call = {"prompt": args.prompt, **settings}
    generator = torch.Generator("cpu").manual_seed(args.seed)
    start = time.perf_counter()
    result = pipe(**call, num_inference_steps=args.steps, generator=generator)
    print(f"{args.steps} steps and compilation: {time.perf_counter() - start:.1f} s")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    return result
