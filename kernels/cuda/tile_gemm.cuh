// The multiplication behind every kernel here but Hopper's: a thread block makes a [128, 128] tile of A B in float32.
//
//     acc[m, n] = sum_k A[first_a + m, k] B[first_b + n, k]
//
// Tiling: 4 warps, 2 x 2, a warp 64 x 64 of the tile: 128 accumulators a thread. A stage holds 32 of k: 8 KB for each
// operand; 3 stages of both, 48 KB, are what a block gets without asking, and two blocks of it fit every GPU since
// Ampere. Two of the stages are on their way (cp.async) while one is multiplied (ldmatrix, mma.m16n8k16).
// Traffic of a step of 32: 16 KB in, 32 KB out of shared memory to registers for 2 x 128 x 128 x 32 flops: at Ampere's
// 1024 multiplications a cycle 512 cycles, of which shared memory is busy 384. From L2: 16 KB for 1 Mflop.
// Numerics: products of halves are exact, sums float32 in the order of k.
//
// An operand is a matrix of halves in rows, wherever those lie (a gather), read along its rows or across them:
//     ACROSS = false: row m of the matrix is row m of the operand, its columns are k      (hidden and weight: products)
//     ACROSS = true:  row k of the matrix holds k, its columns are m                      (gradients' products)
// Rows and columns beyond the matrix count as zeros. Columns come in 16 bytes: their number is a multiple of 8.
#pragma once

#include "mma.cuh"

namespace logitless {

constexpr int TILE = 128;  // rows and columns of a tile
constexpr int TILE_THREADS = 128;
constexpr int DEPTH = 32;  // of k in a stage
constexpr int WARP_TILE = 64;  // rows and columns of a warp's part

// Matrix of halves [rows, columns]. GATHERED: row r of it lies at row index[r] of the memory, and is zero where that is
// negative.
template <typename Half, bool GATHERED = false>
struct Matrix {
    const Half* base;           // 16-byte aligned
    std::int64_t stride;        // a multiple of 8
    std::int64_t rows;
    std::int64_t columns;       // a multiple of 8
    const std::int32_t* index;  // [rows], or null
};

// Shared memory of a block.
template <typename Half, int STAGES = 3>
struct alignas(128) Stages {
    Half a[STAGES][TILE * DEPTH];
    Half b[STAGES][TILE * DEPTH];
};

// A warp's part of the tile, by the layout of C in mma.cuh: acc[i][j] is rows 16 i .., columns 8 j ..
struct Accumulators {
    float at[WARP_TILE / 16][WARP_TILE / 8][4];
};

// Rows and columns of the tile at which this warp's part begins.
__device__ inline int warp_row() { return static_cast<int>(threadIdx.x) / 32 % 2 * WARP_TILE; }
__device__ inline int warp_column() { return static_cast<int>(threadIdx.x) / 64 * WARP_TILE; }

// Where 16 bytes lie in a stage, in halves: row and chunk of the matrix, chunks swizzled so that neither eight rows of
// one chunk (ldmatrix) nor eight chunks in order (the copy) meet in a bank.
template <bool ACROSS>
__device__ inline int stage_offset(int row, int chunk) {
    constexpr int CHUNKS = (ACROSS ? TILE : DEPTH) / 8;
    const int swizzle = ACROSS ? row % 8 : row / 2 % 4;
    return (row * CHUNKS + (chunk ^ swizzle)) * 8;
}

// Starts the copy of an operand's [128, 32] that begins at (first, k).
template <bool ACROSS, typename Half, bool GATHERED>
__device__ inline void copy_stage(Copies& copies, Half* stage, const Matrix<Half, GATHERED>& from, std::int64_t first,
                                  std::int64_t k) {
    constexpr int CHUNKS = (ACROSS ? TILE : DEPTH) / 8;
    LOGITLESS_UNROLL
    for (int piece = 0; piece < TILE * DEPTH / 8; piece += TILE_THREADS) {
        const int row = (piece + static_cast<int>(threadIdx.x)) / CHUNKS;
        const int chunk = (piece + static_cast<int>(threadIdx.x)) % CHUNKS;
        const std::int64_t matrix_row = (ACROSS ? k : first) + row;
        const std::int64_t column = (ACROSS ? first : k) + chunk * 8;
        bool present = matrix_row < from.rows && column < from.columns;
        std::int64_t place = matrix_row;
        if constexpr (GATHERED) {
            place = present ? from.index[matrix_row] : -1;
            present = place >= 0;
        }
        const Half* const at = from.base + (present ? place * from.stride + column : 0);
        copies.copy(stage + stage_offset<ACROSS>(row, chunk), at, present);
    }
}

// [16, 16] of an operand, m from row `m` and k from `k` of the stage, as four 8 x 8 matrices (m, k):
// HIGH_FIRST: (0, 0) (8, 0) (0, 8) (8, 8), which is A's order; else (0, 0) (0, 8) (8, 0) (8, 8), two of B.
template <bool ACROSS, bool HIGH_FIRST, typename Half>
__device__ inline void load_fragment(std::uint32_t (&to)[4], const Half* stage, int m, int k) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int fast = lane / 8 % 2 * 8, slow = lane / 16 * 8;
    m += HIGH_FIRST ? fast : slow;
    k += HIGH_FIRST ? slow : fast;
    if constexpr (ACROSS) {
        load_matrices_transposed(to, stage + stage_offset<true>(k + lane % 8, m / 8));
    } else {
        load_matrices(to, stage + stage_offset<false>(m + lane % 8, k / 8));
    }
}

