// The row mathematics of the losses: the steps from one row of raw products to statistics and gradients.
//
//     raw products s_j  --transform-->  z_j  --all_columns, merge-->  Moments of the columns other than the target
//     Moments, z_t      --finish-->     logprob, lse, entropy, log sum p^2, mean logit, correct
//     upstream gradients, z_j  --other_gradient, target_gradient, derivative-->  dL/ds_j
//
// Equation numbers are those of kernels/MATH.md. Each function is for one thread, without memory or communication. So
// nvcc builds this text for the GPU's kernels, and a host compiler builds it for cpu/screen.cpp and for the tests
// (cuda/rows_host.cpp). T is float or double. Logarithms are natural. -inf is a legal logit (a masked vocabulary entry),
// and NaN reaches every result.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LOGITLESS_FUNCTION __host__ __device__ inline
#else
#define LOGITLESS_FUNCTION inline
#endif

namespace logitless {

template <typename T>
LOGITLESS_FUNCTION T minus_infinity() {
    return -T(INFINITY);
}

// ---------------------------------------------------------------------------------------------- logits

// Eq. 1's constants, divided once instead of for every logit.
template <typename T>
struct Transform {
    T slope;  // dz/ds where no cap bends it
    T inner;  // scale / softcap
    T outer;  // softcap / temperature; 0 without a softcap
};

// softcap == 0 means that there is none.
template <typename T>
LOGITLESS_FUNCTION Transform<T> make_transform(T logit_scale, T softcap, T temperature) {
    const bool capped = softcap != T(0);
    return {logit_scale / temperature, capped ? logit_scale / softcap : T(0), softcap / temperature};
}

template <typename T>
struct Logit {
    T z;           // eq. 1
    T derivative;  // eq. 2: dz/ds
};

// The logit of a raw product. A masked one (-inf) stays masked; tanh alone would lift it to -softcap. It is chosen and
// not stepped over: around a branch for each logit no tanh would overlap with the next.
template <typename T>
LOGITLESS_FUNCTION Logit<T> logit(Transform<T> t, T raw) {
    if (t.outer == T(0)) return {raw * t.slope, t.slope};
    const bool masked = raw == minus_infinity<T>();
    const T bend = std::tanh(raw * t.inner);
    return {masked ? raw : t.outer * bend, masked ? T(0) : t.slope * (T(1) - bend * bend)};
}

template <typename T>
LOGITLESS_FUNCTION T transform(Transform<T> t, T raw) {
    return logit(t, raw).z;
}

template <typename T>
LOGITLESS_FUNCTION T derivative(Transform<T> t, T raw) {
    return logit(t, raw).derivative;
}

// Whether there is a softcap is asked once for K columns: its code is long.
template <typename T, int K>
LOGITLESS_FUNCTION void make_logits(Logit<T> (&to)[K], Transform<T> t, const T (&s)[K]) {
    if (t.outer == T(0)) {
        const Transform<T> plain = {t.slope, T(0), T(0)};
        for (int k = 0; k < K; ++k) to[k] = logit(plain, s[k]);
    } else {
        for (int k = 0; k < K; ++k) to[k] = logit(t, s[k]);
    }
}

constexpr double LOG2_E = 1.44269504088896340736;

// 2^x and e^x for the terms of a sum, x <= 0. In float32: the GPU's exponential of 2, right to 2^-22, after one
// multiplication for e^x. A term's error is at most e^x (|x| 2^-23 + 2^-22), below 2^-21 of the largest term, which is 1.
LOGITLESS_FUNCTION float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    return std::exp2(x);
#endif
}
LOGITLESS_FUNCTION double fast_exp(double x) { return std::exp(x); }
LOGITLESS_FUNCTION float fast_exp(float x) { return fast_exp2(x * static_cast<float>(LOG2_E)); }

// ---------------------------------------------------------------------------------------------- statistics

// Eq. 3: sums over a set of columns, relative to its largest logit. Order and grouping change rounding only.
template <typename T>
struct Moments {
    T max;      // the largest logit; -inf for no column, or for masked ones only
    T sum;      // sum e^(z - max)
    T shifted;  // sum e^(z - max) (z - max), <= 0
    T squares;  // sum e^(2 (z - max))
    T total;    // sum z
};

template <typename T>
LOGITLESS_FUNCTION Moments<T> no_columns() {
    return {minus_infinity<T>(), T(0), T(0), T(0), T(0)};
}

template <typename T>
LOGITLESS_FUNCTION Moments<T> one_column(T z) {
    const T present = z == minus_infinity<T>() ? T(0) : T(1);
    return {z, present, T(0), present, z};
}

