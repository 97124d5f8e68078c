"""What lrmult costs and saves; ``python -m benchmarks`` measures all of it."""
