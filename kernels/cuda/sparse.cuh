// The products of the tail-corrected backward, over the (token, block of 128 vocabulary entries) pairs that route.cuh
// listed. Row r of the list is one pair; G [listed rows, 128] holds its part of dL/ds, equations 11 and 13, in
// bfloat16.
//
//     sparse_gradient_kernel       logits of a block for its listed tokens, and their gradient         2 R 128 H flops
//     sparse_d_weight_kernel       d_weight[v] += sum_r G[r, v] hidden[token r]                        2 R 128 H
//     sparse_d_hidden_kernel       d_hidden[token r] += sum_v G[r, v] weight[v], by float32 reductions 2 R 128 H
//     ordered_d_hidden_kernel      the same sum in the order of blocks, the same bits every time
//
// for R listed rows. All multiply as tile_gemm.cuh does, with gathered rows of tokens. The target's entry of G is 0,
// and the tail is not in G. Both are added apart (kernels/MATH.md, section 3), and so is the mean logit's part.
//
// A call takes some of the blocks, and G has room for every token in each of these. So G stays small, and the host
// never waits for the device to say how many pairs there are. A grid has at most LISTED_TILES thread blocks along a
// list, however long it is. d_weight and d_hidden accumulate over calls.
//
// Bytes from L2 for each tile of products:
//     sparse_gradient_kernel     256 H in, 32 KB out
//     sparse_d_hidden_kernel     64 KB in, 64 KB of float32 reductions out for 4.2 Mflop: R H 4 bytes of these in all.
//                                At R = 0.15 N V / 128, N = 8192, H = 4096, V = 128256 this is 20 GB, or 10 ms if L2
//                                takes 2 TB/s of them (a prediction).
//     ordered_d_hidden_kernel    writes each element once, but multiplies each block that one of 128 tokens needs for
//                                all of them: 0.57 to 0.81 of a dense GEMM at such an R, on real hidden states
//                                (SmolLM2, tolerance 2^-12). Which of the two is faster has not been measured.
// Registers: 236 to 255, no local memory.
// Not yet run on a GPU. The code is tested on the CPU, where its instructions are emulated.
// Numerics: G is rounded to bfloat16 once (2^-9 of an entry); sums are float32.
#pragma once

#include <cstring>

#include "route.cuh"
#include "tile_gemm.cuh"
#include "tile_rows.cuh"