// One stage's share of the sum.
template <bool ACROSS_A, bool ACROSS_B, typename Half>
__device__ inline void multiply_stage(Accumulators& acc, const Half* a, const Half* b) {
    LOGITLESS_UNROLL
    for (int k = 0; k < DEPTH; k += 16) {
        std::uint32_t left[WARP_TILE / 16][4], right[WARP_TILE / 16][4];
        LOGITLESS_UNROLL
        for (int i = 0; i < WARP_TILE / 16; ++i) {
            load_fragment<ACROSS_A, true>(left[i], a, warp_row() + 16 * i, k);
            load_fragment<ACROSS_B, false>(right[i], b, warp_column() + 16 * i, k);
        }
        LOGITLESS_UNROLL
        for (int i = 0; i < WARP_TILE / 16; ++i)
            LOGITLESS_UNROLL
            for (int j = 0; j < WARP_TILE / 8; ++j) {
                multiply_add(acc.at[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], Half{});
            }
    }
}

__device__ inline void clear(Accumulators& acc) {
    LOGITLESS_UNROLL
    for (int i = 0; i < WARP_TILE / 16; ++i)
        LOGITLESS_UNROLL
        for (int j = 0; j < WARP_TILE / 8; ++j)
            LOGITLESS_UNROLL
            for (int v = 0; v < 4; ++v) acc.at[i][j][v] = 0.0f;
}

// Adds the tile at (first_a, first_b), k over [0, depth). `shared` is free for other use afterwards, on all threads.
template <bool ACROSS_A, bool ACROSS_B, typename Half, int STAGES, bool GATHERED_A, bool GATHERED_B>
__device__ inline void multiply_tile(Accumulators& acc, Stages<Half, STAGES>& shared,
                                     const Matrix<Half, GATHERED_A>& a, std::int64_t first_a,
                                     const Matrix<Half, GATHERED_B>& b, std::int64_t first_b, std::int64_t depth) {
    Copies copies;
    const int steps = static_cast<int>((depth + DEPTH - 1) / DEPTH);
    const auto start = [&](int step) {
        if (step < steps) {
            const std::int64_t k = static_cast<std::int64_t>(step) * DEPTH;
            copy_stage<ACROSS_A>(copies, shared.a[step % STAGES], a, first_a, k);
            copy_stage<ACROSS_B>(copies, shared.b[step % STAGES], b, first_b, k);
        }
        copies.commit();  // an empty group at the end keeps the count
    };
    for (int step = 0; step < STAGES - 1; ++step) start(step);
    for (int step = 0; step < steps; ++step) {
        copies.template wait<STAGES - 2>();
        __syncthreads();  // this stage has come, and everyone is done with the one that is filled next
        start(step + STAGES - 1);
        multiply_stage<ACROSS_A, ACROSS_B>(acc, shared.a[step % STAGES], shared.b[step % STAGES]);
    }
    copies.template wait<0>();
    __syncthreads();
}

}  // namespace logitless
