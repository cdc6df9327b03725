// The sparse forward: all logits of a chunk of tokens, block after block of the vocabulary, none of them kept but those
// that carry probability.
//
//     z~_ij = slope (s~_ij + bias_j)               s~: the product of operands.h; slope and bias as in kernels/MATH.md
//     e~_ij = exp(z~_ij - top_i)                   top_i: the largest logit, by the end
//     K_i = {j : e~_ij >= keep sum_k e~_ik}, not the target  e_ij: e~_ij, or if it matters from the operands themselves
//     total_i = e_(i, target) + sum_(K_i) e_ij + sum_(others) e~_ij
//     near_i = slope / total_i sum_(K_i) e_ij w_j            tail_ib = slope / total_i sum_(others in block b) e~_ij
//
// Tiling: a thread has up to 256 tokens, as panels of the product. It takes the vocabulary in blocks of 256 entries: their
// rows are staged as words, a tile's at a time, and multiplied with all panels. The block's logits, vocabulary-major with
// tokens in lanes, become exponentials where they lie: relative to the largest logit so far, which is noted for each block
// and token. An entry is a candidate if it reaches the threshold for what its row sums up to so far, which is less than in
// the end. Once all blocks are done, candidates below the final threshold fall away.
// Traffic of a chunk: the head once. Logits stay in the second cache (256 KiB of them, 300 KiB of panels with H 576). For
// each kept entry its row of the head, whose block then comes from the third cache.
// Numerics: see operands.h. If an error's standard deviation times p_ij is at least `keep`, the logit is computed again in
// float32; the target's always is. The tail has errors below `keep` too. A number in a row that is not finite reaches each
// of its logits: it makes the row's unit NaN.
#pragma once

#include "../rows.h"
#include "logitless_cpu.h"
#include "operands.h"

