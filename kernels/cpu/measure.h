// One pass over a chunk's logits for their largest, one that turns them into exponentials and sums.
//
//     z_ij = slope (s_ij + bias_j)       top_i = max_j z_ij
//     e_ij = exp(z_ij - top_i), 0 at the target          sums of e, e log e, e^2
//
// The sum of e is in two parts, of the entries that are as large as the top and of the rest: next to a 1 a small rest, and
// with it the entropy of a confident token, would lose its digits.
//
// Tiling: the chunk is vocabulary-major, tokens in lanes; a thread takes whole vectors of tokens, all of the vocabulary
// one after the other, so nothing is summed across lanes or threads.
// Traffic: the chunk is read twice and written once, in float32 or, narrowed, in bfloat16.
// Numerics: sums over 256 entries, then over those sums. Exponentials below 2^-125 are 0: no denormal enters a product.
#pragma once

#include "logitless_cpu.h"
#include "stream.h"

namespace {

constexpr float LOG_OF_ZERO = -1000;  // stands for log 0 where it is multiplied by 0

// The tokens of one vector, of which `here` are there.
class Measured {
  public:
    Measured(float* logits, std::int64_t row, std::int64_t vocabulary, std::int64_t here, const float* bias, float slope)
        : z(logits), stride(row), size(vocabulary), lanes(here), offsets(bias), factor(all(slope)), scale(slope) {}

    // The targets' logits, whose places are masked.
    void take_targets(const std::int64_t* targets, float* found) {
        for (std::int64_t t = 0; t < lanes; ++t) {
            float& raw = z[targets[t] * stride + t];
            found[t] = scale * (raw + (offsets == nullptr ? 0 : offsets[targets[t]]));
            raw = -INFINITY;
        }
    }

    void find_top(const float* targets) {
        top = larger(load_some(targets, lanes), all(LOWEST));  // a NaN may be passed over here, and reaches the sums
        for (std::int64_t j = 0; j < size; ++j) top = larger(logit(j), top);
    }

    void exponentiate(std::int32_t want, std::uint16_t* narrow) {
        for (std::int64_t first = 0; first < size; first += BLOCK) {
            Floats sum = all(0), leading = sum, weighted = sum, square = sum;
            for (std::int64_t j = first; j < smaller(first + BLOCK, size); ++j) {
                const Floats shifted = subtract(logit(j), top), e = exponential(shifted);
                const Floats lead = zero_below(e, shifted, all(0));
                sum = add(sum, subtract(e, lead));
                leading = add(leading, lead);
                if ((want & 1) != 0) weighted = fma(larger(all(LOG_OF_ZERO), shifted), e, weighted);
                if ((want & 2) != 0) square = fma(e, e, square);
                put(j, e, narrow);
            }
            leads = add(leads, leading);
            rest = add(rest, sum);
            logarithms = add(logarithms, weighted);
            squares = add(squares, square);
        }
    }

    Floats top = all(0), leads = all(0), rest = all(0), logarithms = all(0), squares = all(0);

  private:
    Floats logit(std::int64_t j) const {
        return multiply(factor, add(load_some(z + j * stride, lanes), all(offsets == nullptr ? 0 : offsets[j])));
    }
    void put(std::int64_t j, Floats e, std::uint16_t* narrow) {
        if (narrow == nullptr) return store_some(z + j * stride, e, lanes);
        std::uint16_t bits[LANES];
        store_halves(bits, halves(bfloat16_bits(e)));
        std::memcpy(narrow + j * stride, bits, static_cast<std::size_t>(2 * lanes));
    }

    float* const z;
    const std::int64_t stride, size, lanes;
    const float* const offsets;
    const Floats factor;
    const float scale;
};

void measure(float* z, std::int64_t stride, std::int64_t vocabulary, std::int64_t count, const float* bias, float slope,
             const std::int64_t* targets, std::int32_t want, std::uint16_t* narrow, float* target_logit, float* moments,
             std::int64_t moments_stride) {
    for (std::int64_t t = 0; t < count; t += LANES) {
        const std::int64_t here = smaller(LANES, count - t);
        Measured tokens(z + t, stride, vocabulary, here, bias, slope);
        tokens.take_targets(targets + t, target_logit + t);
        tokens.find_top(target_logit + t);
        tokens.exponentiate(want, narrow == nullptr ? nullptr : narrow + t);
        const Floats found[] = {tokens.top, tokens.leads, tokens.rest, tokens.logarithms, tokens.squares};
        for (std::int64_t i = 0; i < 5; ++i) store_some(moments + i * moments_stride + t, found[i], here);
    }
}

}  // namespace
