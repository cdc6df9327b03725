// Routing of the tail-corrected backward: which (token, block of the vocabulary) pairs are computed, listed by block.
//
//     mass[i, b] = exp(block_lse[i, b] - lse[i])          the block's share of p, the target's left out
//     kept where magnitude[i] mass[i, b] >= threshold     (a product of 0 never, a NaN always)
//     tail[i, b] = mass[i, b] where not kept, else 0      left to two small GEMMs
//
// The list has the tokens of block 0 in order, then those of block 1, and so on. It is cut at spans of 128 tokens:
//
//     starts[b spans + s]     where block b's tokens in [128 s, 128 s + 128) begin; starts[blocks spans] is the end
//
// A thread has one block and one span, and goes down its tokens twice: to count, and after a scan of the counts to
// list. So the order is always that of the tokens. The list has room for every pair, so nothing waits for the host.
//
// Traffic: block_lse is read twice (a warp reads 32 blocks of a token: 128 bytes), tail written once, 4 N V / B bytes
// each; the list 4 bytes a pair. At N = 8192, V / B = 1002: 0.1 GB, 0.03 ms at 3.35 TB/s. Exponentials: 2 N V / B.
// Registers: a few. Not yet run on a GPU.
#pragma once

#include "../rows.h"
#include "platform.cuh"

namespace logitless {

constexpr int SPAN = 128;  // tokens
constexpr int ROUTE_THREADS = 128;
constexpr int SCAN_THREADS = 1024;

struct Route {
    const float* block_lse;  // [rows, blocks]
    std::int64_t block_stride;
    const float* lse;        // [rows]
    const float* magnitude;  // [rows]
    const float* threshold;  // [1]
    std::int64_t rows, blocks;
    std::int32_t* starts;  // [blocks spans + 1]
    std::int32_t* tokens;  // [rows blocks]
    float* tail;           // [rows, blocks], or null
    std::int64_t tail_stride;
};

__host__ __device__ inline std::int64_t spans_of(std::int64_t rows) { return (rows + SPAN - 1) / SPAN; }

struct Pair {
    float mass;
    bool kept;
};

__device__ inline Pair decide(const Route& x, float threshold, std::int64_t token, std::int64_t block) {
    const float mass = fast_exp(x.block_lse[token * x.block_stride + block] - x.lse[token]);
    const float weight = x.magnitude[token] * mass;
    return {mass, weight != 0.0f && !(weight < threshold)};
}

// LIST: writes the tokens where starts says; otherwise writes counts there, and the tail.
template <bool LIST>
__global__ void __launch_bounds__(ROUTE_THREADS) route_kernel(const Route x) {
    const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * ROUTE_THREADS + threadIdx.x;
    if (block >= x.blocks) return;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * SPAN;
    const std::int64_t last = first + SPAN < x.rows ? first + SPAN : x.rows;
    std::int32_t* const start = x.starts + block * spans_of(x.rows) + blockIdx.y;
    const float threshold = *x.threshold;
    std::int32_t at = LIST ? *start : 0;
    for (std::int64_t token = first; token < last; ++token) {
        const Pair pair = decide(x, threshold, token, block);
        if (LIST && pair.kept) x.tokens[at] = static_cast<std::int32_t>(token);
        if (!LIST && x.tail != nullptr) x.tail[token * x.tail_stride + block] = pair.kept ? 0.0f : pair.mass;
        at += pair.kept ? 1 : 0;
    }
    if (!LIST) *start = at;
}

// Counts become the sums of those before them, and the total stands at the end. One block: each thread sums a run of
// the counts, the runs' sums are scanned in shared memory, and each thread goes over its run again.
__global__ void __launch_bounds__(SCAN_THREADS) scan_kernel(std::int32_t* values, std::int64_t count) {
    LOGITLESS_SHARED(std::int32_t, sums, SCAN_THREADS);
    const int own = static_cast<int>(threadIdx.x);
    const std::int64_t run = (count + SCAN_THREADS - 1) / SCAN_THREADS;
    const std::int64_t first = own * run < count ? own * run : count;
    const std::int64_t last = first + run < count ? first + run : count;
    std::int32_t sum = 0;
    for (std::int64_t k = first; k < last; ++k) sum += values[k];
    sums[own] = sum;
    __syncthreads();
    for (int step = 1; step < SCAN_THREADS; step *= 2) {
        const std::int32_t before = own >= step ? sums[own - step] : 0;
        __syncthreads();
        sums[own] += before;
        __syncthreads();
    }
    std::int32_t at = sums[own] - sum;
    for (std::int64_t k = first; k < last; ++k) {
        const std::int32_t value = values[k];
        values[k] = at;
        at += value;
    }
    if (own == SCAN_THREADS - 1) values[count] = at;
}

}  // namespace logitless
