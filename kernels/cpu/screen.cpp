// The screened forward on a CPU with AVX2: all logits from a product of 16-bit integers, and those that matter again
// from the operands in float32.
//
//     s~_ij = sum_k q(x_i)_k q(w_j)_k u_i v_j                q: a row over its unit, u_i or v_j, rounded to integers
//     z~_ij = slope (s~_ij + bias_j)                         e~_ij = exp(z~_ij - top_i)
//     K_i = {j : e~_ij >= keep sum_k e~_ik}, not the target  e_ij: e~_ij, or if it matters from the operands themselves
//     total_i = e_(i, target) + sum_(K_i) e_ij + sum_(others) e~_ij
//     near_i = slope / total_i sum_(K_i) e_ij w_j            tail_ib = slope / total_i sum_(others in block b) e~_ij
//
// Tiling: each call packs the head once, into panels of 16 rows with pairs of columns side by side, as pmaddwd takes
// them: two products of 16 bits and their 32-bit sum in each lane. A tile is 6 tokens by 16 entries, in 12 registers. A
// panel (32 H bytes) stays in the first cache, while the chunk's tokens, quantised alike, come from the second. A
// thread has a chunk of tokens and room for its logits, [tokens, V] in float32, and goes over them token by token. A
// row of 49152 fits the second cache.
// Traffic of a chunk: the packed head once (2 V H bytes); its logits written once and read three times, in cache; for
// each kept entry its row of the head once, for its logit and for `near`.
// Time: pmaddwd does 16 products and an FMA 8, at the same rate, so it takes half the time of a float32 GEMM.
// Numerics: a row's norm is 32767 - sqrt(H) / 2 units, so by Cauchy and Schwarz no sum of products passes 2^30. The
// error of s~_ij has a standard deviation of 13377 u_i v_j = 1.3e-5 |x_i| |w_j|. If this times p_ij is at least `keep`,
// the logit is computed again in float32; the target's always is. The tail has errors below `keep` too. A number in a
// row that is not finite makes the row's unit NaN, and so each of its logits.
#include "screen.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../rows.h"

namespace {

constexpr std::int64_t TILE_TOKENS = 6, TILE_ENTRIES = 16;
constexpr std::int64_t BLOCK = 256;  // of the tail: TAIL_BLOCK of the backends
constexpr float ERROR = 13377;       // standard deviation of a product of integers: 32767 / sqrt(6)

std::int64_t round_up(std::int64_t x, std::int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------------------------------------- operands

struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

__m128i eight_halves(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
__m256 load(const float* x) { return _mm256_loadu_ps(x); }
__m256 load(const float16* x) { return _mm256_cvtph_ps(eight_halves(x)); }
__m256 load(const bfloat16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_halves(x)), 16));
}

// The first `count` of eight, zeros after them.
template <typename T>
__m256 load_some(const T* x, std::int64_t count) {
    if (count >= 8) return load(x);
    T padded[8] = {};
    std::copy(x, x + count, padded);
    return load(padded);
}

void store_some(float* out, __m256 x, std::int64_t count) {
    if (count >= 8) return _mm256_storeu_ps(out, x);
    float eight[8];
    _mm256_storeu_ps(eight, x);
    std::copy(eight, eight + count, out);
}

