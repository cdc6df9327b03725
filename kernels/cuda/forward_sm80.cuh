// Fused forward for Ampere and everything after it: hidden [N, H] x weight [V, H]^T tile by tile (tile_gemm.cuh), each
// tile reduced to the moments of its rows (tile_rows.cuh) while it is in registers. Logits reach memory only where the raw
// products are asked for; logitless_merge turns the moments of all ceil(V / 128) parts into statistics.
//
// Grid: one block a tile, ordered so that the blocks at work at one time share rows: 16 tiles of tokens, then the next
// part.
// Work: 2 N H V flops, N V exponentials. Bytes: hidden and weight once from memory where L2 holds 16 x 128 tokens' rows
// (16 MB at H = 4096), 256 H for each tile and operand from L2; 8 N V / 128 written, or 20 N V / 128 with all moments.
// Shared memory 48 KB. Registers: 232 (sm_80), 238 (sm_90a), 224 (sm_100), no local memory, so that two blocks fit.
// Bound at N = 8192, H = 4096, V = 128256: 8.6 Tflop, 27.6 ms at A100's 312 Tflop/s. The inner loop is 228 instructions
// of a warp for 64 mma (sm_80), which take 512 cycles of their scheduler's tensor core. The epilogue's 1.05e9 exponentials
// and some 6 other instructions for each are 0.8 ms, hidden where the multiprocessor's other block multiplies meanwhile.
// Not yet run on a GPU. The code is tested on the CPU, where its instructions are emulated (host/mma.h).
#pragma once

#include "tile_gemm.cuh"
#include "tile_rows.cuh"

namespace logitless {

constexpr int TOKEN_TILES_AT_ONCE = 16;

template <typename Half>
struct ForwardTask {
    Matrix<Half> hidden;
    Matrix<Half> weight;
    RowHead head;
    RowResults out;
};

struct TileIndex {
    int token_tile;
    int part;
};

// Tile of a block: of 16 tiles of tokens (fewer at the end), all parts in turn.
__device__ inline TileIndex tile_of(int block, int token_tiles, int parts) {
    const int group = block / (TOKEN_TILES_AT_ONCE * parts);
    const int first = group * TOKEN_TILES_AT_ONCE;
    const int height = token_tiles - first < TOKEN_TILES_AT_ONCE ? token_tiles - first : TOKEN_TILES_AT_ONCE;
    const int within = block - first * parts;
    return {first + within % height, within / height};
}

// The pipeline's stages, and afterwards the moments of the rows in the two halves of the tile's columns.
template <typename Half>
union ForwardShared {
    Stages<Half> stages;
    Moments<float> halves[TILE / WARP_TILE][TILE];
};

template <typename Half>
__global__ void __launch_bounds__(TILE_THREADS, 2) forward_sm80_kernel(const ForwardTask<Half> task) {
    LOGITLESS_SHARED(ForwardShared<Half>, shared, 1);
    const int token_tiles = static_cast<int>((task.hidden.rows + TILE - 1) / TILE);
    const int parts = static_cast<int>((task.weight.rows + TILE - 1) / TILE);
    const TileIndex tile = tile_of(static_cast<int>(blockIdx.x), token_tiles, parts);
    const std::int64_t first_row = static_cast<std::int64_t>(tile.token_tile) * TILE;
    const std::int64_t first_column = static_cast<std::int64_t>(tile.part) * TILE;

    Accumulators acc;
    clear(acc);
    multiply_tile<false, false>(acc, shared->stages, task.hidden, first_row, task.weight, first_column,
                                task.hidden.columns);

    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t column = first_column + warp_column();
    LOGITLESS_UNROLL
    for (int i = 0; i < WARP_TILE / 16; ++i)
        LOGITLESS_UNROLL
        for (int high = 0; high < 2; ++high) {
            const int tile_row = warp_row() + 16 * i + 8 * high + lane / 4;
            const std::int64_t row = first_row + tile_row;
            const int target = task.out.target(task.head, row);
            float s[WARP_TILE / 4];
            LOGITLESS_UNROLL
            for (int j = 0; j < WARP_TILE / 4; ++j) s[j] = acc.at[i][j / 2][2 * high + j % 2];
            const Moments<float> found = reduce_row(s, column, row, target, task.head, task.out);
            if (lane % 4 == 0) shared->halves[warp_column() / WARP_TILE][tile_row] = found;
        }
    __syncthreads();
    const int own = static_cast<int>(threadIdx.x);
    if (first_row + own < task.hidden.rows)
        write(task.out.partials, tile.part, first_row + own, merge(shared->halves[0][own], shared->halves[1][own]));
}

}  // namespace logitless
