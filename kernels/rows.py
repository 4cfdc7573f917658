"""Rows of the tables that a forward and a backward keep, in float64 with a column for each channel: the same on CPU and GPU.

Neither Numba nor CuPy is imported here, so that the host's side can name the rows too.
"""

# Kernels of columns read MEAN to BETA, and COEF_A to COEF_C, in loops over neighbouring rows: these keep their order.
#
# The forward's: GAMMA and BETA are the parameters, the rest follows from the statistics. MEAN and LOW are the mean in two words. ANCHOR
# is the last, as the CPU alone keeps it: MEAN in float32 lanes, or NaN where a channel does not fit those.
GAMMA, VAR, INVSTD, MEAN, LOW, SCALE, BETA, ANCHOR = range(8)
TABLE_ROWS = 8
# The backward's: the two sums over a channel, and dx = COEF_A * dy + COEF_B * (x - mean) + COEF_C.
SUM_DY, SUM_DY_XMU, COEF_A, COEF_B, COEF_C = range(5)
BACKWARD_ROWS = 5

# Places of the desk, where a call lies for the threads that share it (kernels/cpu/desk.py), each on a cache line of its own:
# - whose call it is, how many calls began and ended, how many threads are at it and how many took a seat, which phase it is in;
# - how many threads there are, how many sleep, through how much work, and through how much the last time;
# - how often a thread gives way before it sleeps, whether threads are to leave, when the last call ended, the caller's processor;
# - for how many threads the call is, and the addresses of its code, of its arguments and of its cuts.
LINE = 8
OWNER, JOB, INSIDE, SEATS, PHASE, THREADS, SLEEPERS, NAP, LAST_NAP = range(0, 9 * LINE, LINE)
PATIENCE, STOP, ENDED, CALLER, MEMBERS, CALL = range(9 * LINE, 15 * LINE, LINE)
# From here on the board of each phase: the next piece to take, pieces computed, what kernels returned, on a line each.
BOARDS = CALL + LINE
NEXT, DONE, FOUND = range(0, 3 * LINE, LINE)
BOARD, PHASES = 3 * LINE, 8
DESK = BOARDS + PHASES * BOARD