float sum(__m256 x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

template <typename T>
float dot(const T* x, const T* y, std::int64_t count) {
    __m256 even = _mm256_setzero_ps(), odd = even;
    std::int64_t k = 0;
    for (; k + 16 <= count; k += 16) {
        even = _mm256_fmadd_ps(load(x + k), load(y + k), even);
        odd = _mm256_fmadd_ps(load(x + k + 8), load(y + k + 8), odd);
    }
    for (; k < count; k += 8) even = _mm256_fmadd_ps(load_some(x + k, count - k), load_some(y + k, count - k), even);
    return sum(_mm256_add_ps(even, odd));
}

// out += factor x
template <typename T>
void add_scaled(float* out, const T* x, float factor, std::int64_t count) {
    const __m256 factors = _mm256_set1_ps(factor);
    for (std::int64_t k = 0; k < count; k += 8) {
        const std::int64_t left = count - k;
        store_some(out + k, _mm256_fmadd_ps(load_some(x + k, left), factors, load_some(out + k, left)), left);
    }
}

// ---------------------------------------------------------------------------------------------- integers

template <typename T>
double norm(const T* row, std::int64_t depth) {
    __m256d low = _mm256_setzero_pd(), high = low;
    for (std::int64_t k = 0; k < depth; k += 8) {
        const __m256 x = load_some(row + k, depth - k);
        const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
        low = _mm256_fmadd_pd(a, a, low);
        high = _mm256_fmadd_pd(b, b, high);
    }
    double four[4];
    _mm256_storeu_pd(four, _mm256_add_pd(low, high));
    return std::sqrt(four[0] + four[1] + four[2] + four[3]);
}

// Integers of a row, its pair of columns k at out[k step]; returns their unit.
template <typename T>
float quantise(const T* row, std::int64_t depth, std::int32_t* out, std::int64_t step) {
    const double size = norm(row, depth);
    if (!(size <= std::numeric_limits<double>::max())) return NAN;  // whatever the integers are
    const double unit = size / (32767.0 - std::sqrt(static_cast<double>(depth)) / 2);
    const __m256d per_unit = _mm256_set1_pd(unit == 0 ? 0 : 1 / unit);
    for (std::int64_t k = 0; k < depth; k += 8) {
        const __m256 x = load_some(row + k, depth - k);
        const __m128i low = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), per_unit));
        const __m128i high = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)), per_unit));
        std::int32_t pairs[4];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs), _mm_packs_epi32(low, high));
        for (std::int64_t i = 0; i < 4 && k + 2 * i < depth; ++i) out[(k / 2 + i) * step] = pairs[i];
    }
    return static_cast<float>(unit);
}

// Rows in panels: panels[p][k][r] is the pair of columns k of row `size` p + r, by `order` where there is one; zeros for
// rows that are not there.
template <typename T>
void pack(const T* rows, const std::int64_t* order, std::int64_t count, std::int64_t depth, std::int64_t stride,
          std::int64_t size, std::int32_t* panels, float* units) {
    const std::int64_t pairs = (depth + 1) / 2;
    for (std::int64_t row = 0; row < round_up(count, size); ++row) {
        std::int32_t* const out = panels + row / size * size * pairs + row % size;
        units[row] = 0;
        if (row < count)
            units[row] = quantise(rows + (order == nullptr ? row : order[row]) * stride, depth, out, size);
        else
            for (std::int64_t k = 0; k < pairs; ++k) out[k * size] = 0;
    }
}

// logits[t][j] = units of both * sums of products + offset[j] for a tile, rows of `stride`.
void tile(const std::int32_t* tokens, const std::int32_t* entries, std::int64_t pairs, const float* token_units,
          const float* entry_units, const float* offset, float* logits, std::int64_t stride) {
    __m256i sums[TILE_TOKENS][2];  // in registers: every loop over them is unrolled
#pragma GCC unroll 6
    for (auto& row : sums) row[0] = row[1] = _mm256_setzero_si256();
    for (std::int64_t k = 0; k < pairs; ++k) {
        const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
        const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries + 8));
        entries += TILE_ENTRIES;
#pragma GCC unroll 6
        for (std::int64_t i = 0; i < TILE_TOKENS; ++i) {
            const __m256i token = _mm256_set1_epi32(tokens[i]);
            // As text, for GCC reorders the intrinsics until the sums no longer fit the registers.
            asm("vpaddd %1, %0, %0" : "+x"(sums[i][0]) : "x"(_mm256_madd_epi16(token, left)));
            asm("vpaddd %1, %0, %0" : "+x"(sums[i][1]) : "x"(_mm256_madd_epi16(token, right)));
        }
        tokens += TILE_TOKENS;
    }
    const auto logits_of = [=](__m256i row, float token_unit, std::int64_t first) {
        const __m256 unit = _mm256_mul_ps(_mm256_set1_ps(token_unit), load(entry_units + first));
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(row), unit, load(offset + first));
    };
