// AMX's tiles: 16 rows of 16 pairs of bfloat16 times 16 pairs of 16 tokens, added to 16 x 16 floats.
//
// A product takes 32 entries by 32 tokens: four tiles of sums, two of rows, two of the panel, which is all eight. The rows
// and the panels are the same as for vdpbf16ps (tile.h), words padded with zeros to a multiple of 16.
#pragma once

#include "operands.h"

#ifdef LOGITLESS_EMULATE_AMX
#include "tiles_emulated.h"
#endif

namespace {

constexpr std::int64_t TILE_WORDS = 16;

struct TileConfiguration {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // bytes
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Two rows of tiles by two columns of them; sums that are there already are added to.
void multiply_tiles(const std::int32_t* rows, std::int64_t row, const std::int32_t* panel, std::int64_t words) {
    for (std::int64_t k = 0; k < words; k += TILE_WORDS) {
        _tile_loadd(4, rows + k, 4 * row);
        _tile_loadd(5, rows + 16 * row + k, 4 * row);
        _tile_loadd(6, panel + k * GROUP, 4 * GROUP);
        _tile_loadd(7, panel + k * GROUP + 16, 4 * GROUP);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// The intrinsics do not tell the compiler which memory they read.
void settle_memory() { asm volatile("" ::: "memory"); }

void clear_tiles() {
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

void store_tiles(float* out, std::int64_t stride) {
    _tile_stored(0, out, 4 * stride);
    _tile_stored(1, out + 16, 4 * stride);
    _tile_stored(2, out + 16 * stride, 4 * stride);
    _tile_stored(3, out + 16 * stride + 16, 4 * stride);
    settle_memory();
}

struct Tiled {
    static constexpr std::int64_t ROWS = 32;
    static constexpr bool SCREENS = false, SCALED = false, TILED = true;
    static void start() {
        static const TileConfiguration configuration;  // the intrinsic tells the compiler of its first 8 bytes alone
        _tile_loadconfig(&configuration);
    }
    static void stop() { _tile_release(); }
};

// bfloat16 as it stands: float32's error.
struct TiledPairs : Tiled {
    static std::int64_t words(std::int64_t depth) { return round_up((depth + 1) / 2, TILE_WORDS); }
    static void stage(const bfloat16* row, std::int64_t depth, float, std::int32_t* out) {
        std::memset(out, 0, static_cast<std::size_t>(4 * words(depth)));
        stage_pairs(row, depth, out);
    }
    static void multiply(const std::int32_t* rows, std::int64_t row, const std::int32_t* panel, std::int64_t words,
                         float* out, std::int64_t stride) {
        clear_tiles();
        multiply_tiles(rows, row, panel, words);
        store_tiles(out, stride);
    }
};

// Each column x as h = bfloat16(x) and l = bfloat16(x - h): x y is h h' + h l' + l h' but for 2^-17 of itself.
template <typename T>
struct Split : Tiled {
    static constexpr bool SCREENS = true;
    static std::int64_t words(std::int64_t depth) { return 2 * TiledPairs::words(depth); }
    static void stage(const T* row, std::int64_t depth, float, std::int32_t* out) {
        std::memset(out, 0, static_cast<std::size_t>(4 * words(depth)));
        std::uint16_t *const high = reinterpret_cast<std::uint16_t*>(out), *const low = high + words(depth);
        for (std::int64_t k = 0; k < depth; k += LANES) {
            const Floats x = load_some(row + k, depth - k);
            const Words bits = bfloat16_bits(x);
            store_halves(high + k, halves(bits));
            store_halves(low + k, halves(bfloat16_bits(subtract(x, as_floats(shifted_left(bits))))));
        }
    }
    static void multiply(const std::int32_t* rows, std::int64_t row, const std::int32_t* panel, std::int64_t words,
                         float* out, std::int64_t stride) {
        const std::int64_t half = words / 2;
        clear_tiles();
        multiply_tiles(rows, row, panel + half * GROUP, half);
        multiply_tiles(rows + half, row, panel, half);
        multiply_tiles(rows, row, panel, half);
        store_tiles(out, stride);
    }
};

// Whether the processor's tiles have the product that they should, which is asked before they are used for anything.
// The numbers are small and whole: bfloat16 holds them, and their sums are exact.
bool tiles_are_right() {
    const auto left = [](std::int64_t i, std::int64_t k) { return (i * 7 + k * 3) % 13 - 6; };
    const auto right = [](std::int64_t k, std::int64_t j) { return (k * 5 + j * 11) % 17 - 8; };
    const auto half = [](std::int64_t number) {
        const float value = static_cast<float>(number);
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits >> 16;
    };
    std::int32_t rows[32 * TILE_WORDS], panel[TILE_WORDS * GROUP];
    for (std::int64_t k = 0; k < TILE_WORDS; ++k)
        for (std::int64_t i = 0; i < 32; ++i) {
            rows[i * TILE_WORDS + k] = pair_of(half(left(i, 2 * k)), half(left(i, 2 * k + 1)));
            panel[k * GROUP + i] = pair_of(half(right(2 * k, i)), half(right(2 * k + 1, i)));
        }
    float found[32 * GROUP];
    Tiled::start();
    TiledPairs::multiply(rows, TILE_WORDS, panel, TILE_WORDS, found, GROUP);
    Tiled::stop();
    for (std::int64_t i = 0; i < 32; ++i)
        for (std::int64_t j = 0; j < GROUP; ++j) {
            std::int64_t sum = 0;
            for (std::int64_t k = 0; k < 2 * TILE_WORDS; ++k) sum += left(i, k) * right(k, j);
            if (found[i * GROUP + j] != static_cast<float>(sum)) return false;
        }
    return true;
}

}  // namespace
