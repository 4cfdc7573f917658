"""Python functions in place of kernels, for tests of threads.py: what team.py does, under a lock instead of atomically."""

import threading

import numpy as np

from fastbn.cpu import threads
from fastbn.kernels.rows import DONE, NEXT


def parallel(kernel, tasks, piece, number):
    """kernel(thread, first, last) over range(tasks), `piece` tasks at a time, by `number` threads."""
    board, pieces, lock = np.zeros(3, np.int64), -(-tasks // piece), threading.Lock()

    def work(thread):
        with lock:
            k = int(board[NEXT])
            board[NEXT] += 1
        if k < pieces:
            kernel(thread, k * piece, min((k + 1) * piece, tasks))
            with lock:
                board[DONE] += 1

    threads.parallel(work, board, pieces, number)
