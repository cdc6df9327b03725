// AVX-512 with VNNI: as with AVX2, in vectors twice as long, and pairs of integers multiplied and added in one instruction.
#include "kernels.h"

const logitless_cpu::Set logitless_cpu::AVX512 = Kernels<Rounded, Floats32<bfloat16>>::FUNCTIONS;
