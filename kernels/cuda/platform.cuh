// The names that the kernels take from their platform: nvcc's CUDA, or the shim that runs this code on a CPU
// (host/shim.h).
//
// A kernel that runs on both uses only the names declared here, threadIdx and its like, __syncthreads, __syncwarp and
// the other names of host/shim.h. It takes static shared memory from LOGITLESS_SHARED, and dynamic from
// LOGITLESS_DYNAMIC_SHARED. Its translation unit is listed in sources.cmake among the portable ones.
#pragma once

#include <cstddef>
#include <cstdint>

#include "logitless.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LOGITLESS_SHARED(T, name, count) __shared__ T name[count]
#define LOGITLESS_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "host/shim.h"
#endif

namespace logitless {

constexpr int WARP = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

#ifdef __CUDACC__

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__host__ __device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ inline float widen(float16 x) { return __half2float(x); }
template <typename T>
__host__ __device__ inline T narrow(float x);
template <>
__host__ __device__ inline bfloat16 narrow<bfloat16>(float x) { return __float2bfloat16(x); }
template <>
__host__ __device__ inline float16 narrow<float16>(float x) { return __float2half(x); }
template <>
__host__ __device__ inline float narrow<float>(float x) { return x; }

// Queues a kernel; the code of the launch itself, as nothing waits for the kernel.
template <typename... Parameters, typename... Arguments>
std::int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, void* stream,
                    Arguments... arguments) {
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
    return static_cast<std::int32_t>(cudaGetLastError());
}

// The code of a call that is no launch. What it says is forgotten: `launch` asks for the last error, and would have it.
inline std::int32_t settled(cudaError_t code) {
    if (code != cudaSuccess) cudaGetLastError();
    return static_cast<std::int32_t>(code);
}

// This thread's launches go to `device` from here on. The static runtime has a current device of its own.
inline std::int32_t use_device(std::int32_t device) { return settled(cudaSetDevice(device)); }

#else

using bfloat16 = host::bfloat16;
using float16 = host::float16;
using host::narrow;
using host::widen;

template <typename... Parameters, typename... Arguments>
std::int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, void*,
                    Arguments... arguments) {
    host::run_grid(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
    return LOGITLESS_DONE;
}

inline std::int32_t use_device(std::int32_t) { return LOGITLESS_DONE; }

#endif

__host__ __device__ inline float widen(float x) { return x; }
__host__ __device__ inline double widen(double x) { return x; }
template <typename T>
__host__ __device__ inline T narrow(double x) { return static_cast<T>(x); }

// The type that a matrix of T is computed in.
template <typename T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

// What moves in one access.
template <typename T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Vector {
    T at[WIDTH];
};
template <typename T>
constexpr int VECTOR_WIDTH = 16 / static_cast<int>(sizeof(T));

template <typename T>
bool is_aligned(const T* pointer, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace logitless