// Eq. 4: the moments of the union of two disjoint sets. One exponential.
template <typename T>
LOGITLESS_FUNCTION Moments<T> merge(Moments<T> a, Moments<T> b) {
    const bool b_leads = b.max > a.max || std::isnan(b.max);
    Moments<T> top = b_leads ? b : a;
    const Moments<T> low = b_leads ? a : b;
    top.total += low.total;
    if (low.max == minus_infinity<T>()) {  // -inf - -inf has no value
        top.sum += low.sum;                // nothing to add, unless a NaN
        return top;
    }
    const T shift = low.max - top.max;
    const T factor = fast_exp(shift);
    top.sum += low.sum * factor;
    top.shifted += (low.shifted + shift * low.sum) * factor;
    top.squares += low.squares * factor * factor;
    return top;
}

// log of the sum of e^z over the columns; -inf for none.
template <typename T>
LOGITLESS_FUNCTION T log_sum_exp(Moments<T> moments) {
    return moments.max + std::log(moments.sum);
}

// Eq. 3 of K columns at once: one exponential each. fmax drops a NaN; the sum keeps it.
template <typename T, int K>
LOGITLESS_FUNCTION Moments<T> all_columns(const T (&z)[K]) {
    T top = z[0];
    for (int k = 1; k < K; ++k) top = std::fmax(top, z[k]);
    const T base = top == minus_infinity<T>() ? T(0) : top;
    Moments<T> found = {top, T(0), T(0), T(0), T(0)};
    for (int k = 0; k < K; ++k) {
        const T shift = z[k] - base, e = fast_exp(shift);
        found.sum += e;
        found.shifted += e == T(0) ? T(0) : e * shift;  // the shift may be -inf
        found.squares += e * e;
        found.total += z[k];
    }
    return found;
}

template <typename T>
LOGITLESS_FUNCTION T softplus(T x) {
    return x > T(0) ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <typename T>
struct RowStatistics {
    T logprob;     // eq. 5
    T lse;         // eq. 6
    T entropy;     // eq. 7
    T log_sum_sq;  // eq. 8
    T mean_logit;  // eq. 9
    T correct;     // eq. 10: 1 or 0
};

// Statistics of a row of `vocabulary` logits, from the moments of all of them but the target's, and the target's.
template <typename T>
LOGITLESS_FUNCTION RowStatistics<T> finish(Moments<T> others, T target, std::int64_t vocabulary) {
    const Moments<T> all = merge(others, one_column(target));
    const T lse_others = log_sum_exp(others);
    const bool target_leads = target >= others.max;
    // A confident target: the others' small share is kept apart from its 1, in which it would drown.
    const T share = others.sum == T(0) ? T(0) : others.sum * std::exp(others.max - target);
    const T log_sum = target_leads ? std::log1p(share) : std::log(all.sum);
    return {
        -softplus(lse_others - target),
        all.max + log_sum,
        log_sum - all.shifted / all.sum,
        std::log(all.squares) - T(2) * log_sum,
        all.total / T(vocabulary),
        target_leads ? T(1) : T(0),
    };
}

// ---------------------------------------------------------------------------------------------- gradients

// Upstream gradients of the differentiable statistics of a row.
template <typename T>
struct Upstream {
    T logprob;
    T lse;
    T entropy;
    T mean_logit;
};

// Eq. 11: dL/dz of a column other than the target. Times `derivative`: dL/ds.
template <typename T>
LOGITLESS_FUNCTION T other_gradient(Upstream<T> g, RowStatistics<T> row, T z, std::int64_t vocabulary) {
    const T even = g.mean_logit / T(vocabulary);
    if (z == minus_infinity<T>()) return even;  // p log p is 0, though log p is not finite
    const T logp = z - row.lse;
    return fast_exp(logp) * (g.lse - g.logprob - g.entropy * (logp + row.entropy)) + even;
}

// Eq. 13: dL/ds of a column other than the target.
template <typename T>
LOGITLESS_FUNCTION T raw_gradient(Upstream<T> g, RowStatistics<T> row, Logit<T> logit, std::int64_t vocabulary) {
    return other_gradient(g, row, logit.z, vocabulary) * logit.derivative;
}

// Eq. 12: dL/dz of the target. expm1 keeps the digits that 1 - p loses.
template <typename T>
LOGITLESS_FUNCTION T target_gradient(Upstream<T> g, RowStatistics<T> row, std::int64_t vocabulary) {
    const T p = std::exp(row.logprob);
    const T information = p == T(0) ? T(0) : p * (row.logprob + row.entropy);
    return -g.logprob * std::expm1(row.logprob) + g.lse * p - g.entropy * information + g.mean_logit / T(vocabulary);
}

}  // namespace logitless
