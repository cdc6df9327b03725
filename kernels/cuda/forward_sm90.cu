// logitless_forward_sm90: the choice of a configuration, and its launch.
#include "configurations_sm90.h"
#include "launch_sm90.cuh"

namespace logitless {
#ifndef LOGITLESS_FORWARD_CONFIGURATIONS
const Configuration* other_configuration(std::int32_t) { return nullptr; }
#endif
}  // namespace logitless

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
std::int32_t run_default(const Forward& x) {
    return with_default_forward<Half>(
        static_cast<int>(x.rows), static_cast<int>(x.vocabulary), static_cast<int>(x.depth),
        [&](auto kind, TileOrder order) { return run_sm90<decltype(kind)>(x, order); });
}

std::int32_t run_configuration(const Forward& x, std::int32_t index) {
    if (index == 0)
        return x.dtype == LOGITLESS_BFLOAT16 ? run_default<cutlass::bfloat16_t>(x) : run_default<cutlass::half_t>(x);
    return x.dtype == LOGITLESS_BFLOAT16 ? other_configuration(index - 1)->run(x)
                                         : static_cast<std::int32_t>(LOGITLESS_BAD_DTYPE);
}

}  // namespace

int32_t logitless_forward_sm90(const void* hidden, const void* weight, int32_t dtype, int64_t rows, int64_t vocabulary,
                               int64_t depth, int64_t hidden_stride, int64_t weight_stride, const void* bias,
                               const int64_t* targets, double logit_scale, double softcap, double temperature,
                               void* moments, int32_t moment_count, void* target_logit, void* raw, int64_t raw_stride,
                               int32_t configuration, int32_t device, void* stream) {
    const Forward x{hidden,        weight,       dtype,   rows,        vocabulary, depth,       hidden_stride,
                    weight_stride, bias,         targets, logit_scale, softcap,    temperature, moments,
                    moment_count,  target_logit, raw,     raw_stride,  device,     stream};
    if (logitless_forward_sm90_configuration(configuration) == nullptr) return LOGITLESS_BAD_CONFIGURATION;
    return start(x, [&] {
        if (const std::int32_t code = check_hopper(device)) return code;
        return run_configuration(x, configuration);
    });
}

const char* logitless_forward_sm90_configuration(int32_t index) {
    if (index == 0) return "cooperative_128x256x64";
    const Configuration* const other = other_configuration(index - 1);
    return other ? other->name : nullptr;
}
