// The epilogue of a fused forward on a row of its tile, for Ampere and Hopper alike: equations 1 and 3, and a store of
// the raw products if they are asked for.
//
// Both instruction sets leave a row of the tile to a quad, which is four neighbouring lanes. Of every 8 columns, lane q
// of the quad holds 2 q and 2 q + 1. So n values of a thread belong to the quad's 4 n columns, and quad_column says
// which.
//
// Instructions for each logit, without bias and softcap:
//     an exponential, a multiply-add before it, the maximum, the sum, and 1.5 to 3 of the row's
//     4 more                 if all moments are asked for
//     half a store           for the raw product
//     7 more                 to leave columns out, in a part of the vocabulary that is cut short or that holds the
//                            target of one of the warp's rows
#pragma once

#include "mma.cuh"
#include "partials.cuh"

namespace logitless {

constexpr int PART_COLUMNS = 128;  // of a part of the vocabulary, of which a forward keeps moments

// The head of a row: how raw products become logits, and how many there are.
struct RowHead {
    const float* bias;  // [vocabulary] or null
    Transform<float> transform;
    float slope, rate;  // a logit, and its exponent to base 2, over what `bend` leaves of a raw product
    std::int64_t vocabulary;
    const std::int64_t* targets;  // [rows]
};

// The results of a forward.
struct RowResults {
    PartialMoments<float> partials;
    float* raw;  // [rows, vocabulary], or null: the products before bias and transform
    std::int64_t raw_stride;
    bool raw_in_pairs;  // two columns can be stored at once

    __device__ bool holds(std::int64_t row) const { return row < partials.rows; }
    __device__ int target(const RowHead& head, std::int64_t row) const {
        return holds(row) ? static_cast<int>(head.targets[row]) : -1;
    }
};

// From the thread's first column on, and from the quad's.
constexpr int lane_column(int j) { return j / 2 * 8 + j % 2; }
__device__ inline int first_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }
__device__ inline int quad_column(int j) { return first_column() + lane_column(j); }

// Of the quad's 4 n columns from `first` on, how many there are; not above 0 beyond the last.
template <int n>
__device__ inline int columns_left(std::int64_t vocabulary, std::int64_t first) {
    const std::int64_t left = vocabulary - first;
    return left < 4 * n ? static_cast<int>(left) : 4 * n;
}

// Stores a row's raw products from column `first` on, `end` of them.
template <int n>
__device__ inline void store_raw(const float (&s)[n], std::int64_t first, int end, std::int64_t row,
                                 const RowResults& to) {
    float* const place = to.raw + row * to.raw_stride + first + first_column();
    if (to.raw_in_pairs && end == 4 * n) {
        LOGITLESS_UNROLL
        for (int j = 0; j < n; j += 2)
            *reinterpret_cast<Vector<float, 2>*>(place + lane_column(j)) = {{s[j], s[j + 1]}};
    } else {
        LOGITLESS_UNROLL
        for (int j = 0; j < n; ++j)
            if (quad_column(j) < end) place[lane_column(j)] = s[j];
    }
}

// Adds the bias, which may be null, to a row's raw products from column `first` on, `end` of them.
template <int n>
__device__ inline void add_bias(float (&s)[n], const float* bias, std::int64_t first, int end) {
    if (bias == nullptr) return;
    const float* const place = bias + first + first_column();
    LOGITLESS_UNROLL
    for (int j = 0; j < n; ++j)
        if (quad_column(j) < end) s[j] += place[lane_column(j)];
}

// The part of equation 1 that is no multiplication. A head without a softcap is stepped over once a row, not once a
// logit: unrolled, the code is long.
template <int n>
__device__ inline void bend(float (&s)[n], const Transform<float>& transform_) {
    if (transform_.outer == 0.0f) return;
    LOGITLESS_UNROLL
    for (int j = 0; j < n; ++j) s[j] = transform(transform_, s[j]);
}

// Makes the columns from `end` on and column `own`, the target's, ones that count nothing; the sum of the others. Both are
// counted from the thread's first column. `target` becomes the target's value on the lane that has it.
template <int n>
__device__ inline float leave_out(float (&s)[n], int end, int own, float& target) {
    float total = 0.0f;
    LOGITLESS_UNROLL
    for (int j = 0; j < n; ++j) {
        if (lane_column(j) == own) target = s[j];
        const bool counts = lane_column(j) < end && lane_column(j) != own;
        total += counts ? s[j] : 0.0f;
        s[j] = counts ? s[j] : minus_infinity<float>();
    }
    return total;
}

