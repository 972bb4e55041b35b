"""Piecewise sparse attention for diffusion transformers, as a torch.compile backend."""
