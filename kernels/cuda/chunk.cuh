// Row operations on a chunk of raw products that a GEMM left in memory: statistics in one read, gradients in place.
//
// A team of warps has a row, or a part of one. The team is one warp if rows are short, else a whole thread block. In a
// step a warp takes GROUP neighbouring columns, as UNROLL accesses of WIDTH columns by each lane. The warps of a team
// take groups in turn.
//
//     measure_kernel    reads n V elements (and V of the bias per row, from L2), writes n (+ n V / B of block_lse)
//     gradient_kernel   reads n V elements, writes n V of the gradient's type
//
// kernels/cuda/README.md: traffic, instructions and numerics.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../rows.h"
#include "partials.cuh"
#include "platform.cuh"

namespace logitless {

// Threads of the block of a long row.
constexpr int LONG_ROW_THREADS = 256;
// Such blocks on a multiprocessor: as many as registers allow without a spill. Four have 64 KB of loads under way. Out
// is the type that a kernel writes for each column, or void.
template <typename Raw, typename Out>
constexpr int BLOCKS_AT_ONCE = std::is_same_v<Raw, double> ? 2 : std::is_same_v<Out, float> ? 3 : 4;

// A chunk and its head. T is the type of the arithmetic.
template <typename Raw>
struct Chunk {
    using T = Compute<Raw>;
    Raw* raw;  // [rows, vocabulary]
    std::int64_t rows, vocabulary, stride;
    const T* bias;                // [vocabulary] or null
    const std::int64_t* targets;  // [rows]
    Transform<T> transform;
};

// log of the sum of e^z over the columns of `lanes` neighbouring lanes: two exchanges a step instead of five.
template <typename T>
__device__ inline T lse_of_lanes(const Moments<T>& mine, int lanes) {
    T top = mine.max;
    for (int step = 1; step < lanes; step *= 2) top = std::fmax(top, __shfl_xor_sync(FULL_WARP, top, step));
    T sum = mine.max == minus_infinity<T>() ? mine.sum : mine.sum * fast_exp(mine.max - top);
    for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    return log_sum_exp(Moments<T>{top, sum, T(0), T(0), T(0)});
}

// Of a group of columns in a row, a lane's: UNROLL accesses of WIDTH columns, a warp's width apart.
template <int WIDTH, int UNROLL>
struct Group {
    static constexpr int COUNT = WIDTH * UNROLL;         // columns of a lane
    static constexpr int STEP = WARP * WIDTH;            // between its accesses
    static constexpr int COLUMNS = STEP * UNROLL;        // of the warp
    static constexpr int REACH = COLUMNS - STEP + WIDTH;  // from a lane's first column to the end of its last access