__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// fmax drops a NaN. Four chains, as one would wait for itself.
template <int n>
__device__ inline float quad_max(const float (&s)[n]) {
    float top[4] = {s[0], s[1], s[2], s[3]};
    LOGITLESS_UNROLL
    for (int j = 4; j < n; ++j) top[j % 4] = std::fmax(top[j % 4], s[j]);
    float x = std::fmax(std::fmax(top[0], top[1]), std::fmax(top[2], top[3]));
    x = std::fmax(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return std::fmax(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

// Moments of a quad's values, the same on its lanes; `total` is this lane's sum of them. Without ALL: max and sum.
//
// One fused multiply-add makes an exponent of 2 of a value: x = s rate - top rate, which is rounded once, but for the
// second product. That one's rounding, `drift`, is the same in all exponents, and the sums are freed of it to first order.
// So a term is as precise as fast_exp says, however large the logits.
template <bool ALL, int n>
__device__ inline Moments<float> quad_moments(const float (&s)[n], float slope, float rate, float total) {
    constexpr float LN_2 = 0.693147180559945309417f;
    constexpr float UNDERFLOW = -200.0f;  // e is 0 long before; -inf times 0 has no value
    const float top = quad_max(s);
    const float base = top == minus_infinity<float>() ? 0.0f : top, shift = base * rate;
    float sum[2] = {0.0f, 0.0f}, shifted = 0.0f, squares = 0.0f;
    LOGITLESS_UNROLL
    for (int j = 0; j < n; ++j) {
        const float x = std::fma(s[j], rate, -shift), e = fast_exp2(x);
        sum[j % 2] += e;
        if (!ALL) continue;
        shifted = std::fma(e, std::fmax(x, UNDERFLOW), shifted);
        squares = std::fma(e, e, squares);
    }
    const float drift = std::fma(base, rate, -shift), mend = 1.0f - drift * LN_2;
    const float drifted = quad_sum(sum[0] + sum[1]);
    Moments<float> found = {top * slope, drifted * mend, 0.0f, 0.0f, 0.0f};
    if (!ALL) return found;
    found.shifted = (quad_sum(shifted) - drift * drifted) * (LN_2 * mend);
    found.squares = quad_sum(squares) * (mend * mend);
    found.total = quad_sum(total) * slope;
    return found;
}

// Makes of a row's raw products from column `first` on what quad_moments takes, and returns this lane's sum of it. `target`
// is the row's, -1 for none. Writes the target's logit where the target is among them, and the raw products.
template <int n>
__device__ inline float prepare_row(float (&s)[n], std::int64_t first, std::int64_t row, int target,
                                    const RowHead& head, const RowResults& to) {
    const int end = columns_left<n>(head.vocabulary, first);
    const int from_first = target - static_cast<int>(first);
    const int own = target >= 0 && from_first >= 0 && from_first < end ? from_first : -1;
    if (to.raw != nullptr && to.holds(row)) store_raw(s, first, end, row, to);
    add_bias(s, head.bias, first, end);
    bend(s, head.transform);
    if (end < 4 * n || own >= 0) {
        float target_value = 0.0f;
        const float total = leave_out(s, end - first_column(), own - first_column(), target_value);
        if (own >= 0 && own % 8 / 2 * 2 == first_column()) to.partials.target_logit[row] = target_value * head.slope;
        return total;
    }
    float total = 0.0f;
    if (to.partials.count == ALL_MOMENTS) {
        LOGITLESS_UNROLL
        for (int j = 0; j < n; ++j) total += s[j];
    }
    return total;
}

// Moments of the raw products `s` of a row but its target's, the same on all lanes of the quad. All lanes of a warp come
// here together, with rows beyond the last too.
template <int n>
__device__ inline Moments<float> reduce_row(float (&s)[n], std::int64_t first, std::int64_t row, int target,
                                            const RowHead& head, const RowResults& to) {
    const float total = prepare_row(s, first, row, target, head, to);
    return to.partials.count == ALL_MOMENTS ? quad_moments<true>(s, head.slope, head.rate, total)
                                            : quad_moments<false>(s, head.slope, head.rate, total);
}

}  // namespace logitless
