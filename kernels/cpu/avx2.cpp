// AVX2, FMA and F16C: integers screen, all else is float32.
#include "kernels.h"

const logitless_cpu::Set logitless_cpu::AVX2 = Kernels<Rounded, Floats32<bfloat16>>::FUNCTIONS;