    __device__ static int offset(int i) { return i / WIDTH * STEP + i % WIDTH; }
};

template <typename Raw>
__device__ inline Compute<Raw> raw_product(const Chunk<Raw>& chunk, std::int64_t row, std::int64_t column) {
    const Compute<Raw> product = widen(chunk.raw[row * chunk.stride + column]);
    return chunk.bias ? product + chunk.bias[column] : product;
}

// Raw products with their bias, of a lane's columns from `first`, all of them there.
template <int WIDTH, int UNROLL, typename Raw>
__device__ inline void load(Compute<Raw> (&s)[WIDTH * UNROLL], const Chunk<Raw>& chunk, std::int64_t row,
                            std::int64_t first) {
    using T = Compute<Raw>;
    constexpr int STEP = Group<WIDTH, UNROLL>::STEP;
    constexpr int BIAS_WIDTH = WIDTH < VECTOR_WIDTH<T> ? WIDTH : VECTOR_WIDTH<T>;
    const Raw* const place = chunk.raw + row * chunk.stride + first;
    Vector<Raw, WIDTH> found[UNROLL];  // all on their way before the first is used
    for (int u = 0; u < UNROLL; ++u) found[u] = *reinterpret_cast<const Vector<Raw, WIDTH>*>(place + u * STEP);
    for (int i = 0; i < WIDTH * UNROLL; ++i) s[i] = widen(found[i / WIDTH].at[i % WIDTH]);
    if (chunk.bias == nullptr) return;
    for (int i = 0; i < WIDTH * UNROLL; i += BIAS_WIDTH) {
        const T* const bias = chunk.bias + first + Group<WIDTH, UNROLL>::offset(i);
        const auto part = *reinterpret_cast<const Vector<T, BIAS_WIDTH>*>(bias);
        for (int k = 0; k < BIAS_WIDTH; ++k) s[i + k] += part.at[k];
    }
}

// Eq. 3 of WIDTH neighbouring columns, those from `end` on and the target left out. The last column stands in for those
// beyond it, so that no load waits for a branch or another load.
template <int WIDTH, typename Raw>
__device__ inline Moments<Compute<Raw>> some_moments(const Chunk<Raw>& chunk, std::int64_t row, std::int64_t first,
                                                     std::int64_t end, std::int64_t target) {
    using T = Compute<Raw>;
    T s[WIDTH], z[WIDTH], total = T(0);
    Logit<T> logits[WIDTH];
    for (int k = 0; k < WIDTH; ++k) s[k] = raw_product(chunk, row, first + k < end ? first + k : end - 1);
    make_logits(logits, chunk.transform, s);
    for (int k = 0; k < WIDTH; ++k) {
        const bool counts = first + k < end && first + k != target;
        total += counts ? logits[k].z : T(0);
        z[k] = counts ? logits[k].z : minus_infinity<T>();
    }
    Moments<T> found = all_columns(z);
    found.total = total;
    return found;
}

// Eq. 3 of a lane's columns of a group, those from `end` on and the target left out.
template <int WIDTH, int UNROLL, typename Raw>
__device__ inline Moments<Compute<Raw>> group_moments(const Chunk<Raw>& chunk, std::int64_t row, std::int64_t first,
                                                      std::int64_t end, std::int64_t target) {
    using T = Compute<Raw>;
    using Columns = Group<WIDTH, UNROLL>;
    if (first + Columns::REACH <= end && (target < first || target >= first + Columns::REACH)) {
        T s[Columns::COUNT], z[Columns::COUNT];
        Logit<T> logits[Columns::COUNT];
        load<WIDTH, UNROLL>(s, chunk, row, first);
        make_logits(logits, chunk.transform, s);
        for (int i = 0; i < Columns::COUNT; ++i) z[i] = logits[i].z;
        return all_columns(z);
    }
    constexpr int AT_ONCE = WIDTH < 4 ? WIDTH : 4;  // more would not fit into the registers
    Moments<T> found = no_columns<T>();
    for (int i = 0; i < Columns::COUNT; i += AT_ONCE)
        found = merge(found, some_moments<AT_ONCE>(chunk, row, first + Columns::offset(i), end, target));
    return found;
}

// A team's row, and its part of the vocabulary.
struct Place {
    int lane, warp, warps;
    std::int64_t row, begin, end;
};

__device__ inline Place place_of_team(std::int64_t vocabulary, std::int64_t part_columns) {
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t begin = blockIdx.y * part_columns;
    return {
        thread % WARP,
        thread / WARP,
        static_cast<int>(blockDim.x) / WARP,
        static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y,
        begin,
        vocabulary - begin < part_columns ? vocabulary : begin + part_columns,
    };
}

// logsumexp of blocks of 2^shift columns, at least a warp's width; no `lse` for none.
template <typename T>
struct BlockLse {
    T* lse;  // [rows, blocks]
    std::int64_t stride;
    int shift;
};

// Block (WARP * warps, teams), grid (rows / teams, parts); more than one warp in a team: one team.
template <typename Raw, int WIDTH, int UNROLL>
__global__ void __launch_bounds__(LONG_ROW_THREADS, BLOCKS_AT_ONCE<Raw, void>)
    measure_kernel(Chunk<Raw> chunk, Results<Compute<Raw>> to, PartialMoments<Compute<Raw>> partials,
                   BlockLse<Compute<Raw>> blocks, std::int64_t part_columns) {
    using T = Compute<Raw>;
    using Columns = Group<WIDTH, UNROLL>;
    LOGITLESS_SHARED(Moments<T>, of_warps, WARP);
    const Place at = place_of_team(chunk.vocabulary, part_columns);
    if (at.row >= chunk.rows) return;  // a team of one warp, which meets nobody below
    const std::int64_t target = chunk.targets[at.row];
    const std::int64_t block_columns = std::int64_t(1) << blocks.shift;
    const std::int64_t span = blocks.lse && block_columns > Columns::COLUMNS ? block_columns : Columns::COLUMNS;

    Moments<T> others = no_columns<T>();
    for (std::int64_t start = at.begin + at.warp * span; start < at.end; start += at.warps * span) {
        const std::int64_t first = start + at.lane * WIDTH;
        Moments<T> found = group_moments<WIDTH, UNROLL>(chunk, at.row, first, at.end, target);
        for (std::int64_t more = Columns::COLUMNS; more < span; more += Columns::COLUMNS)
            found = merge(found, group_moments<WIDTH, UNROLL>(chunk, at.row, first + more, at.end, target));
        if (blocks.lse) {
            const int lanes = block_columns / WIDTH < WARP ? static_cast<int>(block_columns / WIDTH) : WARP;
            const T lse = lse_of_lanes(found, lanes);
            T* const place = blocks.lse + at.row * blocks.stride + (first >> blocks.shift);
            if (at.lane % lanes == 0 && first < at.end) *place = lse;
        }
        others = merge(others, found);
    }

    others = merge_lanes(others, WARP);
    if (at.warps > 1) {
        if (at.lane == 0) of_warps[at.warp] = others;
        __syncthreads();
        if (at.warp > 0) return;
        others = merge_lanes(at.lane < at.warps ? of_warps[at.lane] : no_columns<T>(), WARP);
    }
    if (at.lane > 0) return;
    const T own = transform(chunk.transform, raw_product(chunk, at.row, target));
    if (partials.moments == nullptr) {
        write(to, at.row, finish(others, own, chunk.vocabulary));
    } else {
        write(partials, blockIdx.y, at.row, others);
        if (blockIdx.y == 0) partials.target_logit[at.row] = own;
    }
}

// What gradient_kernel reads of a row; [rows], null for zero.
template <typename T>
struct RowInputs {
    const T *logprob, *lse, *entropy;
    const T *logprob_gradient, *lse_gradient, *entropy_gradient, *mean_logit_gradient;
};

template <typename T>
__device__ inline T value_or_zero(const T* from, std::int64_t row) {
    return from ? from[row] : T(0);
}

// Out is Raw, or narrower: then a row's gradient fills the first half of the row's memory, over columns that were read
// in this step or before it, which a barrier makes sure of; the row is one team's. Block and grid as above.
template <typename Raw, typename Out, int WIDTH, int UNROLL>
__global__ void __launch_bounds__(LONG_ROW_THREADS, BLOCKS_AT_ONCE<Raw, Out>)
    gradient_kernel(Chunk<Raw> chunk, RowInputs<Compute<Raw>> from, Compute<Raw>* target_to,
                    std::int64_t part_columns) {
    using T = Compute<Raw>;
    using Columns = Group<WIDTH, UNROLL>;
    const Place at = place_of_team(chunk.vocabulary, part_columns);
    if (at.row >= chunk.rows) return;
    const std::int64_t target = chunk.targets[at.row];
    const Upstream<T> g = {
        value_or_zero(from.logprob_gradient, at.row),
        value_or_zero(from.lse_gradient, at.row),
        value_or_zero(from.entropy_gradient, at.row),
        value_or_zero(from.mean_logit_gradient, at.row),
    };
    const RowStatistics<T> row = {from.logprob[at.row], from.lse[at.row], value_or_zero(from.entropy, at.row),
                                  T(0), T(0), T(0)};
    Out* const out = reinterpret_cast<Out*>(chunk.raw + at.row * chunk.stride);

    for (std::int64_t start = at.begin; start < at.end; start += at.warps * Columns::COLUMNS) {
        const std::int64_t first = start + at.warp * Columns::COLUMNS + at.lane * WIDTH;
        const bool whole = first + Columns::REACH <= at.end;
        T s[Columns::COUNT], ds[Columns::COUNT];
        Logit<T> logits[Columns::COUNT];
        if (whole) {
            load<WIDTH, UNROLL>(s, chunk, at.row, first);
        } else {
            for (int i = 0; i < Columns::COUNT; ++i) {
                const std::int64_t column = first + Columns::offset(i);
                s[i] = column < at.end ? raw_product(chunk, at.row, column) : T(0);
            }
        }
        make_logits(logits, chunk.transform, s);
        for (int i = 0; i < Columns::COUNT; ++i) ds[i] = raw_gradient(g, row, logits[i], chunk.vocabulary);
        if (target >= first && target < first + Columns::REACH) {
            for (int i = 0; i < Columns::COUNT; ++i) {
                if (first + Columns::offset(i) != target) continue;
                ds[i] = T(0);
                target_to[at.row] = target_gradient(g, row, chunk.vocabulary) * logits[i].derivative;
            }
        }
        if (sizeof(Out) < sizeof(Raw)) {
            if (at.warps > 1)
                __syncthreads();
            else
                __syncwarp();
        }
        if (whole) {
            for (int u = 0; u < UNROLL; ++u) {
                Vector<Out, WIDTH> made;
                for (int k = 0; k < WIDTH; ++k) made.at[k] = narrow<Out>(ds[u * WIDTH + k]);
                *reinterpret_cast<Vector<Out, WIDTH>*>(out + first + u * Columns::STEP) = made;
            }
        } else {
            for (int i = 0; i < Columns::COUNT; ++i) {
                const std::int64_t column = first + Columns::offset(i);
                if (column < at.end) out[column] = narrow<Out>(ds[i]);
            }
        }
    }
}

}  // namespace logitless
