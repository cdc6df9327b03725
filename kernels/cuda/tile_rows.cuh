// What the epilogue of a fused forward does with a row of its tile, on Ampere and Hopper alike: equations 1 and 3.
//
// Both instruction sets leave a row of the tile to a quad, four neighbouring lanes: of every 8 columns, lane q of the
// quad holds 2 q and 2 q + 1. So n values of a thread are the quad's 4 n columns, and quad_column says which.
//
// Work for each logit: one exponential, and some 14 other instructions without a softcap.
#pragma once

#include "mma.cuh"
#include "partials.cuh"

namespace logitless {

// What turns raw products into logits, and where they end.
struct RowHead {
    const float* bias;  // [vocabulary] or null
    Transform<float> transform;
    std::int64_t vocabulary;
    const std::int64_t* targets;  // [rows]
};

__device__ inline int quad_column(int j) { return j / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + j % 2; }

// Of the quad's 4 n columns from `first` on, how many there are; not above 0 beyond the last.
template <int n>
__device__ inline int columns_left(std::int64_t vocabulary, std::int64_t first) {
    const std::int64_t left = vocabulary - first;
    return left < 4 * n ? static_cast<int>(left) : 4 * n;
}

// Adds the bias, which may be null, to a row's raw products from column `first` on, `end` of them.
template <int n>
__device__ inline void add_bias(float (&s)[n], const float* bias, std::int64_t first, int end) {
    if (bias == nullptr) return;
    LOGITLESS_UNROLL
    for (int j = 0; j < n; ++j)
        if (quad_column(j) < end) s[j] += bias[first + quad_column(j)];
}

// Equation 1 of a row's raw products, `end` columns of it. What a head does not have is stepped over once a row, not
// once a logit: unrolled, the code for a softcap is long.
template <int n>
__device__ inline void add_bias_and_transform(float (&s)[n], std::int64_t first, int end, const RowHead& head) {
    add_bias(s, head.bias, first, end);
    if (head.transform.outer == 0.0f) {
        const Transform<float> uncapped = {head.transform.slope, 0.0f, 0.0f};
        LOGITLESS_UNROLL
        for (int j = 0; j < n; ++j) s[j] = transform(uncapped, s[j]);
    } else {
        LOGITLESS_UNROLL
        for (int j = 0; j < n; ++j) s[j] = transform(head.transform, s[j]);
    }
}

// Moments of the raw products `s` of a row but its target's, the same on all lanes of the quad, whose first column is
// `first`. Writes the target's logit where the target is among them. All lanes of a warp come here together, with rows
// beyond the last too.
template <int n>
__device__ inline Moments<float> reduce_row(float (&s)[n], std::int64_t first, std::int64_t row, const RowHead& head,
                                            const PartialMoments<float>& to) {
    const int end = columns_left<n>(head.vocabulary, first);
    const std::int64_t target = row < to.rows ? head.targets[row] - first : -1;
    const int own = target >= 0 && target < end ? static_cast<int>(target) : -1;
    add_bias_and_transform(s, first, end, head);
    float total = 0.0f;
    LOGITLESS_UNROLL
    for (int j = 0; j < n; ++j) {
        const int column = quad_column(j);
        if (column == own) to.target_logit[row] = s[j];
        const bool counts = column < end && column != own;
        total += counts ? s[j] : 0.0f;
        s[j] = counts ? s[j] : minus_infinity<float>();
    }
    Moments<float> found = all_columns(s);
    found.total = total;
    return merge_lanes(found, 4);
}

}  // namespace logitless
