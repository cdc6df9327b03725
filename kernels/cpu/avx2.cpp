// AVX2, FMA and F16C: integers screen, all else is float32.
#include "operands.h"

namespace {
template <typename T>
using Screening = Rounded<T>;
template <typename T>
using Exact = Floats32<T>;
}  // namespace

#include "kernels.h"

const logitless_cpu::Set logitless_cpu::AVX2 = FUNCTIONS;
