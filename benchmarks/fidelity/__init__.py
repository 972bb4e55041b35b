"""How close piecewise sparse attention and its rivals come to dense attention.

    python -m benchmarks.fidelity --output benchmarks/results/fidelity.json
    python -m benchmarks.fidelity --quick

Three parts, each of which can run alone: `operator` (errors of single attention calls), `timing`
(CPU time of the calls that the package has kernels for) and `pictures` (whole sampling
trajectories of the photo DiT). All write into one record, from which the plots and the tables of
docs/fidelity.md are drawn.
"""
