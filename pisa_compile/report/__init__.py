"""What ran and why: recordings of compiled graphs, `explain`, attention that no graph contains."""
