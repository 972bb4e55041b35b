"""A picture from FLUX.1 with piecewise sparse attention.

    python -m examples.pipelines.flux "a lighthouse in a storm" --output out/lighthouse.png
    python -m examples.pipelines.flux --tiny

Text and picture attend each other in one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .shared import arguments, compile_transformer, generate, place
from .tiny import TINY

CHECKPOINT = "black-forest-labs/FLUX.1-dev"


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "flux.png", steps=28)
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels (1024)")
    parser.add_argument("--guidance", type=float, default=3.5)
    args = parser.parse_args(argv)

    pipe = load(args.tiny)
    place(pipe, args)
    compile_transformer(pipe, args, first_block="transformer_blocks.0")
    result = generate(
        pipe,
        args,
        "FluxPipeline",
        height=args.size,
        width=args.size,
        guidance_scale=args.guidance,
    )
    result.images[0].save(args.output)
    print(args.output)


def load(tiny: bool) -> Any:
    from diffusers import FluxPipeline

    if tiny:
        return TINY["FluxPipeline"].build()
    return FluxPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