#pragma GCC unroll 6
    for (std::int64_t i = 0; i < TILE_TOKENS; ++i) {
        _mm256_storeu_ps(logits + i * stride, logits_of(sums[i][0], token_units[i], 0));
        _mm256_storeu_ps(logits + i * stride + 8, logits_of(sums[i][1], token_units[i], 8));
    }
}

// ---------------------------------------------------------------------------------------------- rows of logits

// e^x for x <= 0 and NaN, right to 2^-22 of itself; 0 below -87.
__m256 exponential(__m256 x) {
    const __m256 log2e = _mm256_set1_ps(1.44269504088896341f);
    const __m256 whole = _mm256_round_ps(_mm256_mul_ps(x, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 rest = _mm256_fnmadd_ps(whole, _mm256_set1_ps(0.693359375f), x);  // ln 2 in two parts
    rest = _mm256_fnmadd_ps(whole, _mm256_set1_ps(-2.12194440e-4f), rest);
    __m256 value = _mm256_set1_ps(1.0f / 720);  // Taylor's, for |rest| <= ln 2 / 2
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        value = _mm256_fmadd_ps(value, rest, _mm256_set1_ps(c));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    value = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ), value);
}

float largest(const float* row, std::int64_t count) {
    __m256 found = _mm256_set1_ps(-INFINITY);
    for (std::int64_t j = 0; j < count; j += 8) found = _mm256_max_ps(found, load(row + j));
    float eight[8];
    _mm256_storeu_ps(eight, found);
    return *std::max_element(eight, eight + 8);
}

// row = exp(row - top), and its sums over blocks; returns the sum of all.
float exponentials(float* row, std::int64_t count, float top, float* blocks) {
    const __m256 tops = _mm256_set1_ps(top);
    double total = 0;
    for (std::int64_t first = 0; first < count; first += BLOCK) {
        __m256 sums = _mm256_setzero_ps();
        for (std::int64_t j = first; j < std::min(first + BLOCK, count); j += 8) {
            const __m256 e = exponential(_mm256_sub_ps(load(row + j), tops));
            _mm256_storeu_ps(row + j, e);
            sums = _mm256_add_ps(sums, e);
        }
        blocks[first / BLOCK] = sum(sums);
        total += blocks[first / BLOCK];
    }
    return static_cast<float>(total);
}

// Columns whose entry is at least the threshold, and how many; more than `room` where there is no room for them.
std::int64_t kept_columns(const float* row, std::int64_t count, const float* blocks, float threshold,
                          std::int32_t* columns, std::int64_t room) {
    const __m256 thresholds = _mm256_set1_ps(threshold);
    std::int64_t found = 0;
    for (std::int64_t first = 0; first < count; first += BLOCK) {
        if (!(blocks[first / BLOCK] >= threshold)) continue;
        for (std::int64_t j = first; j < std::min(first + BLOCK, count); j += 8) {
            int hits = _mm256_movemask_ps(_mm256_cmp_ps(load(row + j), thresholds, _CMP_GE_OQ));
            for (; hits != 0; hits &= hits - 1) {
                if (found == room) return room + 1;
                columns[found++] = static_cast<std::int32_t>(j + __builtin_ctz(static_cast<unsigned>(hits)));
            }
        }
    }
    return found;
}

// A chunk of tokens.
template <typename T>
class Screen {
  public:
    Screen(const logitless_screen& problem, std::int64_t first, std::int64_t count)
        : x(problem), hidden(static_cast<const T*>(x.hidden) + first * x.hidden_stride),
          weight(static_cast<const T*>(x.weight)), targets(x.targets + first), places(x.places + first),
          logprob(x.logprob + first), lse(x.lse + first), rows(x.rows + first * (blocks() + x.depth)),
          tokens(static_cast<std::size_t>(count)) {}

