#include "forward_sm90.cuh"

#include "forward.cuh"

namespace {

using namespace logitless;

// wgmma is Hopper's alone: neither earlier nor later GPUs have it.
std::int32_t check_hopper(std::int32_t device) {
    int major = 0;
    if (const std::int32_t code = settled(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)))
        return code;
    return major == 9 ? LOGITLESS_DONE : LOGITLESS_BAD_DEVICE;
}

template <typename Half>
std::int32_t run(const Forward& x) {
    using Gemm = typename ForwardSm90<Half>::Gemm;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(x.rows), static_cast<int>(x.vocabulary), static_cast<int>(x.depth), 1},
        {static_cast<const Half*>(x.hidden),
         {x.hidden_stride, cute::_1{}, 0},
         static_cast<const Half*>(x.weight),
         {x.weight_stride, cute::_1{}, 0}},
        {x.head(), x.out()},
    };
    arguments.hw_info = cutlass::KernelHardwareInfo::make_kernel_hardware_info<typename Gemm::GemmKernel>(x.device);
    arguments.scheduler.max_swizzle_size = 8;  // blocks at work at one time share rows of both operands
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return LOGITLESS_BAD_SIZE;
    if (Gemm::get_workspace_size(arguments) != 0) return LOGITLESS_BAD_WORKSPACE;
    Gemm gemm;
    const cutlass::Status status = gemm.run(arguments, nullptr, static_cast<cudaStream_t>(x.stream));
    // Of a launch that failed, CUTLASS has taken CUDA's code.
    return status == cutlass::Status::kSuccess ? LOGITLESS_DONE : static_cast<std::int32_t>(cudaErrorLaunchFailure);
}

}  // namespace

int32_t logitless_forward_sm90(const void* hidden, const void* weight, int32_t dtype, int64_t rows, int64_t vocabulary,
                               int64_t depth, int64_t hidden_stride, int64_t weight_stride, const void* bias,
                               const int64_t* targets, double logit_scale, double softcap, double temperature,
                               void* moments, void* target_logit, int32_t device, void* stream) {
    const Forward x{hidden,        weight,        dtype,        rows,    vocabulary,  depth,
                    hidden_stride, weight_stride, bias,         targets, logit_scale, softcap,
                    temperature,   moments,       target_logit, device,  stream};
    return start(x, [&] {
        if (const std::int32_t code = check_hopper(device)) return code;
        return dtype == LOGITLESS_BFLOAT16 ? run<cutlass::bfloat16_t>(x) : run<cutlass::half_t>(x);
    });
}
