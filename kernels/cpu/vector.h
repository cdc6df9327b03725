// One vector of floats, of 8 (AVX2) or 16 lanes (AVX-512), under the same names.
//
// All of it has internal linkage, as all that is compiled for one set of instructions must: a function that the linker
// shared among the sets could run instructions that the processor lacks.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

std::int64_t round_up(std::int64_t x, std::int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Memory without a constructor's zeros; `failed` where there was none.
template <typename T>
class Array {
  public:
    explicit Array(std::int64_t count)
        : data(static_cast<T*>(std::aligned_alloc(64, static_cast<std::size_t>(round_up(count * sizeof(T) + 1, 64))))) {}
    ~Array() { std::free(data); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    T& operator[](std::int64_t i) { return data[i]; }
    const T& operator[](std::int64_t i) const { return data[i]; }
    bool failed() const { return data == nullptr; }

    T* const data;
};

template <typename... Arrays>
bool any_failed(const Arrays&... arrays) {
    return (... || arrays.failed());
}

#ifdef __AVX512F__

constexpr std::int64_t LANES = 16;
typedef __m512 Floats;
typedef __m512i Words;

Floats all(float x) { return _mm512_set1_ps(x); }
Floats load(const float* x) { return _mm512_loadu_ps(x); }
Floats load(const float16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
Floats load(const bfloat16* x) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
void store(float* out, Floats x) { _mm512_storeu_ps(out, x); }
Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where either is NaN
Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
unsigned at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// x, but 0 where a < b
Floats zero_below(Floats x, Floats a, Floats b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
}
// x 2^whole, for a whole number that leaves a normal float
Floats scaled(Floats x, Floats whole) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_cvtps_epi32(whole), 23)));
}
void store_integers(std::uint16_t* out, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}
__m256i halves(__m512i words) { return _mm512_cvtepi32_epi16(words); }
void store_halves(std::uint16_t* out, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x); }
float sum(Floats x) { return _mm512_reduce_add_ps(x); }

Words zero_words() { return _mm512_setzero_si512(); }
Words load_words(const std::int32_t* x) { return _mm512_loadu_si512(x); }
Words all_words(std::int32_t x) { return _mm512_set1_epi32(x); }
Floats as_floats(Words x) { return _mm512_castsi512_ps(x); }
Words as_words(Floats x) { return _mm512_castps_si512(x); }
Floats converted(Words x) { return _mm512_cvtepi32_ps(x); }
Words shifted_right(Words x) { return _mm512_srli_epi32(x, 16); }
Words shifted_left(Words x) { return _mm512_slli_epi32(x, 16); }
Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
// a where x is a number, else b
Words where_number(Floats x, Words a, Words b) {
    return _mm512_mask_mov_epi32(b, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), a);
}

#else

constexpr std::int64_t LANES = 8;
typedef __m256 Floats;
typedef __m256i Words;

__m128i eight_halves(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
Floats all(float x) { return _mm256_set1_ps(x); }
Floats load(const float* x) { return _mm256_loadu_ps(x); }
Floats load(const float16* x) { return _mm256_cvtph_ps(eight_halves(x)); }
Floats load(const bfloat16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_halves(x)), 16));
}
void store(float* out, Floats x) { _mm256_storeu_ps(out, x); }
Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
Floats rounded(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
unsigned at_least(Floats a, Floats b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
Floats zero_below(Floats x, Floats a, Floats b) { return _mm256_andnot_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ), x); }
Floats scaled(Floats x, Floats whole) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23)));
}
__m128i halves(__m256i words) {
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
void store_halves(std::uint16_t* out, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), x); }
void store_integers(std::uint16_t* out, Floats x) {
    const __m256i whole = _mm256_cvtps_epi32(x);
    store_halves(out, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
float sum(Floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

Words zero_words() { return _mm256_setzero_si256(); }
Words load_words(const std::int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
Words all_words(std::int32_t x) { return _mm256_set1_epi32(x); }
Floats as_floats(Words x) { return _mm256_castsi256_ps(x); }
Words as_words(Floats x) { return _mm256_castps_si256(x); }
Floats converted(Words x) { return _mm256_cvtepi32_ps(x); }
Words shifted_right(Words x) { return _mm256_srli_epi32(x, 16); }
Words shifted_left(Words x) { return _mm256_slli_epi32(x, 16); }
Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
Words where_number(Floats x, Words a, Words b) {
    return _mm256_blendv_epi8(b, a, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q)));
}

#endif

// The first `count` of a vector, zeros after them.
template <typename T>
Floats load_some(const T* x, std::int64_t count) {
    if (count >= LANES) return load(x);
    T padded[LANES] = {};
    for (std::int64_t i = 0; i < count; ++i) padded[i] = x[i];
    return load(padded);
}

void store_some(float* out, Floats x, std::int64_t count) {
    if (count >= LANES) return store(out, x);
    float padded[LANES];
    store(padded, x);
    for (std::int64_t i = 0; i < count; ++i) out[i] = padded[i];
}

// The bits of bfloat16 in the low half of each word, rounded to the nearest, to even between two; NaN stays NaN.
Words bfloat16_bits(Floats x) {
    const Words bits = as_words(x), odd = both(shifted_right(bits), all_words(1));
    const Words nearest = shifted_right(add_words(bits, add_words(odd, all_words(0x7fff))));
    return where_number(x, nearest, all_words(0x7fc0));
}

// e^x for x <= 0 and NaN, right to 2^-23 of itself; 0 below -87, where it would be denormal.
Floats exponential(Floats x) {
    constexpr float COEFFICIENTS[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    const Floats whole = rounded(multiply(x, all(1.44269504088896341f)));
    Floats rest = fma(whole, all(-0.693359375f), x);  // ln 2 in two parts
    rest = fma(whole, all(2.12194440e-4f), rest);
    Floats value = all(1.0f / 5040);  // Taylor's, for |rest| <= ln 2 / 2
#pragma GCC unroll 7
    for (const float c : COEFFICIENTS) value = fma(value, rest, all(c));
    return zero_below(scaled(value, whole), x, all(-87.0f));
}

template <typename T>
float dot(const T* x, const T* y, std::int64_t count) {
    Floats even = all(0), odd = even;
    std::int64_t k = 0;
    for (; k + 2 * LANES <= count; k += 2 * LANES) {
        even = fma(load(x + k), load(y + k), even);
        odd = fma(load(x + k + LANES), load(y + k + LANES), odd);
    }
    for (; k < count; k += LANES) even = fma(load_some(x + k, count - k), load_some(y + k, count - k), even);
    return sum(add(even, odd));
}

// The Euclidean norm, in double, so that neither overflows nor vanishes what float32 holds.
template <typename T>
double norm(const T* row, std::int64_t depth) {
    double total = 0;
    for (std::int64_t k = 0; k < depth; k += LANES) {
        float x[LANES];
        store(x, load_some(row + k, depth - k));
        double part = 0;
        for (const float one : x) part += static_cast<double>(one) * one;
        total += part;
    }
    return std::sqrt(total);
}

}  // namespace