    std::int64_t run(float* logits, std::int32_t* counts, std::int32_t* columns, float* values, std::int64_t room) {
        multiply(logits);
        std::int64_t found = 0;
        for (std::int64_t t = 0; t < count(); ++t) {
            tokens[t].first = found;
            found += screen(t, logits + t * padded(), columns + found, values + found, room - found);
            if (found > room) return -1;
            counts[t] = static_cast<std::int32_t>(found - tokens[t].first);
        }
        refine(columns, values, found);
        for (std::int64_t t = 0; t < count(); ++t) finish(t, values + tokens[t].first, counts[t]);
        return found;
    }

  private:
    struct Token {
        float target, top;   // logits: the target's, the largest; exponentials are relative to that
        float sharp;         // exponential from which an entry is refined
        float unit;          // of its integers
        std::int64_t first;  // of its kept entries
    };

    std::int64_t count() const { return static_cast<std::int64_t>(tokens.size()); }
    std::int64_t padded() const { return round_up(x.vocabulary, TILE_ENTRIES); }
    std::int64_t blocks() const { return (x.vocabulary + BLOCK - 1) / BLOCK; }
    float* tail(std::int64_t t) const { return rows + t * (blocks() + x.depth); }
    float* near(std::int64_t t) const { return tail(t) + blocks(); }

    void multiply(float* logits) {
        const std::int64_t pairs = (x.depth + 1) / 2, stride = padded(), filled = round_up(count(), TILE_TOKENS);
        std::vector<std::int32_t> panels(static_cast<std::size_t>(filled * pairs));
        std::vector<float> units(static_cast<std::size_t>(filled));
        pack(hidden, nullptr, count(), x.depth, x.hidden_stride, TILE_TOKENS, panels.data(), units.data());
        for (std::int64_t t = 0; t < count(); ++t) tokens[t].unit = units[t];
        for (std::int64_t j = 0; j < stride; j += TILE_ENTRIES)
            for (std::int64_t t = 0; t < filled; t += TILE_TOKENS)
                tile(panels.data() + t * pairs, x.panels + j * pairs, pairs, units.data() + t, x.units + j, x.offset + j,
                     logits + t * stride + j, stride);
    }

    float refined(std::int64_t token, std::int64_t entry) const {
        const float s = dot(hidden + token * x.hidden_stride, weight + entry * x.weight_stride, x.depth);
        return x.slope * (s + (x.bias == nullptr ? 0.0f : x.bias[entry]));
    }

    // A token's kept entries with their exponentials, and the tail without them; returns how many there are, more than
    // `room` where they are.
    std::int64_t screen(std::int64_t t, float* row, std::int32_t* columns, float* values, std::int64_t room) {
        Token& token = tokens[t];
        token.target = refined(t, targets[t]);
        row[places[t]] = -INFINITY;
        token.top = std::max(largest(row, padded()), token.target);
        if (std::isinf(token.top)) token.top = token.top < 0 ? 0 : NAN;  // nothing but masks; no probabilities
        float* const sums = tail(t);
        const float total = exponentials(row, padded(), token.top, sums) + std::exp(token.target - token.top);
        token.sharp = x.keep * total / (token.unit * x.largest_unit * ERROR);
        const std::int64_t kept = kept_columns(row, padded(), sums, x.keep * total, columns, room);
        if (kept > room) return kept;
        for (std::int64_t k = 0; k < kept; ++k) {
            values[k] = row[columns[k]];
            sums[columns[k] / BLOCK] -= values[k];
            if (x.order != nullptr) columns[k] = static_cast<std::int32_t>(x.order[columns[k]]);
        }
        return kept;
    }

