"""Training forward, over shapes.py's cases, every contender checked before it is timed: pytest bench [--quick]."""

OP = "forward"


def bench_forward(timed, case, contender_name):
    timed(case, contender_name)
