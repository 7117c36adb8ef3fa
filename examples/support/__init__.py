"""What several examples and benchmarks share: files, runs, pictures, training loops."""
