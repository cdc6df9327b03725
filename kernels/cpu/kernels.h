// All functions of the library for one set of instructions, which the including source is compiled for.
#pragma once

#include <type_traits>

#include "measure.h"
#include "product.h"
#include "set.h"
#include "spread.h"
#include "stream.h"

namespace {

// Calls a function with a null pointer of the operands' type.
template <typename Function>
auto with_type(std::int32_t dtype, Function function) {
    if (dtype == LOGITLESS_CPU_BFLOAT16) return function(static_cast<const bfloat16*>(nullptr));
    if (dtype == LOGITLESS_CPU_FLOAT16) return function(static_cast<const float16*>(nullptr));
    return function(static_cast<const float*>(nullptr));
}

template <typename T>
T element_of(const T*);

void units(const void* rows, std::int32_t dtype, std::int64_t count, std::int64_t depth, std::int64_t stride, float* out) {
    with_type(dtype, [=](auto type) {
        const auto* const from = static_cast<decltype(type)>(rows);
        for (std::int64_t i = 0; i < count; ++i) out[i] = unit_of(from + i * stride, depth);
    });
}

void spread_blocks(const logitless_spread* x, std::int64_t first, std::int64_t last) {
    with_type(x->dtype, [=](auto type) { spread<decltype(element_of(type))>(*x, first, last); });
}

// `Screen<T>`: the form of operands whose products screen. `Brain`: that of bfloat16, with float32's precision.
template <template <typename> class Screen, typename Brain>
struct Kernels {
    // Whether there are instructions for bfloat16, whose products then need no screen.
    static constexpr bool PAIRED = !std::is_same_v<Brain, Floats32<bfloat16>>;

    template <typename T>
    using Exact = std::conditional_t<std::is_same_v<T, bfloat16>, Brain, Floats32<T>>;
    template <typename T>
    using Screening = std::conditional_t<PAIRED && std::is_same_v<T, bfloat16>, Brain, Screen<T>>;

    static std::int32_t screens(std::int32_t dtype) {
        return with_type(dtype, [](auto type) { return Screening<decltype(element_of(type))>::SCREENS ? 1 : 0; });
    }

    static std::int64_t stream(const logitless_stream* problem, std::int64_t first, std::int64_t count,
                               std::int32_t* counts, std::int32_t* columns, float* values, std::int64_t room) {
        return with_type(problem->dtype, [=](auto type) {
            typedef decltype(element_of(type)) T;
            if (problem->units != nullptr)
                return Stream<T, Screening<T>>(*problem, first, count, room).run(counts, columns, values);
            return Stream<T, Exact<T>>(*problem, first, count, room).run(counts, columns, values);
        });
    }

    static std::int32_t product(std::int32_t dtype, const void* a, std::int64_t a_row, std::int64_t a_column, const void* b,
                                std::int64_t b_row, std::int64_t b_column, float* out, std::int64_t out_stride,
                                std::int64_t rows, std::int64_t columns, std::int64_t depth, std::int32_t adds) {
        const auto matrix = [](auto type, const void* x, std::int64_t row, std::int64_t column) {
            return Matrix<decltype(element_of(type))>{static_cast<decltype(type)>(x), row, column};
        };
        const auto product_of = [&](auto type) {
            return multiplied(matrix(type, a, a_row, a_column), matrix(type, b, b_row, b_column), {rows, columns, depth},
                              out, out_stride, adds != 0);
        };
        return dtype == LOGITLESS_CPU_FLOAT32 ? product_of(static_cast<const float*>(nullptr))
                                              : product_of(static_cast<const bfloat16*>(nullptr));
    }

    static constexpr logitless_cpu::Set FUNCTIONS = {screens, units, stream, spread_blocks, product, measure};

  private:
    static std::int32_t multiplied(Matrix<float> a, Matrix<float> b, Shape shape, float* out, std::int64_t stride,
                                   bool adds) {
        return Dense<Fused, float, 1>(a, b, shape, out, stride).run(adds);
    }

    static std::int32_t multiplied(Matrix<bfloat16> a, Matrix<bfloat16> b, Shape shape, float* out, std::int64_t stride,
                                   bool adds) {
        if constexpr (!PAIRED)
            return -1;
        else if constexpr (Brain::TILED)
            return tiled_product<Brain>(a, b, shape, out, stride, adds);
        else
            return Dense<typename Brain::Kind, bfloat16, 2>(a, b, shape, out, stride).run(adds);
    }
};

}  // namespace
