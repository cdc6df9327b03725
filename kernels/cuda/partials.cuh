// The memory of a row's statistics, and of the moments of parts of the vocabulary from which they are made.
#pragma once

#include <cstdint>

#include "../rows.h"
#include "platform.cuh"

namespace logitless {

// [rows] or null each.
template <typename T>
struct Results {
    T *logprob, *lse, *entropy, *mean_logit, *correct, *log_sum_sq;
};

template <typename T>
__device__ inline void write(const Results<T>& to, std::int64_t row, const RowStatistics<T>& found) {
    if (to.logprob) to.logprob[row] = found.logprob;
    if (to.lse) to.lse[row] = found.lse;
    if (to.entropy) to.entropy[row] = found.entropy;
    if (to.mean_logit) to.mean_logit[row] = found.mean_logit;
    if (to.correct) to.correct[row] = found.correct;
    if (to.log_sum_sq) to.log_sum_sq[row] = found.log_sum_sq;
}

// How many of the moments are kept, in the order of rows.h: max and sum, which are enough for logprob, lse, correct
// and the blocks' logsumexps, or all.
constexpr int FEWEST_MOMENTS = 2, ALL_MOMENTS = 5;

// Moments of parts of the vocabulary, the layout that logitless_merge takes.
template <typename T>
struct PartialMoments {
    T* moments;       // [parts, count, rows]
    T* target_logit;  // [rows]
    std::int64_t parts, rows;
    std::int32_t count;  // FEWEST_MOMENTS or ALL_MOMENTS
};

template <typename T>
__device__ inline void write(const PartialMoments<T>& to, std::int64_t part, std::int64_t row,
                             const Moments<T>& found) {
    T* const place = to.moments + part * to.count * to.rows + row;
    place[0] = found.max;
    place[to.rows] = found.sum;
    if (to.count == FEWEST_MOMENTS) return;
    place[2 * to.rows] = found.shifted;
    place[3 * to.rows] = found.squares;
    place[4 * to.rows] = found.total;
}

// Zeros for the moments that were not kept.
template <typename T>
__device__ inline Moments<T> read(const PartialMoments<T>& from, std::int64_t part, std::int64_t row) {
    const T* const place = from.moments + part * from.count * from.rows + row;
    const std::int64_t n = from.rows;
    if (from.count == FEWEST_MOMENTS) return {place[0], place[n], T(0), T(0), T(0)};
    return {place[0], place[n], place[2 * n], place[3 * n], place[4 * n]};
}

// The same moments on `lanes` neighbouring lanes, a power of two.
template <typename T>
__device__ inline Moments<T> merge_lanes(Moments<T> mine, int lanes) {
    for (int step = 1; step < lanes; step *= 2) {
        const Moments<T> theirs = {
            __shfl_xor_sync(FULL_WARP, mine.max, step),     __shfl_xor_sync(FULL_WARP, mine.sum, step),
            __shfl_xor_sync(FULL_WARP, mine.shifted, step), __shfl_xor_sync(FULL_WARP, mine.squares, step),
            __shfl_xor_sync(FULL_WARP, mine.total, step),
        };
        mine = merge(mine, theirs);
    }
    return mine;
}

}  // namespace logitless
