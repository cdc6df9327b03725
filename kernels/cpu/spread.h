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

template <typename T>
void spread(const logitless_spread& x, std::int64_t first, std::int64_t last) {
    const T* const hidden = static_cast<const T*>(x.hidden);
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t end = smaller((b + 1) * BLOCK, x.vocabulary);
        for (std::int64_t place = b * BLOCK; place < end; ++place) {
            const std::int64_t j = x.order == nullptr ? place : x.order[place];
            float* const out = x.out + j * x.out_stride;
            if (x.add == 0) std::memset(out, 0, static_cast<std::size_t>(4 * x.depth));
            const std::int32_t row = static_cast<std::int32_t>(b);
            add_rows(out, x.tail, x.depth, &row, x.share + j, 1, x.depth);
        }
        for (std::int64_t k = x.starts[b]; k < x.starts[b + 1]; ++k)
            add_rows(x.out + x.column[k] * x.out_stride, hidden, x.hidden_stride, x.token + k, x.value + k, 1, x.depth);
    }
}

}  // namespace
