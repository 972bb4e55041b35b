"""Features of diffusers in whole pipelines; `python -m benchmarks.pipelines` makes the record."""
