// AMX: tiles of bfloat16, for bfloat16 operands as they stand, and to screen others by parts.
#include "tiles.h"

#define LOGITLESS_CPU_TILED

namespace {

template <typename T>
struct Forms {
    typedef Split<T> Screening;
    typedef Floats32<T> Exact;
};
template <>
struct Forms<bfloat16> {
    typedef TiledPairs Screening;
    typedef TiledPairs Exact;
};
template <typename T>
using Screening = typename Forms<T>::Screening;
template <typename T>
using Exact = typename Forms<T>::Exact;

}  // namespace

#include "kernels.h"

const logitless_cpu::Set logitless_cpu::AMX = FUNCTIONS;
bool logitless_cpu::amx_is_right() { return tiles_are_right(); }
