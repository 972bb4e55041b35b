"""Floating-point operations of attention, dense and piecewise sparse: counted, not timed."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.params import (
    Settings,
    block_count,
    exact_block_count,
    free_key_blocks,
    free_query_blocks,
)


@dataclass(frozen=True)
class Work:
    """What one head computes.

    Attributes:
        dense_rows: queries that attend every key, as their own block is exact.
        sparse_rows: the others.
        exact_keys: keys that each of those attends exactly.
        exact_blocks, blocks: key blocks, those attended exactly and all.
    """

    dense_rows: int
    sparse_rows: int
    exact_keys: int
    exact_blocks: int
    blocks: int

    @classmethod
    def of(cls, query_len: int, key_len: int, settings: Settings) -> Work:
        """Of `query_len` queries and `key_len` keys; `threshold` counts its expected density."""
        blocks = block_count(key_len, settings.key_size)
        first, last = free_key_blocks(key_len, settings)
        exact = blocks - (last - first) + exact_block_count(settings.density, last - first)
        sparse_rows = query_len
        if query_len == key_len:
            first, last = free_query_blocks(query_len, settings)
            size = settings.block_size
            sparse_rows = max(0, min(last * size, query_len) - first * size)
        exact_keys = min(exact * settings.key_size, key_len)
        return cls(query_len - sparse_rows, sparse_rows, exact_keys, exact, blocks)


def dense_flops(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], value_shape: tuple[int, ...]
) -> int:
    """FLOPs of dense attention: the two matrix products, 2 per multiply-add."""
    batch, heads, query_len, head_dim = query_shape
    return 2 * batch * heads * query_len * key_shape[2] * (head_dim + value_shape[3])


def attention_flops(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    settings: Settings,
) -> int:
    """FLOPs of the op's matrix products, 2 per multiply-add: routing scores, exact blocks,
    centroids, the first-order matrix with its product, and the variances of "corrected" with the
    mean squares. `threshold` counts its expected density, and a density that is data counts as
    `settings.density`.
    """
    batch, heads, query_len, head_dim = query_shape
    key_len, value_dim = key_shape[2], value_shape[3]
    if settings.sparsity == 0:
        return dense_flops(query_shape, key_shape, value_shape)
    work = Work.of(query_len, key_len, settings)
    width, approximated = head_dim + value_dim, work.blocks - work.exact_blocks
    products = (
        work.dense_rows * key_len * width
        + work.sparse_rows * work.exact_keys * width
        + block_count(query_len, settings.block_size) * work.blocks * head_dim
    )
    if settings.order != "none":
        products += work.sparse_rows * approximated * width
    if settings.order == "corrected":
        products += work.blocks * head_dim
    if settings.first_order:
        products += (key_len + work.sparse_rows) * head_dim * value_dim
    elif settings.order == "blockwise":
        products += (key_len + work.sparse_rows * approximated) * head_dim * value_dim
    return 2 * batch * heads * products
