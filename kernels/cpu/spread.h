// The head's gradient from entries: each is a number times its token's hidden state, added to its row.
//
//     out_j = share_j tail_b(j) + sum_k value_k hidden_token(k)      over the entries k of column j; b(j): j's block
//
// Entries come block after block, and in a block token after token. So a block's rows of the gradient (256 of them) stay in
// the second cache while its entries are added, and a hidden state in the first while its entries last. The gradient is
// written once.
#pragma once

#include "logitless_cpu.h"
#include "stream.h"

namespace {

// out += factor x
template <typename T>
void add_scaled(float* out, const T* x, float factor, std::int64_t count) {
    const Floats factors = all(factor);
    std::int64_t k = 0;
    for (; k + LANES <= count; k += LANES) store(out + k, fma(load(x + k), factors, load(out + k)));
    if (k < count) store_some(out + k, fma(load_some(x + k, count - k), factors, load_some(out + k, count - k)), count - k);
}

template <typename T>
void spread(const logitless_spread& x, std::int64_t first, std::int64_t last) {
    const T* const hidden = static_cast<const T*>(x.hidden);
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t end = smaller((b + 1) * BLOCK, x.vocabulary);
        for (std::int64_t place = b * BLOCK; place < end; ++place) {
            const std::int64_t j = x.order == nullptr ? place : x.order[place];
            float* const out = x.out + j * x.out_stride;
            if (x.add == 0) std::memset(out, 0, static_cast<std::size_t>(4 * x.depth));
            add_scaled(out, x.tail + b * x.depth, x.share[j], x.depth);
        }
        for (std::int64_t k = x.starts[b]; k < x.starts[b + 1]; ++k)
            add_scaled(x.out + x.column[k] * x.out_stride, hidden + x.token[k] * x.hidden_stride, x.value[k], x.depth);
    }
}

}  // namespace
