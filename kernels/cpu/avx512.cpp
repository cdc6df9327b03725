// AVX-512 with VNNI: as with AVX2, in vectors twice as long, and pairs of integers multiplied and added in one instruction.
#include "operands.h"

namespace {
template <typename T>
using Screening = Rounded<T>;
template <typename T>
using Exact = Floats32<T>;
}  // namespace

#include "kernels.h"

const logitless_cpu::Set logitless_cpu::AVX512 = FUNCTIONS;
