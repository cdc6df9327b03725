// The arguments of the fused forwards of logitless.h as one struct, checked, for their launchers.
#pragma once

#include "arguments.cuh"
#include "tile_rows.cuh"

namespace logitless {

struct Forward {
    const void *hidden, *weight;
    std::int32_t dtype;
    std::int64_t rows, vocabulary, depth, hidden_stride, weight_stride;
    const void* bias;
    const std::int64_t* targets;
    double logit_scale, softcap, temperature;
    void* moments;
    std::int32_t moment_count;
    void *target_logit, *raw;
    std::int64_t raw_stride;
    std::int32_t device;
    void* stream;

    std::int64_t parts() const { return divide_up(vocabulary, PART_COLUMNS); }

    RowHead head() const {
        const auto transform = make_transform(logit_scale, softcap, temperature);
        const Transform<float> single = {static_cast<float>(transform.slope), static_cast<float>(transform.inner),
                                         static_cast<float>(transform.outer)};
        const double slope = softcap == 0 ? transform.slope : 1.0;
        const auto rate = static_cast<float>(slope * LOG2_E);
        return {static_cast<const float*>(bias), single, static_cast<float>(slope), rate, vocabulary, targets};
    }

    RowResults results() const {
        const bool pairs = is_aligned(raw, sizeof(Vector<float, 2>)) && raw_stride % 2 == 0;
        return {{static_cast<float*>(moments), static_cast<float*>(target_logit), parts(), rows, moment_count},
                static_cast<float*>(raw),
                raw_stride,
                pairs};
    }

    // Operands are read 16 bytes at a time; block indices and CUTLASS's sizes are 32-bit, and so are the places of tiles
    // that lie wholly beyond the matrix (forward_sm90.cuh, TileOrder).
    std::int32_t check() const {
        constexpr std::int64_t largest = INT32_MAX - 16 * 256;
        return Check()
            .require(dtype == LOGITLESS_BFLOAT16 || dtype == LOGITLESS_FLOAT16, LOGITLESS_BAD_DTYPE)
            .size(rows, 1, largest)
            .size(vocabulary, 1, largest)
            .size(depth, 1, largest)
            .size(divide_up(rows, PART_COLUMNS) * parts(), 0, INT32_MAX)
            .require(depth % 8 == 0, LOGITLESS_BAD_SIZE)
            .stride(hidden_stride, depth)
            .stride(weight_stride, depth)
            .require(hidden_stride % 8 == 0 && weight_stride % 8 == 0, LOGITLESS_BAD_STRIDE)
            .options(logit_scale, softcap, temperature)
            .pointer(hidden, 16)
            .pointer(weight, 16)
            .maybe(bias, sizeof(float))
            .pointer(targets, sizeof(std::int64_t))
            .moments(moment_count)
            .pointer(moments, sizeof(float))
            .pointer(target_logit, sizeof(float))
            .maybe(raw, sizeof(float))
            .require(raw == nullptr || raw_stride >= vocabulary, LOGITLESS_BAD_STRIDE)
            .code();
    }
};

// `run` where there is something to do: of no rows, PyTorch has no address.
template <typename Run>
std::int32_t start(const Forward& call, Run run) {
    if (call.rows == 0) return LOGITLESS_DONE;
    if (const std::int32_t code = call.check()) return code;
    if (const std::int32_t code = use_device(call.device)) return code;
    return run();
}

}  // namespace logitless
