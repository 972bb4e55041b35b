"""The kernels on a GPU, and what they must beat; `python -m benchmarks.gpu` makes the record."""
