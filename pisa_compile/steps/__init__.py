"""Which denoising step is running: the clock, and the schedulers that turn it."""