namespace logitless {

constexpr int BLOCK_COLUMNS = TILE;
// Thread blocks along a list, which may have every token and mostly has a tenth: one that finds nothing takes about a
// microsecond and the place of one that works. Not measured.
constexpr int LISTED_TILES = 8;

// Blocks [first, first + count) of a routed list, of the vocabulary's `vocabulary` columns.
struct Listed {
    const std::int32_t* starts;
    const std::int32_t* tokens;
    std::int64_t rows, vocabulary, first, count;
};

// Rows of the list that belong to a block; `at` is the first one's place in G, where the first block begins at 0.
struct Span {
    std::int64_t first, at, count;
};

__device__ inline Span span_of(const Listed& list, std::int64_t block) {
    const std::int64_t spans = spans_of(list.rows);
    const std::int64_t first = list.starts[block * spans];
    return {first, first - list.starts[list.first * spans], list.starts[(block + 1) * spans] - first};
}

// Of the vectors [rows] that the gradient needs, those that may be null mean zero.
struct SparseRows {
    const std::int64_t* targets;
    const float *lse, *entropy;
    const float *logprob_gradient, *lse_gradient, *entropy_gradient;
};

struct SparseGradient {
    Matrix<bfloat16> hidden, weight;
    const float* bias;
    Transform<float> transform;
    SparseRows row;
    Listed list;
    bfloat16* gradient;  // [rows count, 128]
};

__device__ inline float value_or_zero(const float* vector, std::int64_t at) {
    return vector == nullptr ? 0.0f : vector[at];
}

// The part of Matrix `whole` that a block's rows are: gathered tokens, or columns of the vocabulary.
__device__ inline Matrix<bfloat16, true> listed_tokens(const Matrix<bfloat16>& hidden, const Listed& list,
                                                       const Span& span) {
    return {hidden.base, hidden.stride, span.count, hidden.columns, list.tokens + span.first};
}

__device__ inline Matrix<bfloat16> block_rows(const Matrix<bfloat16>& weight, std::int64_t block) {
    const std::int64_t first = block * BLOCK_COLUMNS, left = weight.rows - first;
    const std::int64_t rows = left < BLOCK_COLUMNS ? left : BLOCK_COLUMNS;
    return {weight.base + first * weight.stride, weight.stride, rows, weight.columns, nullptr};
}

__device__ inline Matrix<bfloat16> gradient_rows(const bfloat16* gradient, const Span& span) {
    return {gradient + span.at * BLOCK_COLUMNS, BLOCK_COLUMNS, span.count, BLOCK_COLUMNS, nullptr};
}

// Row and column in the tile of this thread's accumulators at[i][j][2 high] and the next.
__device__ inline int own_row(int i, int high) {
    return warp_row() + 16 * i + 8 * high + static_cast<int>(threadIdx.x) % 32 / 4;
}
__device__ inline int own_column(int j) { return warp_column() + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2; }

// dL/ds of a row's raw products `s`, which are the quad's 4 n columns from `first` on, in their place; 0 for the target
// and beyond the last column.
template <int n>
__device__ inline void make_gradient(float (&s)[n], const SparseGradient& x, std::int64_t first, std::int64_t token) {
    const Upstream<float> g{value_or_zero(x.row.logprob_gradient, token), value_or_zero(x.row.lse_gradient, token),
                            value_or_zero(x.row.entropy_gradient, token), 0.0f};
    const RowStatistics<float> row{0.0f, x.row.lse[token], value_or_zero(x.row.entropy, token), 0.0f, 0.0f, 0.0f};
    const int end = columns_left<n>(x.weight.rows, first);
    const std::int64_t target = x.row.targets[token] - first;
    Logit<float> logits[n];
    add_bias(s, x.bias, first, end);
    make_logits(logits, x.transform, s);
    LOGITLESS_UNROLL
    for (int j = 0; j < n; ++j) s[j] = raw_gradient(g, row, logits[j], 1);  // 1: there is no mean logit to divide by it
    LOGITLESS_UNROLL
    for (int j = 0; j < n; ++j) s[j] = quad_column(j) < end && quad_column(j) != target ? s[j] : 0.0f;
}

// Two halves a store, 4 bytes: as a Vector of two, nvcc 13.0 makes two stores of them.
template <int n>
__device__ inline void store_row(bfloat16* to, const float (&s)[n]) {
    LOGITLESS_UNROLL
    for (int j = 0; j < n; j += 2) {
        const bfloat16 pair[2] = {narrow<bfloat16>(s[j]), narrow<bfloat16>(s[j + 1])};
        std::uint32_t both;
        memcpy(&both, pair, sizeof both);
        *reinterpret_cast<std::uint32_t*>(to + quad_column(j)) = both;
    }
}

// Grid: tiles of 128 listed rows, up to LISTED_TILES, from which a thread block goes on by as many; blocks.
__global__ void __launch_bounds__(TILE_THREADS, 2) sparse_gradient_kernel(const SparseGradient x) {
    LOGITLESS_SHARED(Stages<bfloat16>, shared, 1);
    const std::int64_t block = x.list.first + blockIdx.y;
    const Span span = span_of(x.list, block);
    for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * TILE; first < span.count;
         first += static_cast<std::int64_t>(gridDim.x) * TILE) {
        Accumulators acc;
        clear(acc);
        multiply_tile<false, false>(acc, *shared, listed_tokens(x.hidden, x.list, span), first,
                                    block_rows(x.weight, block), 0, x.hidden.columns);
        LOGITLESS_UNROLL
        for (int i = 0; i < WARP_TILE / 16; ++i)
            LOGITLESS_UNROLL
            for (int high = 0; high < 2; ++high) {
                const std::int64_t listed = first + own_row(i, high);
                if (listed >= span.count) continue;
                float s[WARP_TILE / 4];
                LOGITLESS_UNROLL
                for (int j = 0; j < WARP_TILE / 4; ++j) s[j] = acc.at[i][j / 2][2 * high + j % 2];
                make_gradient(s, x, block * BLOCK_COLUMNS + warp_column(), x.list.tokens[span.first + listed]);
                store_row(x.gradient + (span.at + listed) * BLOCK_COLUMNS + warp_column(), s);
            }
    }
}

// Adds the accumulators at[i][..] of one row to `row`, whose columns [first, columns) the tile covers.
__device__ inline void add_pairs(const Accumulators& acc, int i, int high, float* row, std::int64_t first,
                                 std::int64_t columns) {
    LOGITLESS_UNROLL
    for (int j = 0; j < WARP_TILE / 8; ++j) {
        const std::int64_t column = first + own_column(j);
        if (column >= columns) continue;
        auto* const to = reinterpret_cast<Vector<float, 2>*>(row + column);
        const Vector<float, 2> before = *to;
        *to = {{before.at[0] + acc.at[i][j][2 * high], before.at[1] + acc.at[i][j][2 * high + 1]}};
    }
}

struct SparseProduct {
    const bfloat16* gradient;  // [rows count, 128]
    Matrix<bfloat16> operand;  // hidden for d_weight, weight for d_hidden
    Listed list;
    float* out;                // [vocabulary, H] or [rows, H], 16-byte aligned
    std::int64_t out_stride;   // a multiple of 4
};

