// The functions of logitless.h that start no kernel.
#include <cstdint>

#include "platform.cuh"

namespace {

const char* own_sentence(std::int32_t code) {
    switch (code) {
        case LOGITLESS_DONE: return "done";
        case LOGITLESS_BAD_DTYPE: return "a dtype, or a combination of dtypes, that the function does not take";
        case LOGITLESS_BAD_SIZE: return "a size that is negative, zero where something is needed, or too large";
        case LOGITLESS_BAD_STRIDE: return "a row stride below the length of a row";
        case LOGITLESS_BAD_POINTER: return "a pointer that is null where it may not be, or not aligned to its element";
        case LOGITLESS_BAD_WORKSPACE: return "a workspace smaller than the function's _workspace says";
        case LOGITLESS_BAD_OPTION: return "a logit_scale, softcap or temperature that is not positive and finite";
        case LOGITLESS_BAD_DEVICE: return "a GPU that this library holds no code for";
        case LOGITLESS_BAD_MOMENTS:
            return "a number of moments that is neither 2 nor 5, or 2 where a result needs all of them";
        case LOGITLESS_BAD_CONFIGURATION: return "a configuration that this build of the function does not have";
        case LOGITLESS_NOT_BUILT: return "a kernel that this build leaves out";
        default: return "not a code of this library";
    }
}

#ifdef __CUDACC__

// An instance of this is in the library for every architecture it was compiled for.
__global__ void nothing_kernel() {}

std::int32_t check_device(std::int32_t device) {
    int count = 0;
    if (const std::int32_t code = logitless::settled(cudaGetDeviceCount(&count))) return code;
    if (device < 0 || device >= count) return static_cast<std::int32_t>(cudaErrorInvalidDevice);
    if (const std::int32_t code = logitless::use_device(device)) return code;
    cudaFuncAttributes attributes;
    const std::int32_t code = logitless::settled(cudaFuncGetAttributes(&attributes, nothing_kernel));
    const bool no_code = code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction;
    return no_code ? static_cast<std::int32_t>(LOGITLESS_BAD_DEVICE) : code;
}

const char* target() { return "cuda"; }
const char* cuda_sentence(std::int32_t code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

#else

std::int32_t check_device(std::int32_t) { return LOGITLESS_DONE; }
const char* target() { return "host"; }
const char* cuda_sentence(std::int32_t) { return "not a code of this library"; }

#endif

}  // namespace

const char* logitless_target(void) { return target(); }

const char* logitless_explain(int32_t code) { return code > 0 ? cuda_sentence(code) : own_sentence(code); }

int32_t logitless_check_device(int32_t device) { return check_device(device); }
