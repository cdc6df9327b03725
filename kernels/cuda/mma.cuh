// The tensor-core and asynchronous-copy instructions of Ampere and later (PTX ISA: mma.m16n8k16, ldmatrix, cp.async),
// one function each. host/mma.h has the same functions for the CPU, by the documented fragment layouts:
//
//     A [16, 16]: register v of lane l holds row l / 4 + 8 (v % 2), columns 2 (l % 4) + 8 (v / 2) and the next
//     B [16, 8]:  register v of lane l holds rows 2 (l % 4) + 8 v and the next, column l / 4
//     C [16, 8]:  element v of lane l is row l / 4 + 8 (v / 2), column 2 (l % 4) + v % 2
//
#pragma once

#include "platform.cuh"

#ifndef __CUDACC__
#include "host/mma.h"
#else
#define LOGITLESS_UNROLL _Pragma("unroll")

namespace logitless {

__device__ inline std::uint32_t shared_address(const void* shared) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies of 16 bytes from global to shared memory that this thread has under way, in groups.
class Copies {
  public:
    // Zeros where `present` is false; `global` is then not read.
    __device__ void copy(void* shared, const void* global, bool present) {
        const int bytes = present ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                     "r"(bytes)
                     : "memory");
    }

    // Ends a group.
    __device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

    // Waits until at most PENDING groups are under way. Other threads see the copies after a __syncthreads().
    template <int PENDING>
    __device__ void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
    }
};

// Four 8 x 8 matrices: lanes 8 m .. 8 m + 7 bring the addresses of the rows of matrix m, 16 bytes each; result m of
// lane l is elements 2 (l % 4) and the next of its row l / 4.
__device__ inline void load_matrices(std::uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_matrices_transposed(std::uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b
#define LOGITLESS_MMA(HALF, NAME)                                                                              \
    __device__ inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,          \
                                        std::uint32_t b1, HALF) {                                              \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
            "{%8, %9}, {%0, %1, %2, %3};"                                                                      \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                   \
    }
LOGITLESS_MMA(bfloat16, "bf16")
LOGITLESS_MMA(float16, "f16")
#undef LOGITLESS_MMA

// to[0..3] += v[0..3] for 16-byte aligned `to`: one reduction of 16 bytes where the hardware has it.
__device__ inline void add_to_global(float* to, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
#else
    for (int k = 0; k < 4; ++k) atomicAdd(to + k, v[k]);
#endif
}

}  // namespace logitless
#endif
