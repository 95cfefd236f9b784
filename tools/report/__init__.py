"""Behind tools/run_report.py and tools/routing_report.py: a self-contained HTML page, and its pictures as PNG.

run_files.py, scalars.py    what a run left: telemetry and plan, losses from TensorBoard's files; none of it trusted
drawing.py, page.py         how every picture looks, how every page is made and written
run_page.py                 the run report, from training_pictures.py
routing_page.py             the routing report of the paper's figures (arXiv 2408.10681; docs/routing_report.md), from
                            text.py (what the model reads), routing.py (model and text to arrays), statistics.py
                            (arrays to the numbers shown) and routing_pictures.py
"""
