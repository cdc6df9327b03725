// AMX's instructions as loops, for the tests of tiles.h on processors without them.
#pragma once

#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps

namespace {

thread_local std::uint8_t emulated_tiles[8][16][64];

inline void _tile_loadconfig(const void*) {}
inline void _tile_release() {}
inline void _tile_zero(int tile) { std::memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile]); }

inline void _tile_loadd(int tile, const void* from, std::int64_t stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(emulated_tiles[tile][row], static_cast<const char*>(from) + row * stride, 64);
}

inline void _tile_stored(int tile, void* to, std::int64_t stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, emulated_tiles[tile][row], 64);
}

inline float emulated_half(const std::uint8_t* at) {
    std::uint16_t half;
    std::memcpy(&half, at, 2);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void _tile_dpbf16ps(int sums, int rows, int columns) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float total;
            std::memcpy(&total, &emulated_tiles[sums][m][4 * n], 4);
            for (int k = 0; k < 16; ++k)
                for (int half = 0; half < 2; ++half)
                    total += emulated_half(&emulated_tiles[rows][m][4 * k + 2 * half]) *
                             emulated_half(&emulated_tiles[columns][k][4 * n + 2 * half]);
            std::memcpy(&emulated_tiles[sums][m][4 * n], &total, 4);
        }
}

}  // namespace
