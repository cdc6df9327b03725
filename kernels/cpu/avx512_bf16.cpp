// AVX-512 with VNNI and bfloat16: bfloat16 operands have products of float32's precision at the speed of integers.
#include "operands.h"

namespace {

template <typename T>
struct Forms {
    typedef Rounded<T> Screening;
    typedef Floats32<T> Exact;
};
template <>
struct Forms<bfloat16> {
    typedef Pairs Screening;
    typedef Pairs Exact;
};
template <typename T>
using Screening = typename Forms<T>::Screening;
template <typename T>
using Exact = typename Forms<T>::Exact;

}  // namespace

#include "kernels.h"

const logitless_cpu::Set logitless_cpu::AVX512_BF16 = FUNCTIONS;
