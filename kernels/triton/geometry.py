"""All sizes that the launches of one call depend on. Plain integers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..params import (
    AttentionParams,
    block_count,
    exact_block_count,
    free_key_blocks,
    free_query_blocks,
)
from .configs import Config, padded_width

# Programs of one launch along an axis of the grid that is not the first.
MAX_GRID = 65_535
# Query tiles in one group of heads: enough that the last, partly filled wave costs little.
MIN_TILES = 4096
# Share of the memory of query, key and value that a group's workspace may take beyond that.
WORKSPACE_SHARE = 0.015
ROUTING_ROWS = 16
# Elements of a score tile under selection: 16 registers per thread at 8 warps.
SELECT_ELEMENTS = 4096
# Programs per key head that sum up the squares of its queries.
ENERGY_PARTS = 32


@dataclass(frozen=True)
class Device:
    arch: str  # "sm_90", "gfx942", ..., or "interpreter"
    processors: int  # streaming multiprocessors or compute units

    @property
    def float32_precision(self) -> str:
        """Products of float32 operands: exact on AMD, three TF32 products elsewhere."""
        return "tf32x3" if self.arch.startswith("sm_") else "ieee"


@dataclass(frozen=True)
class Geometry:
    """All sizes of one call, and how its heads are grouped."""

    params: AttentionParams
    device: Device
    config: Config
    batch: int
    heads: int
    kv_heads: int
    query_len: int
    key_len: int
    d: int
    e: int
    bytes_per_value: int
    has_density: bool
    masked: bool
    permuted: bool
    describable: bool  # whether the copy engine can address keys, values and their means

    @cached_property
    def query_size(self) -> int:
        return self.params.block_size

    @cached_property
    def key_size(self) -> int:
        return self.params.key_size

    @cached_property
    def group_size(self) -> int:
        return self.heads // self.kv_heads

    @cached_property
    def blocks(self) -> int:
        return block_count(self.key_len, self.key_size)

    @cached_property
    def query_blocks(self) -> int:
        return block_count(self.query_len, self.query_size)

    @cached_property
    def rows(self) -> int:
        """Query rows per program; a short sequence does not fill several blocks."""
        rows = (self.config.guarded_rows if self.guarded else None) or self.config.rows
        return min(rows, max(padded_width(self.query_len), self.query_size))

    @cached_property
    def keys(self) -> int:
        return min(self.config.keys, self.key_size)

    @cached_property
    def pack(self) -> int:
        return max(self.rows // self.query_size, 1)

    @cached_property
    def index_tiles(self) -> int:
        return block_count(self.query_blocks, self.pack)

    @cached_property
    def columns(self) -> int:
        """Padded number of key blocks in a routing row; whole bitmap words."""
        return max(32, padded_width(self.blocks))

    @cached_property
    def select(self) -> int:
        """Query blocks that routing selects for at a time; whole query tiles."""
        fitting = min(ROUTING_ROWS, max(1, SELECT_ELEMENTS // self.columns))
        return max(fitting, self.pack)

    @cached_property
    def select_columns(self) -> int:
        """Key blocks per step of the selection: all of them, unless that is too many."""
        return min(self.columns, SELECT_ELEMENTS // self.select)

    @cached_property
    def inside(self) -> bool:
        """Whether the forward kernel decides what is exact, from its own centroid scores.

        It then needs to have such scores, and all rows of a query block.
        """
        threshold = self.params.routing == "threshold" and self.params.order != "none"
        allowed = self.config.inside_guarded if self.guarded else self.config.inside
        return threshold and allowed and self.rows >= self.query_size

    @cached_property
    def descriptors(self) -> bool:
        """Whether the copy engine reads keys and values; it masks no keys and gathers no rows."""
        plain = self.describable and not self.masked and not self.permuted
        return self.config.descriptors and plain

    @cached_property
    def guarded(self) -> bool:
        """Whether the forward kernel guards or looks up every load, which takes registers."""
        return not self.descriptors and (self.masked or self.permuted or not self.whole_width)

    @cached_property
    def free(self) -> tuple[int, int]:
        return free_key_blocks(self.key_len, self.params)

    @cached_property
    def dense(self) -> tuple[int, int]:
        """Query blocks outside this range attend densely."""
        if self.query_len == self.key_len and self.params.exact != (0, 0):
            return free_query_blocks(self.query_len, self.params)
        return 0, self.query_blocks

    @cached_property
    def count(self) -> int:
        first, last = self.free
        return exact_block_count(self.params.density, last - first)

    @cached_property
    def capacity(self) -> int:
        """Entries that a row of indices may need."""
        first, last = self.free
        known = self.params.routing != "threshold" and not self.has_density
        if not known or self.dense != (0, self.query_blocks):
            return self.blocks
        return min(self.blocks, self.pack * (self.count + self.blocks - (last - first)))

    @cached_property
    def whole_width(self) -> bool:
        """Whether no tile has padded columns."""
        return self.d == padded_width(self.d) and self.e == padded_width(self.e)

    @cached_property
    def first_order(self) -> bool:
        return self.params.first_order

    @cached_property
    def corrected(self) -> bool:
        return self.params.order == "corrected"

    @cached_property
    def covariance(self) -> bool:
        return self.params.routing == "topk_covariance"

    @cached_property
    def matrix_tiles(self) -> tuple[int, int]:
        """Rows and columns of the first-order matrix per program.

        Padded columns guard every load; wide tiles would then spill registers.
        """
        guarded = min(self.config.tile, self.config.norm_tile)
        return self._tiles(self.config.tile if self.whole_width else guarded)

    @cached_property
    def norm_tiles(self) -> tuple[int, int]:
        return self._tiles(self.config.norm_tile)

    def _tiles(self, limit: int) -> tuple[int, int]:
        return min(limit, padded_width(self.d)), min(limit, padded_width(self.e))

    @cached_property
    def matrix_programs(self) -> int:
        rows, columns = self.matrix_tiles
        return block_count(self.d, rows) * block_count(self.e, columns)

    def splits(self, kv_heads: int) -> int:
        """Programs per head and matrix tile of the statistics: about one wave in all."""
        programs = kv_heads * self.matrix_programs
        return max(1, min(self.blocks, block_count(self.device.processors, programs)))

    @cached_property
    def group(self) -> int:
        """Key/value heads per group."""
        total = self.batch * self.kv_heads
        tiles = self.group_size * block_count(self.query_len, self.rows)
        least = block_count(MIN_TILES, tiles)
        per_head = self.blocks * (self.d * (4 + self.bytes_per_value) + self.e * 2)
        per_head += self.group_size * self.index_tiles * self.capacity * 4
        per_head += self.group_size * self.query_blocks * (4 if self.inside else self.columns // 8)
        per_head += self.d * self.e * 4 * (1 + self.splits(least))
        inputs = self.group_size * self.query_len * self.d + self.key_len * (self.d + self.e)
        affordable = int(WORKSPACE_SHARE * total * inputs * self.bytes_per_value / per_head)
        launchable = MAX_GRID // self.group_size
        groups = block_count(total, min(total, launchable, max(least, affordable)))
        return block_count(total, groups)

    @cached_property
    def energy_rows(self) -> int:
        return block_count(self.query_len, ENERGY_PARTS)

    @cached_property
    def row_groups(self) -> int:
        """Programs' worth of query blocks per head in the routing kernel."""
        return block_count(self.query_blocks, ROUTING_ROWS)

    @cached_property
    def scratch_stride(self) -> int:
        return block_count(self.blocks, 32) * 32

    def routing_programs(self, heads: int) -> int:
        return min(heads * self.row_groups, 2 * self.device.processors)
