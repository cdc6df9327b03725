// AMX: tiles of bfloat16, for bfloat16 operands as they stand, and to screen others by parts.
#include "kernels.h"
#include "tiles.h"

const logitless_cpu::Set logitless_cpu::AMX = Kernels<Split, TiledPairs>::FUNCTIONS;
bool logitless_cpu::amx_is_right() { return tiles_are_right(); }
