"""Behind tools/evaluate.py and tools/generate.py: the same questions and texts for models of two kinds.

inputs.py       what is evaluated, and on which text
benchmarks.py   which benchmarks there are, and their files
models.py       a run's checkpoint or a Hugging Face directory as token logits; all that differs between the two
scoring.py      log-likelihoods of tokens, in windows and batches
texts.py        perplexity and bits a byte
harness.py      lm-eval's tasks, and its model around ours
work.py         all of it for one model, in a process of its own
report.py       differences, table
"""
