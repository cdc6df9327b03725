// Runs a CUDA kernel's own code on a CPU, for tests, with a fiber for each thread of a block, one block after another.
//
// It shows
//     results
//     out-of-bounds accesses              AddressSanitizer; shared memory is allocated to the byte
//     undefined behaviour                 UndefinedBehaviorSanitizer
//     a barrier that some threads miss    the run stops with a sentence
//     reads of unwritten shared memory    it begins as NaNs
//     races                               ThreadSanitizer; only __syncthreads and __syncwarp order fibers, and blocks
//                                         are unordered too
// It does not show speed, nor alignment beyond the element's.
//
// Blocks run in order of x, then y, then z. A block's size is a multiple of 32. Masks of warps must be full.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// CUDA's own headers, where a host compiler has met them, have these too.
#ifndef __VECTOR_TYPES_H__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#endif

namespace logitless {
namespace host {

// A thread's place, valid inside a kernel.
const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
void* shared_array(const void* place, std::size_t bytes);
void* dynamic_shared();

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);
void block_barrier();
void warp_barrier(unsigned mask);
// Every lane gives `bytes` (at most 64) and receives those of lane `source`. Orders no memory, as on a GPU.
void exchange(unsigned mask, const void* given, void* received, std::size_t bytes, unsigned source);
unsigned ballot(unsigned mask, bool vote);

struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};
float widen(bfloat16 x);
float widen(float16 x);
template <typename T>
T narrow(float x);  // to the nearest, ties to even
template <>
bfloat16 narrow<bfloat16>(float x);
template <>
float16 narrow<float16>(float x);
template <>
inline float narrow<float>(float x) { return x; }

template <typename T>
T from_lane(unsigned mask, T value, unsigned source) {
    T received;
    exchange(mask, &value, &received, sizeof(T), source);
    return received;
}

inline unsigned lane() {
    const dim3 &t = thread_index(), &size = block_size();
    return (t.x + size.x * (t.y + size.y * t.z)) % 32;
}

}  // namespace host
}  // namespace logitless

#define threadIdx (::logitless::host::thread_index())
#define blockIdx (::logitless::host::block_index())
#define blockDim (::logitless::host::block_size())
#define gridDim (::logitless::host::grid_size())
#define LOGITLESS_SHARED(T, name, count)                                                                      \
    static const char name##_place = 0;                                                                       \
    T* const name = static_cast<T*>(::logitless::host::shared_array(&name##_place, sizeof(T) * (count)))
#define LOGITLESS_DYNAMIC_SHARED(name) \
    unsigned char* const name = static_cast<unsigned char*>(::logitless::host::dynamic_shared())

inline void __syncthreads() { ::logitless::host::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::logitless::host::warp_barrier(mask); }
inline unsigned __ballot_sync(unsigned mask, bool vote) { return ::logitless::host::ballot(mask, vote); }
inline bool __any_sync(unsigned mask, bool vote) { return ::logitless::host::ballot(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return ::logitless::host::ballot(mask, vote) == mask; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    return ::logitless::host::from_lane(mask, value, static_cast<unsigned>(source) % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return ::logitless::host::from_lane(mask, value, ::logitless::host::lane() ^ static_cast<unsigned>(lanes));
}
// Lanes without a partner keep their own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
    const unsigned lane = ::logitless::host::lane();
    return ::logitless::host::from_lane(mask, value, lane + lanes < 32 ? lane + lanes : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
    const unsigned lane = ::logitless::host::lane();
    return ::logitless::host::from_lane(mask, value, lane >= lanes ? lane - lanes : lane);
}

template <typename T>
T atomicAdd(T* place, T value) {
    T old;
    __atomic_load(place, &old, __ATOMIC_RELAXED);
    T sum = static_cast<T>(old + value);
    while (!__atomic_compare_exchange(place, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        sum = static_cast<T>(old + value);
    return old;
}
template <typename T>
T atomicMax(T* place, T value) {
    T old;
    __atomic_load(place, &old, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange(place, &old, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
