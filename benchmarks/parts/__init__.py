"""What the benchmarks are made of; the commands are in the folder above."""
