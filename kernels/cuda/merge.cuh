// Statistics from the moments of parts of the vocabulary, by equation 4.
//
// A block has 32 rows: neighbouring lanes have neighbouring rows, and the 32 warps take the parts in turn, a few at a
// time. For few rows there are few blocks, and these wait for memory.
// Traffic: reads (2 parts + 1) n or (5 parts + 1) n numbers, writes n of each result.
#pragma once

#include <cstdint>

#include "partials.cuh"

namespace logitless {

constexpr int MERGE_WARPS = 32;

// Block (WARP, MERGE_WARPS), grid rows / WARP. block_lse [rows, parts], or null.
template <typename T>
__global__ void __launch_bounds__(WARP* MERGE_WARPS)
    merge_kernel(PartialMoments<T> from, std::int64_t vocabulary, Results<T> to, T* block_lse, std::int64_t stride) {
    constexpr int AT_ONCE = 16 / static_cast<int>(sizeof(T));
    LOGITLESS_SHARED(Moments<T>, of_warps, WARP* MERGE_WARPS);
    const unsigned lane = threadIdx.x, warp = threadIdx.y;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * WARP + lane;
    const std::int64_t parts = row < from.rows ? from.parts : 0;
    Moments<T> others = no_columns<T>();
    for (std::int64_t first = warp; first < parts; first += MERGE_WARPS * AT_ONCE) {
        Moments<T> found[AT_ONCE];
        for (int k = 0; k < AT_ONCE; ++k) {
            const std::int64_t part = first + k * MERGE_WARPS;
            found[k] = part < parts ? read(from, part, row) : no_columns<T>();
        }
        for (int k = 0; k < AT_ONCE; ++k) {
            const std::int64_t part = first + k * MERGE_WARPS;
            if (block_lse && part < parts) block_lse[row * stride + part] = log_sum_exp(found[k]);
            others = merge(others, found[k]);
        }
    }
    of_warps[warp * WARP + lane] = others;
    __syncthreads();
    if (warp > 0 || row >= from.rows) return;
    for (int other = 1; other < MERGE_WARPS; ++other) others = merge(others, of_warps[other * WARP + lane]);
    write(to, row, finish(others, from.target_logit[row], vocabulary));
}

}  // namespace logitless
