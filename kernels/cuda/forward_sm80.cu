// logitless_forward_sm80: the launch of its kernel.
#include "forward_sm80.cuh"

#include "forward.cuh"

namespace {

using namespace logitless;

template <typename Half>
std::int32_t run(const Forward& x) {
    const ForwardTask<Half> task{
        {static_cast<const Half*>(x.hidden), x.hidden_stride, x.rows, x.depth, nullptr},
        {static_cast<const Half*>(x.weight), x.weight_stride, x.vocabulary, x.depth, nullptr},
        x.head(),
        x.results(),
    };
    const auto blocks = static_cast<unsigned>(divide_up(x.rows, TILE) * x.parts());
    return launch(forward_sm80_kernel<Half>, dim3(blocks), dim3(TILE_THREADS), 0, x.stream, task);
}

}  // namespace

int32_t logitless_forward_sm80(const void* hidden, const void* weight, int32_t dtype, int64_t rows, int64_t vocabulary,
                               int64_t depth, int64_t hidden_stride, int64_t weight_stride, const void* bias,
                               const int64_t* targets, double logit_scale, double softcap, double temperature,
                               void* moments, int32_t moment_count, void* target_logit, void* raw, int64_t raw_stride,
                               int32_t device, void* stream) {
    const Forward x{hidden,        weight, dtype,   rows,        vocabulary, depth,       hidden_stride,
                    weight_stride, bias,   targets, logit_scale, softcap,    temperature, moments,
                    moment_count,  target_logit, raw, raw_stride, device, stream};
    return start(x, [&] { return dtype == LOGITLESS_BFLOAT16 ? run<bfloat16>(x) : run<float16>(x); });
}
