// All functions of the library for one set of instructions, which the including source is compiled for.
//
// That source names `Screening<T>`, the form of operands whose products screen, and `Exact<T>`, that of full precision. It
// defines LOGITLESS_CPU_TILED where products of bfloat16 are AMX's.
#pragma once

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

std::int32_t screens(std::int32_t dtype) {
    return with_type(dtype, [](auto type) { return Screening<decltype(element_of(type))>::SCREENS ? 1 : 0; });
}

void units(const void* rows, std::int32_t dtype, std::int64_t count, std::int64_t depth, std::int64_t stride, float* out) {
    with_type(dtype, [=](auto type) {
        const auto* const from = static_cast<decltype(type)>(rows);
        for (std::int64_t i = 0; i < count; ++i) out[i] = unit_of(from + i * stride, depth);
    });
}

std::int64_t stream(const logitless_stream* problem, std::int64_t first, std::int64_t count, std::int32_t* counts,
                    std::int32_t* columns, float* values, std::int64_t room) {
    return with_type(problem->dtype, [=](auto type) {
        typedef decltype(element_of(type)) T;
        if (problem->units != nullptr)
            return Stream<T, Screening<T>>(*problem, first, count, room).run(counts, columns, values);
        return Stream<T, Exact<T>>(*problem, first, count, room).run(counts, columns, values);
    });
}

void spread_blocks(const logitless_spread* x, std::int64_t first, std::int64_t last) {
    with_type(x->dtype, [=](auto type) { spread<decltype(element_of(type))>(*x, first, last); });
}

// Only a set with instructions for them has products of bfloat16.
std::int32_t bfloat16_product(Matrix<bfloat16> a, Matrix<bfloat16> b, Shape shape, float* out, std::int64_t stride,
                              bool adds) {
#ifdef LOGITLESS_CPU_TILED
    return tiled_product<Exact<bfloat16>>(a, b, shape, out, stride, adds);
#elif defined(__AVX512BF16__)
    return Dense<Brains, bfloat16, 2>(a, b, shape, out, stride).run(adds);
#else
    (void)a, (void)b, (void)shape, (void)out, (void)stride, (void)adds;
    return -1;
#endif
}

std::int32_t product(std::int32_t dtype, const void* a, std::int64_t a_row, std::int64_t a_column, const void* b,
                     std::int64_t b_row, std::int64_t b_column, float* out, std::int64_t out_stride, std::int64_t rows,
                     std::int64_t columns, std::int64_t depth, std::int32_t adds) {
    const Shape shape = {rows, columns, depth};
    if (dtype == LOGITLESS_CPU_FLOAT32)
        return Dense<Fused, float, 1>({static_cast<const float*>(a), a_row, a_column},
                                      {static_cast<const float*>(b), b_row, b_column}, shape, out, out_stride)
            .run(adds != 0);
    const Matrix<bfloat16> left = {static_cast<const bfloat16*>(a), a_row, a_column};
    const Matrix<bfloat16> right = {static_cast<const bfloat16*>(b), b_row, b_column};
    return bfloat16_product(left, right, shape, out, out_stride, adds != 0);
}

constexpr logitless_cpu::Set FUNCTIONS = {screens, units, stream, spread_blocks, product, measure};

}  // namespace
