"""Which kernels run for a shape, with how many blocks. Pure Python; a plan depends on shape, dtype and alignment alone.

So do the bits of the result: neither the GPU's number of multiprocessors nor its load enters.
"""

from dataclasses import dataclass

TILE = {"float32": 32, "float64": 16, "float16": 32, "bfloat16": 32}  # elements of a thread's tile: kernels/cuda/tiles.py
LANES = {"float32": 4, "float64": 2, "float16": 8, "bfloat16": 8}


@dataclass(frozen=True)
class Sizes:
    """What the planner may choose from; the simulator's tests use tiny ones."""

    threads: int = 256  # the largest block of the two-launch kernels
    smallest: int = 32  # the smallest: one warp
    blocks: int = 1056  # blocks wanted in a launch: 8 for each of 132 multiprocessors
    wide: int = 16  # vectors across a block of columns
    tall: int = 4  # tiles of rows that a block of columns takes at least, so that merging stays cheap
    persistent: tuple[int, ...] = (32, 64)  # elements a thread may hold; the backward holds half of x, half of dy
    persistent_threads: int = 512
    persistent_channels: int = 96  # fewer channels than this leave multiprocessors idle, unless they are small
    persistent_small: int = 4096  # elements of a channel that is small


DEFAULT = Sizes()


@dataclass(frozen=True)
class Plan:
    """Launch of one shape. family "planes": blocks = C * splits; "columns": blocks = column tiles * splits.

    `chunk` is in tiles; `words` is the length of the activation's mask, one uint32 for each thread and tile; `held_...` are the
    numbers of elements that a thread holds in the persistent kernels, 0 where they do not apply.
    """

    family: str
    lanes: int
    threads: int
    wide: int
    widest: int
    splits: int
    chunk: int
    groups: int
    words: int
    held_forward: int = 0
    held_backward: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of a two-launch kernel."""
        return self.groups * self.splits


def widest_block(lanes: int, sizes: Sizes) -> int:
    """Vectors across the widest block of columns."""
    return sizes.wide * (2 if lanes == 1 else 1)


def largest_block(family: str, lanes: int, dtype: str, sizes: Sizes) -> int:
    """Threads of the largest block that a kernel of "planes" or "columns" is launched with, and so compiled for."""
    return sizes.persistent_threads if family == "planes" and lanes > 1 and dtype != "float64" else sizes.threads


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _split(tiles: int, wanted: int) -> tuple[int, int]:
    """(splits, chunk): about `wanted` shares of `tiles` tiles, none empty."""
    chunk = _ceil(tiles, max(1, min(wanted, tiles)))
    return _ceil(tiles, chunk), chunk


def plan(N: int, C: int, S: int, dtype: str, aligned: bool, sizes: Sizes | None = None) -> Plan:
    """The plan for data of shape (N, C, S), C >= 1, N * S >= 1; S == 1 means rows of channels (NC, channels last).

    Examples
    --------
    >>> p = plan(32, 64, 56 * 56, "float32", aligned=True)
    >>> p.family, p.lanes, p.threads, p.splits
    ('planes', 4, 256, 13)
    >>> plan(32, 64, 7 * 7, "float32", aligned=True).lanes  # 49 is no multiple of 4
    1
    >>> plan(32 * 56 * 56, 64, 1, "float16", aligned=True).family
    'columns'
    """
    sizes = sizes or DEFAULT
    full, tile = LANES[dtype], TILE[dtype]
    if S > 1:
        lanes = full if aligned and S % full == 0 else 1
        values = N * S
        held, threads = _held(values, C, lanes, dtype, sizes)
        # A small channel takes a small block: one warp holds 1024 elements.
        while threads > sizes.smallest and threads // 2 * tile >= values:
            threads //= 2
        held_backward = next((h // 2 for h in sizes.persistent if held and values * 2 <= threads * h), 0)
        tiles = _ceil(values, threads * tile)
        splits, chunk = _split(tiles, _ceil(sizes.blocks, C))
        return Plan("planes", lanes, threads, 0, 0, splits, chunk, C, C * tiles * threads, held, held_backward)
    lanes = full if aligned and C % full == 0 else 1
    wide = widest = widest_block(lanes, sizes)
    while wide > 1 and (wide // 2) * lanes >= C:
        wide //= 2
    rows_a_tile = (sizes.threads // wide) * (tile // lanes)
    column_tiles = _ceil(C, wide * lanes)
    tiles = _ceil(N, rows_a_tile)
    wanted = min(_ceil(sizes.blocks, column_tiles), max(1, tiles // sizes.tall))
    splits, chunk = _split(tiles, wanted)
    return Plan("columns", lanes, sizes.threads, wide, widest, splits, chunk, column_tiles, column_tiles * tiles * sizes.threads)


def _held(values: int, C: int, lanes: int, dtype: str, sizes: Sizes) -> tuple[int, int]:
    """(elements that a thread holds of a channel, threads); 0 where a channel does not fit or would leave the GPU idle."""
    choices, threads = sizes.persistent, sizes.persistent_threads
    if lanes == 1:  # single accesses take an address register each
        choices, threads = choices[:1], sizes.threads
    if dtype == "float64" or (sizes.persistent_channels > C and values > sizes.persistent_small):
        return 0, sizes.threads
    held = next((h for h in choices if values <= threads * h), 0)
    return held, threads if held else sizes.threads
