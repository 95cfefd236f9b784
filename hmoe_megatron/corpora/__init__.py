"""Text and benchmarks from the package registries, checked by hash and cut into JSON lines. No torch."""
