"""Backward, over shapes.py's cases, every contender checked before it is timed: pytest bench [--quick]."""

OP = "backward"


def bench_backward(timed, case, contender_name):
    timed(case, contender_name)
