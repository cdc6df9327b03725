// The tiles that every product is made of: a few rows, broadcast word by word, times a panel of tokens in lanes.
//
//     out[i][t] = sum_k row_i[k] panel[k][t]        i < ROWS, t < GROUP, k over words of 32 bits
//
// A word is one float, or a pair of neighbouring columns in 16 bits each, whose two products are summed. A panel holds
// GROUP tokens (two vectors), word after word. All sums of a tile are in registers.
//
//                     a word           instruction            words a step     sums in registers
//     Fused           float            vfmadd231ps            1                AVX2 6 x 2, AVX-512 8 x 2
//     Integers        two int16        vpmaddwd and vpaddd    1                6 x 2
//                                      vpdpwssd (VNNI)        1                8 x 2
//     Brains          two bfloat16     vdpbf16ps              1                8 x 2
//     Tiles (tiles.h) two bfloat16     tdpbf16ps (AMX)        16               four tiles of 16 x 16
//
// Multiplications and additions are text, for GCC reorders the intrinsics until the sums no longer fit the registers: it
// halved the speed (GCC 12).
#pragma once

#include "vector.h"

namespace {

constexpr std::int64_t GROUP = 2 * LANES;  // tokens of a panel

struct Fused {
    static constexpr std::int64_t ROWS = LANES == 8 ? 6 : 8;
    static void add(Words& sum, Words a, Words b) {
#ifdef __AVX512F__
        asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
        asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#endif
    }
    static Floats total(Words sum) { return as_floats(sum); }
};

struct Integers {
    static constexpr std::int64_t ROWS = Fused::ROWS;
    static void add(Words& sum, Words a, Words b) {
#ifdef __AVX512VNNI__
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
        asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
#endif
    }
    static Floats total(Words sum) { return converted(sum); }
};

#ifdef __AVX512BF16__
struct Brains {
    static constexpr std::int64_t ROWS = Fused::ROWS;
    static void add(Words& sum, Words a, Words b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
    static Floats total(Words sum) { return as_floats(sum); }
};
#endif

// Rows whose word k of row i is at i row + k column. With `added`, the sums are added to what is in `out`.
template <typename Kind, bool CONTIGUOUS, bool ADDED>
void tile(const std::int32_t* words, std::int64_t row, std::int64_t column, const std::int32_t* panel,
          std::int64_t depth, float* out, std::int64_t stride) {
    constexpr std::int64_t ROWS = Kind::ROWS;
    Words sums[ROWS][2];  // in registers: every loop over them is unrolled
#pragma GCC unroll 8
    for (auto& sum : sums) sum[0] = sum[1] = zero_words();
    for (std::int64_t k = 0; k < depth; ++k) {
        const Words left = load_words(panel), right = load_words(panel + LANES);
        panel += GROUP;
#pragma GCC unroll 8
        for (std::int64_t i = 0; i < ROWS; ++i) {
            const Words one = all_words(CONTIGUOUS ? words[i * row + k] : words[k * column + i]);
            Kind::add(sums[i][0], one, left);
            Kind::add(sums[i][1], one, right);
        }
    }
#pragma GCC unroll 8
    for (std::int64_t i = 0; i < ROWS; ++i) {
        float* const to = out + i * stride;
        const Floats left = Kind::total(sums[i][0]), right = Kind::total(sums[i][1]);
        store(to, ADDED ? add(load(to), left) : left);
        store(to + LANES, ADDED ? add(load(to + LANES), right) : right);
    }
}

}  // namespace
