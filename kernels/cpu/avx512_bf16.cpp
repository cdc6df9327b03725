// AVX-512 with VNNI and bfloat16: bfloat16 operands have products of float32's precision at the speed of integers.
#include "kernels.h"

const logitless_cpu::Set logitless_cpu::AVX512_BF16 = Kernels<Rounded, Pairs>::FUNCTIONS;