    // Kept entries by their column, so that the head is read in order and a row of it once for all tokens.
    std::vector<std::int32_t> by_column(const std::int32_t* columns, std::int64_t kept) const {
        std::vector<std::int32_t> next(static_cast<std::size_t>(x.vocabulary) + 1), order(static_cast<std::size_t>(kept));
        for (std::int64_t k = 0; k < kept; ++k) ++next[columns[k] + 1];
        for (std::int64_t j = 0; j < x.vocabulary; ++j) next[j + 1] += next[j];
        for (std::int64_t k = 0; k < kept; ++k) order[next[columns[k]]++] = static_cast<std::int32_t>(k);
        return order;
    }

    // The kept entries' rows of the head, and their exponentials from the operands where the screen's error matters.
    void refine(const std::int32_t* columns, float* values, std::int64_t kept) {
        std::vector<std::int32_t> owner(static_cast<std::size_t>(kept));
        for (std::int64_t t = 0; t < count(); ++t)
            std::fill(owner.begin() + tokens[t].first, t + 1 < count() ? owner.begin() + tokens[t + 1].first : owner.end(),
                      static_cast<std::int32_t>(t));
        for (std::int64_t t = 0; t < count(); ++t) std::fill_n(near(t), x.depth, 0.0f);
        for (const std::int32_t k : by_column(columns, kept)) {
            const std::int64_t t = owner[k], entry = columns[k];
            if (values[k] >= tokens[t].sharp) values[k] = std::exp(refined(t, entry) - tokens[t].top);
            add_scaled(near(t), weight + entry * x.weight_stride, values[k], x.depth);
        }
    }

    void finish(std::int64_t t, float* values, std::int64_t kept) {
        float* const sums = tail(t);
        std::replace_if(sums, sums + blocks(), [](float mass) { return mass < 0; }, 0.0f);  // by rounding
        const double all = std::accumulate(sums, sums + blocks(), std::accumulate(values, values + kept, 0.0));
        logitless::Moments<float> others = logitless::no_columns<float>();
        others.sum = static_cast<float>(all);
        if (others.sum != 0) others.max = tokens[t].top;  // any base will do for a sum
        const auto statistics = logitless::finish(others, tokens[t].target, x.vocabulary);
        logprob[t] = statistics.logprob;
        lse[t] = statistics.lse;
        const float scale = x.slope / (others.sum + std::exp(tokens[t].target - tokens[t].top));
        const auto scaled = [=](float value) { return value * scale; };
        std::transform(values, values + kept, values, scaled);
        std::transform(sums, sums + blocks() + x.depth, sums, scaled);
    }

    const logitless_screen& x;
    const T *const hidden, *const weight;
    const std::int64_t *const targets, *const places;
    float *const logprob, *const lse, *const rows;
    std::vector<Token> tokens;
};

// Calls a function with a null pointer of the operands' type.
template <typename Function>
auto with_type(std::int32_t dtype, Function function) {
    if (dtype == LOGITLESS_SCREEN_BFLOAT16) return function(static_cast<const bfloat16*>(nullptr));
    if (dtype == LOGITLESS_SCREEN_FLOAT16) return function(static_cast<const float16*>(nullptr));
    return function(static_cast<const float*>(nullptr));
}

}  // namespace

std::int32_t logitless_screen_supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

void logitless_screen_pack(const void* weight, std::int32_t dtype, std::int64_t vocabulary, std::int64_t depth,
                           std::int64_t stride, const std::int64_t* order, std::int64_t first, std::int64_t count,
                           std::int32_t* panels, float* units) {
    with_type(dtype, [=](auto type) {
        const auto* const rows = static_cast<decltype(type)>(weight) + (order == nullptr ? first * stride : 0);
        pack(rows, order == nullptr ? nullptr : order + first, std::min(count, vocabulary - first), depth, stride,
             TILE_ENTRIES, panels + first * ((depth + 1) / 2), units + first);
    });
}

std::int64_t logitless_screen_chunk(const logitless_screen* screen, std::int64_t first, std::int64_t count,
                                    float* logits, std::int32_t* counts, std::int32_t* columns, float* values,
                                    std::int64_t room) {
    return with_type(screen->dtype, [=](auto type) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
        return Screen<T>(*screen, first, count).run(logits, counts, columns, values, room);
    });
}
