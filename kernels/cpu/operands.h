// Rows of operands as words of a product.
//
//     Floats32<T>    each column as a float: the product has float32's error
//     Pairs          two columns of bfloat16 in a word, as they stand: likewise
//     Rounded<T>     two columns in a word, as integers of the row's unit: a product is off by 1.3e-5 |x_i| |w_j|
//                    (standard deviation)
//     Split<T>       each column as a bfloat16 and the bfloat16 of what that lacks (tiles.h): three products, off by less
//
// A row's norm is 32767 - sqrt(depth) / 2 units, so that by Cauchy and Schwarz no sum of products of integers passes 2^30.
#pragma once

#include "tile.h"

namespace {

constexpr std::int64_t LINE = 16;  // words of a cache line

// The norm of a row over the largest that its integers may have; 0 where its inverse is no number.
template <typename T>
float unit_of(const T* row, std::int64_t depth) {
    const double size = norm(row, depth);
    if (!(size <= 1.7976931348623157e308)) return NAN;
    const float unit = static_cast<float>(size / (32767.0 - std::sqrt(static_cast<double>(depth)) / 2));
    return unit < 1e-37f ? 0 : unit;
}

// What the forms below share: how many words a row of a product has, and its tiles, by the kind of a word.
template <typename OF_WORDS>
struct Form {
    typedef OF_WORDS Kind;
    static constexpr std::int64_t ROWS = Kind::ROWS;
    static constexpr bool SCREENS = false;  // whether a product has an error beyond float32's
    static constexpr bool SCALED = false;   // whether a product is in units of both rows
    static constexpr bool TILED = false;    // whether it is made by AMX's tiles (tiles.h)
    static void start() {}
    static void stop() {}
    static void multiply(const std::int32_t* rows, std::int64_t row, const std::int32_t* panel, std::int64_t words,
                         float* out, std::int64_t stride) {
        tile<Kind, true, false>(rows, row, 0, panel, words, out, stride);
    }
};

// `stage` writes the words of a row, and up to a cache line after them.
template <typename T>
struct Floats32 : Form<Fused> {
    static std::int64_t words(std::int64_t depth) { return depth; }
    static void stage(const T* row, std::int64_t depth, float, std::int32_t* out) {
        for (std::int64_t k = 0; k < depth; k += LANES)
            store(reinterpret_cast<float*>(out) + k, load_some(row + k, depth - k));
    }
};

template <typename T>
struct Rounded : Form<Integers> {
    static constexpr bool SCREENS = true, SCALED = true;
    static std::int64_t words(std::int64_t depth) { return (depth + 1) / 2; }
    static void stage(const T* row, std::int64_t depth, float unit, std::int32_t* out) {
        const Floats per_unit = all(unit > 0 ? 1 / unit : 0);
        std::uint16_t* const halves = reinterpret_cast<std::uint16_t*>(out);
        for (std::int64_t k = 0; k < depth; k += LANES)
            store_integers(halves + k, ::multiply(load_some(row + k, depth - k), per_unit));
    }
};

// The word of two 16-bit columns.
std::int32_t pair_of(std::uint32_t low, std::uint32_t high) { return static_cast<std::int32_t>(low | high << 16); }

// A row of 16-bit columns as it stands; the last pair of an odd number has a zero.
void stage_pairs(const bfloat16* row, std::int64_t depth, std::int32_t* out) {
    out[depth / 2] = 0;
    std::memcpy(out, row, static_cast<std::size_t>(depth) * sizeof *row);
}

#ifdef __AVX512BF16__
struct Pairs : Form<Brains> {
    static std::int64_t words(std::int64_t depth) { return (depth + 1) / 2; }
    static void stage(const bfloat16* row, std::int64_t depth, float, std::int32_t* out) { stage_pairs(row, depth, out); }
};
#endif

// Rows of `count` tokens in panels of GROUP, zeros for those that are not there. `units`: null where a form has none.
template <typename T, typename Operand>
void pack(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t depth, const float* units,
          std::int32_t* staged, std::int32_t* panels) {
    const std::int64_t words = Operand::words(depth);
    for (std::int64_t t = 0; t < round_up(count, GROUP); ++t) {
        std::int32_t* const out = panels + t / GROUP * GROUP * words + t % GROUP;
        if (t < count) Operand::stage(rows + t * stride, depth, units == nullptr ? 1 : units[t], staged);
        for (std::int64_t k = 0; k < words; ++k) out[k * GROUP] = t < count ? staged[k] : 0;
    }
}

}  // namespace
