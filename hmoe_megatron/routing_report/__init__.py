"""The paper's figures of routing (arXiv 2408.10681), from a run's telemetry and from its checkpoint and text.

`collect` turns model and text into arrays, `statistics` into the numbers that are shown, `pictures` and `page` show
them; `over_training` reads telemetry, `text` the inputs, `command` is behind tools/routing_report.py.
"""