// Grid: tiles of 128 columns of H; blocks. A thread block has its part of d_weight to itself.
__global__ void __launch_bounds__(TILE_THREADS, 2) sparse_d_weight_kernel(const SparseProduct x) {
    LOGITLESS_SHARED(Stages<bfloat16>, shared, 1);
    const std::int64_t block = x.list.first + blockIdx.y;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * TILE;
    const Span span = span_of(x.list, block);
    if (span.count == 0) return;

    Accumulators acc;
    clear(acc);
    multiply_tile<true, true>(acc, *shared, gradient_rows(x.gradient, span), 0,
                              listed_tokens(x.operand, x.list, span), first, span.count);
    LOGITLESS_UNROLL
    for (int i = 0; i < WARP_TILE / 16; ++i)
        LOGITLESS_UNROLL
        for (int high = 0; high < 2; ++high) {
            const std::int64_t row = block * BLOCK_COLUMNS + own_row(i, high);
            if (row < x.list.vocabulary) add_pairs(acc, i, high, x.out + row * x.out_stride, first, x.operand.columns);
        }
}

// Adds the tile's rows, of the list's tokens from `listed` on, to `out`; the tile's columns are those from `first` on.
// Lanes in pairs hold 4 columns of 2 rows: the even lane takes the upper row whole, the odd one the lower.
__device__ inline void scatter_add(const Accumulators& acc, const SparseProduct& x, const Span& span,
                                   std::int64_t listed, std::int64_t first) {
    const int odd = static_cast<int>(threadIdx.x) % 2;
    LOGITLESS_UNROLL
    for (int i = 0; i < WARP_TILE / 16; ++i) {
        const std::int64_t row = listed + own_row(i, odd);
        const std::int64_t token = row < span.count ? x.list.tokens[span.first + row] : -1;
        LOGITLESS_UNROLL
        for (int j = 0; j < WARP_TILE / 8; ++j) {
            const float(&c)[4] = acc.at[i][j];
            const float first_theirs = __shfl_xor_sync(FULL_WARP, odd ? c[0] : c[2], 1);
            const float second_theirs = __shfl_xor_sync(FULL_WARP, odd ? c[1] : c[3], 1);
            const float four[4] = {odd ? first_theirs : c[0], odd ? second_theirs : c[1],
                                   odd ? c[2] : first_theirs, odd ? c[3] : second_theirs};
            const std::int64_t column = first + own_column(j) - 2 * odd;
            if (token >= 0 && column < x.operand.columns) add_to_global(x.out + token * x.out_stride + column, four);
        }
    }
}

// Grid: tiles of 128 listed rows, as for sparse_gradient_kernel; blocks; tiles of 128 columns of H, which go slowest: 128
// columns of d_hidden and a call's G fit the L2, all of d_hidden does not.
__global__ void __launch_bounds__(TILE_THREADS, 2) sparse_d_hidden_kernel(const SparseProduct x) {
    LOGITLESS_SHARED(Stages<bfloat16>, shared, 1);
    const std::int64_t block = x.list.first + blockIdx.y;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.z) * TILE;
    const Span span = span_of(x.list, block);
    for (std::int64_t listed = static_cast<std::int64_t>(blockIdx.x) * TILE; listed < span.count;
         listed += static_cast<std::int64_t>(gridDim.x) * TILE) {
        Accumulators acc;
        clear(acc);
        multiply_tile<false, true>(acc, *shared, gradient_rows(x.gradient, span), listed, block_rows(x.operand, block),
                                   first, BLOCK_COLUMNS);
        scatter_add(acc, x, span, listed, first);
    }
}

// Grid: tiles of 128 columns of H; spans of 128 tokens. For each block, the listed rows of the span's tokens stand in
// the tile at their tokens' places, zeros elsewhere, so that the sum stays in registers from block to block.
__global__ void __launch_bounds__(TILE_THREADS, 2) ordered_d_hidden_kernel(const SparseProduct x) {
    typedef Stages<bfloat16, 2> TwoStages;  // places needs a little of the 48 KB
    LOGITLESS_SHARED(TwoStages, shared, 1);
    LOGITLESS_SHARED(std::int32_t, places, SPAN);
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * TILE;
    const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.y) * SPAN;
    const std::int64_t spans = spans_of(x.list.rows);
    const std::int32_t origin = x.list.starts[x.list.first * spans];

    Accumulators acc;
    clear(acc);
    for (std::int64_t block = x.list.first; block < x.list.first + x.list.count; ++block) {
        const std::int32_t* const start = x.list.starts + block * spans + blockIdx.y;
        const std::int32_t listed = start[0] + static_cast<std::int32_t>(threadIdx.x);
        if (start[0] == start[1]) continue;
        places[threadIdx.x] = -1;
        __syncthreads();
        if (listed < start[1]) places[x.list.tokens[listed] - first_token] = listed - origin;
        __syncthreads();
        const Matrix<bfloat16, true> scattered{x.gradient, BLOCK_COLUMNS, SPAN, BLOCK_COLUMNS, places};
        multiply_tile<false, true>(acc, *shared, scattered, 0, block_rows(x.operand, block), first, BLOCK_COLUMNS);
    }
    LOGITLESS_UNROLL
    for (int i = 0; i < WARP_TILE / 16; ++i)
        LOGITLESS_UNROLL
        for (int high = 0; high < 2; ++high) {
            const std::int64_t token = first_token + own_row(i, high);
            if (token < x.list.rows) add_pairs(acc, i, high, x.out + token * x.out_stride, first, x.operand.columns);
        }
}

}  // namespace logitless
