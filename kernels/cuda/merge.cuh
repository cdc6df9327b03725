// Statistics from the moments of parts of the vocabulary, by equation 4.
//
// A block has 32 rows, neighbouring lanes neighbouring rows, and its 8 warps take the parts in turn.
// Traffic: reads (2 parts + 1) n or (5 parts + 1) n numbers, writes n of each result.
#pragma once

#include <cstdint>

#include "partials.cuh"

namespace logitless {

constexpr int MERGE_WARPS = 8;

// Block (WARP, MERGE_WARPS), grid rows / WARP. block_lse [rows, parts], or null.
template <typename T>
__global__ void __launch_bounds__(WARP* MERGE_WARPS)
    merge_kernel(PartialMoments<T> from, std::int64_t vocabulary, Results<T> to, T* block_lse, std::int64_t stride) {
    LOGITLESS_SHARED(Moments<T>, of_warps, WARP* MERGE_WARPS);
    const unsigned lane = threadIdx.x, warp = threadIdx.y;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * WARP + lane;
    const std::int64_t parts = row < from.rows ? from.parts : 0;
    Moments<T> others = no_columns<T>();
    for (std::int64_t part = warp; part < parts; part += MERGE_WARPS) {
        const Moments<T> found = read(from, part, row);
        if (block_lse) block_lse[row * stride + part] = log_sum_exp(found);
        others = merge(others, found);
    }
    of_warps[warp * WARP + lane] = others;
    __syncthreads();
    if (warp > 0 || row >= from.rows) return;
    for (int other = 1; other < MERGE_WARPS; ++other) others = merge(others, of_warps[other * WARP + lane]);
    write(to, row, finish(others, from.target_logit[row], vocabulary));
}

}  // namespace logitless
