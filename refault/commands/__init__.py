"""The verbs of the `refault` command, one module each: `configure(parser)` and `main(args) -> int`.

build.py, check.py, compare.py, diff.py, explain.py, gaps.py, list.py, report.py, run.py, stat.py, walk.py.
"""
