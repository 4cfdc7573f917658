"""Inference (running statistics), over shapes.py's cases, every contender checked before it is timed: pytest bench [--quick]."""

OP = "inference"


def bench_inference(timed, case, contender_name):
    timed(case, contender_name)