namespace {

constexpr std::int64_t BLOCK = 256;  // entries of a block of the tail: TAIL_BLOCK of the backends
constexpr std::int64_t RUN = 16;     // entries whose largest is compared first
constexpr float ERROR = 13377;       // standard deviation of a product of integers: 32767 / sqrt(6)
constexpr float LOWEST = -3.4e38f;   // stands for the largest of no logits

// out += sum_m value_m row_m, for rows at `at[m]` of `table`.
template <typename T>
void add_rows(float* out, const T* table, std::int64_t stride, const std::int32_t* at, const float* values,
              std::int64_t count, std::int64_t depth) {
    std::int64_t k = 0;
    for (; k + 4 * LANES <= depth; k += 4 * LANES) {
        Floats sums[4] = {load(out + k), load(out + k + LANES), load(out + k + 2 * LANES), load(out + k + 3 * LANES)};
        for (std::int64_t m = 0; m < count; ++m) {
            const T* const row = table + at[m] * stride + k;
            const Floats value = all(values[m]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sums[i] = fma(load(row + i * LANES), value, sums[i]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(out + k + i * LANES, sums[i]);
    }
    for (; k < depth; k += LANES) {
        const std::int64_t left = depth - k;
        Floats sum = load_some(out + k, left);
        for (std::int64_t m = 0; m < count; ++m)
            sum = fma(load_some(table + at[m] * stride + k, left), all(values[m]), sum);
        store_some(out + k, sum, left);
    }
}

// A chunk of tokens.
template <typename T, typename Operand>
class Stream {
  public:
    Stream(const logitless_stream& problem, std::int64_t first, std::int64_t tokens, std::int64_t most)
        : x(problem), hidden(static_cast<const T*>(x.hidden) + first * x.hidden_stride),
          weight(static_cast<const T*>(x.weight)), targets(x.targets + first), places(x.places + first),
          logprob(x.logprob + first), lse(x.lse + first), rows(x.rows + first * (blocks() + x.depth)), count(tokens),
          room(most), padded(round_up(tokens, GROUP)), stride(padded + LANES), words(Operand::words(x.depth)),
          row(round_up(words, LINE) + LINE), capacity(2 * most + BLOCK * padded), panels(padded * words),
          staged(Operand::ROWS * row + 2 * LINE), logits((BLOCK + Operand::ROWS) * stride), unit(padded), target(padded),
          top(padded), total(padded), tops(blocks() * padded), masses(blocks() * padded), token(capacity),
          place(capacity), value(capacity), ends(blocks() + 1), sorted(capacity), cursor(padded + 1) {}

    std::int64_t run(std::int32_t* counts, std::int32_t* columns, float* values) {
        if (any_failed(panels, staged, logits, unit, target, top, total, tops, masses, token, place, value, ends, sorted,
                       cursor))
            return -2;
        begin();
        Operand::start();
        bool fits = true;
        for (std::int64_t b = 0; fits && b < blocks(); ++b) {
            multiply(b);
            measure(b);
            fits = choose(b);
        }
        Operand::stop();
        if (!fits) return -1;
        settle(blocks());
        if (found > room) return -1;
        collect(counts, columns, values);
        for (std::int64_t t = 0; t < count; ++t) finish(t, values + cursor[t] - counts[t], counts[t]);
        return found;
    }

  private:
    std::int64_t blocks() const { return (x.vocabulary + BLOCK - 1) / BLOCK; }
    std::int64_t size(std::int64_t b) const { return smaller(BLOCK, x.vocabulary - b * BLOCK); }
    std::int64_t entry(std::int64_t at) const { return x.order == nullptr ? at : x.order[at]; }
    float* tail(std::int64_t t) const { return rows + t * (blocks() + x.depth); }
    float* near(std::int64_t t) const { return tail(t) + blocks(); }

    float refined(std::int64_t t, std::int64_t j) const {
        const float s = dot(hidden + t * x.hidden_stride, weight + j * x.weight_stride, x.depth);
        return x.slope * (s + (x.bias == nullptr ? 0.0f : x.bias[j]));
    }

    void begin() {
        for (std::int64_t t = 0; t < padded; ++t) {
            unit[t] = t < count && Operand::SCREENS ? unit_of(hidden + t * x.hidden_stride, x.depth) : 1;
            target[t] = t < count ? refined(t, targets[t]) : 0;
            top[t] = target[t] > LOWEST || std::isnan(target[t]) ? target[t] : LOWEST;
            total[t] = t < count ? std::exp(target[t] - top[t]) : INFINITY;  // nothing of no token is kept
        }
        pack<T, Operand>(hidden, x.hidden_stride, count, x.depth, unit.data, staged.data, panels.data);
        found = 0;
        ends[0] = 0;
    }

    // Raw products of a block.
    void multiply(std::int64_t b) {
        for (std::int64_t first = 0; first < size(b); first += Operand::ROWS) {
            for (std::int64_t i = 0; i < Operand::ROWS; ++i) {
                std::int32_t* const out = staged.data + i * row;
                if (first + i < size(b)) {
                    const std::int64_t j = entry(b * BLOCK + first + i);
                    Operand::stage(weight + j * x.weight_stride, x.depth, x.units == nullptr ? 1 : x.units[j], out);
                } else {
                    std::memset(out, 0, static_cast<std::size_t>(4 * words));
                }
            }
            for (std::int64_t t = 0; t < padded; t += GROUP)
                Operand::multiply(staged.data, row, panels.data + t * words, words, logits.data + first * stride + t, stride);
        }
    }

    // Logits instead of raw products, then exponentials; the block's masses, and what all blocks so far sum up to.
    void measure(std::int64_t b) {
        float scales[BLOCK], offsets[BLOCK];
        for (std::int64_t i = 0; i < size(b); ++i) {
            const std::int64_t j = entry(b * BLOCK + i);
            scales[i] = Operand::SCALED ? x.slope * x.units[j] : x.slope;
            offsets[i] = x.bias == nullptr ? 0 : x.slope * x.bias[j];
        }
        for (std::int64_t t = 0; t < padded; t += LANES) {
            const Floats units = Operand::SCALED ? load(unit.data + t) : all(1);
            Floats found_top = load(top.data + t);
            for (std::int64_t i = 0; i < size(b); ++i) {
                float* const at = logits.data + i * stride + t;
                const Floats z = fma(load(at), ::multiply(units, all(scales[i])), all(offsets[i]));
                store(at, z);
                found_top = larger(found_top, z);
            }
            store(tops.data + b * padded + t, found_top);
        }
        for (std::int64_t t = 0; t < count; ++t)
            if (places[t] / BLOCK == b) logits[places[t] % BLOCK * stride + t] = -INFINITY;
        for (std::int64_t t = 0; t < padded; t += LANES) {
            const Floats tops_now = load(tops.data + b * padded + t);
            Floats mass = all(0);
            for (std::int64_t i = 0; i < size(b); ++i) {
                float* const at = logits.data + i * stride + t;
                const Floats e = exponential(subtract(load(at), tops_now));
                store(at, e);
                mass = add(mass, e);
            }
            const Floats before = exponential(subtract(load(top.data + t), tops_now));
            store(masses.data + b * padded + t, mass);
            store(total.data + t, fma(load(total.data + t), before, mass));
            store(top.data + t, tops_now);
        }
    }

    // Candidates of a block; false where there is no room for them.
    bool choose(std::int64_t b) {
        if (found > capacity - BLOCK * padded) {
            settle(b);
            if (found > room) return false;
        }
        for (std::int64_t t = 0; t < padded; t += LANES) {
            const Floats threshold = ::multiply(load(total.data + t), all(x.keep));
            for (std::int64_t first = 0; first < size(b); first += RUN) choose_run(b, first, t, threshold);
        }
        ends[b + 1] = found;
        return true;
    }

    void choose_run(std::int64_t b, std::int64_t first, std::int64_t t, Floats threshold) {
        const std::int64_t last = smaller(first + RUN, size(b));
        Floats most = all(0);
        for (std::int64_t i = first; i < last; ++i) most = larger(most, load(logits.data + i * stride + t));
        if (at_least(most, threshold) == 0) return;
        for (std::int64_t i = first; i < last; ++i) {
            const float* const at = logits.data + i * stride + t;
            for (unsigned hits = at_least(load(at), threshold); hits != 0; hits &= hits - 1) {
                const std::int64_t lane = __builtin_ctz(hits);
                token[found] = static_cast<std::int32_t>(t + lane);
                place[found] = static_cast<std::int32_t>(b * BLOCK + i);
                value[found++] = at[lane];
            }
        }
    }

    // Makes what the first blocks left relative to the largest logit now, and drops candidates that are too small by now.
    void settle(std::int64_t done) {
        std::int64_t kept = 0, from = 0;
        for (std::int64_t b = 0; b < done; ++b) {
            for (std::int64_t t = 0; t < padded; t += LANES) {
                float* const at = tops.data + b * padded + t;
                const Floats now = load(top.data + t), factor = exponential(subtract(load(at), now));
                float* const mass = masses.data + b * padded + t;
                store(mass, ::multiply(load(mass), factor));
                store(at, now);
                store(logits.data + BLOCK * stride + t, factor);  // the rows of a last tile are free by now
            }
            for (; from < ends[b + 1]; ++from) {
                const std::int64_t t = token[from];
                const float now = value[from] * logits[BLOCK * stride + t];
                if (!(now >= x.keep * total[t])) continue;
                token[kept] = token[from];
                place[kept] = place[from];
                value[kept++] = now;
            }
            ends[b + 1] = kept;
        }
        found = kept;
    }

    // Kept entries token after token, their exponentials from the operands where the error matters, and `near`.
    void collect(std::int32_t* counts, std::int32_t* columns, float* values) {
        for (std::int64_t t = 0; t < count; ++t) {
            counts[t] = 0;
            std::memset(near(t), 0, static_cast<std::size_t>(4 * x.depth));
        }
        for (std::int64_t k = 0; k < found; ++k) ++counts[token[k]];
        cursor[0] = 0;
        for (std::int64_t t = 1; t < count; ++t) cursor[t] = cursor[t - 1] + counts[t - 1];
        for (std::int64_t b = 0; b < blocks(); ++b) {
            sort_by_token(ends[b], ends[b + 1]);
            for (std::int64_t k = ends[b]; k < ends[b + 1];) k = collect_run(b, k, ends[b + 1], columns, values);
        }
    }

    // `sorted`: a block's candidates by their token, in the order of their places.
    void sort_by_token(std::int64_t first, std::int64_t last) {
        std::int32_t* const starts = reinterpret_cast<std::int32_t*>(logits.data);
        std::memset(starts, 0, static_cast<std::size_t>(4 * (padded + 1)));
        for (std::int64_t k = first; k < last; ++k) ++starts[token[k] + 1];
        for (std::int64_t t = 0; t < padded; ++t) starts[t + 1] += starts[t];
        for (std::int64_t k = first; k < last; ++k)
            sorted[first + starts[token[k]]++] = static_cast<std::int32_t>(k);
    }

    // The entries of one token and block; returns where the next token's begin.
    std::int64_t collect_run(std::int64_t b, std::int64_t first, std::int64_t last, std::int32_t* columns, float* values) {
        const std::int64_t t = token[sorted[first]], begin = cursor[t];
        const float error = x.slope * unit[t] * x.largest_unit * ERROR, sharp = x.keep * total[t] / error;
        std::int64_t k = first;
        for (; k < last && token[sorted[k]] == t; ++k) {
            const std::int64_t at = sorted[k], j = entry(place[at]);
            float e = value[at];
            masses[b * padded + t] -= e;
            if (Operand::SCREENS && e >= sharp) e = std::exp(refined(t, j) - top[t]);
            columns[cursor[t]] = static_cast<std::int32_t>(j);
            values[cursor[t]++] = e;
        }
        add_rows(near(t), weight, x.weight_stride, columns + begin, values + begin, k - first, x.depth);
        return k;
    }

    void finish(std::int64_t t, float* values, std::int64_t kept) {
        float* const sums = tail(t);
        double mass = 0;
        for (std::int64_t k = 0; k < kept; ++k) mass += values[k];
        for (std::int64_t b = 0; b < blocks(); ++b) {
            const float left = masses[b * padded + t];
            sums[b] = left < 0 ? 0 : left;  // by rounding
            mass += sums[b];
        }
        logitless::Moments<float> others = logitless::no_columns<float>();
        others.sum = static_cast<float>(mass);
        if (others.sum != 0) others.max = top[t];  // any base will do for a sum
        const auto statistics = logitless::finish(others, target[t], x.vocabulary);
        logprob[t] = statistics.logprob;
        lse[t] = statistics.lse;
        const float scale = x.slope / (others.sum + std::exp(target[t] - top[t]));
        for (std::int64_t k = 0; k < kept; ++k) values[k] *= scale;
        for (std::int64_t k = 0; k < blocks() + x.depth; ++k) sums[k] *= scale;
    }

    const logitless_stream& x;
    const T *const hidden, *const weight;
    const std::int64_t *const targets, *const places;
    float *const logprob, *const lse, *const rows;
    const std::int64_t count, room, padded, stride, words, row, capacity;
    Array<std::int32_t> panels, staged;
    Array<float> logits;                     // [BLOCK + ROWS, stride]
    Array<float> unit, target, top, total;   // [padded]
    Array<float> tops, masses;               // [blocks, padded]: each block's base and mass
    Array<std::int32_t> token, place;        // [capacity] candidates, block after block
    Array<float> value;
    Array<std::int64_t> ends;                // [blocks + 1] of each block's candidates
    Array<std::int32_t> sorted;
    Array<std::int64_t> cursor;              // [padded + 1] where a token's next entry goes
    std::int64_t found = 0;
};

}  // namespace
