// logitless_route and logitless_sparse_*: checks of their arguments, and the shapes of their launches.
#include "sparse.cuh"

#include <algorithm>

#include "arguments.cuh"

namespace {

using namespace logitless;

Matrix<bfloat16> matrix(const void* base, std::int64_t stride, std::int64_t rows, std::int64_t columns) {
    return {static_cast<const bfloat16*>(base), stride, rows, columns, nullptr};
}

void check_matrix(Check& check, const Matrix<bfloat16>& x) {
    check.size(x.rows, 1, INT32_MAX)
        .size(x.columns, 8, INT32_MAX)
        .require(x.columns % 8 == 0, LOGITLESS_BAD_SIZE)
        .stride(x.stride, x.columns)
        .require(x.stride % 8 == 0, LOGITLESS_BAD_STRIDE)
        .pointer(x.base, 16);
}

// A grid has at most 65535 blocks along y and z.
void check_list(Check& check, const Listed& list) {
    check.size(list.rows, 1, 65535 * SPAN)
        .size(list.first, 0)
        .size(list.count, 1, 65535)
        .require(list.first + list.count <= divide_up(list.vocabulary, BLOCK_COLUMNS), LOGITLESS_BAD_SIZE)
        .pointer(list.starts, sizeof(std::int32_t))
        .pointer(list.tokens, sizeof(std::int32_t));
}

std::int32_t check_product(const SparseProduct& x) {
    Check check;
    check_matrix(check, x.operand);
    check_list(check, x.list);
    return check.pointer(x.gradient, 16)
        .pointer(x.out, 16)
        .stride(x.out_stride, x.operand.columns)
        .require(x.out_stride % 4 == 0, LOGITLESS_BAD_STRIDE)
        .code();
}

const float* vector(const void* x) { return static_cast<const float*>(x); }

unsigned tiles(std::int64_t size) { return static_cast<unsigned>(divide_up(size, TILE)); }

// Along a block's list, whose length the host does not know.
unsigned listed_tiles(std::int64_t rows) { return std::min(tiles(rows), static_cast<unsigned>(LISTED_TILES)); }

}  // namespace

int32_t logitless_route(const void* block_lse, int64_t block_stride, const void* lse, const void* magnitude,
                        const void* threshold, int64_t rows, int64_t blocks, int32_t* starts, int32_t* tokens,
                        void* tail, int64_t tail_stride, int32_t device, void* stream) {
    const Route x{vector(block_lse), block_stride, vector(lse), vector(magnitude), vector(threshold), rows, blocks,
                  starts, tokens, static_cast<float*>(tail), tail_stride};
    if (rows == 0) return LOGITLESS_DONE;  // of no rows, PyTorch has no address
    const std::int32_t code = Check()
                                  .size(rows, 1, 65535 * SPAN)
                                  .size(blocks, 1, INT32_MAX)
                                  .size(rows * blocks, 1, INT32_MAX)
                                  .stride(block_stride, blocks)
                                  .require(tail == nullptr || tail_stride >= blocks, LOGITLESS_BAD_STRIDE)
                                  .pointer(block_lse, sizeof(float))
                                  .pointer(lse, sizeof(float))
                                  .pointer(magnitude, sizeof(float))
                                  .pointer(threshold, sizeof(float))
                                  .pointer(starts, sizeof(std::int32_t))
                                  .pointer(tokens, sizeof(std::int32_t))
                                  .maybe(tail, sizeof(float))
                                  .code();
    if (code != LOGITLESS_DONE) return code;
    if (const std::int32_t failed = use_device(device)) return failed;
    const dim3 grid(static_cast<unsigned>(divide_up(blocks, ROUTE_THREADS)), static_cast<unsigned>(spans_of(rows)));
    const dim3 route(ROUTE_THREADS), scan(SCAN_THREADS);
    if (const std::int32_t failed = launch(route_kernel<false>, grid, route, 0, stream, x)) return failed;
    const std::int64_t counts = blocks * spans_of(rows);
    if (const std::int32_t failed = launch(scan_kernel, dim3(1), scan, 0, stream, starts, counts)) return failed;
    return launch(route_kernel<true>, grid, route, 0, stream, x);
}

int32_t logitless_sparse_gradient(const void* hidden, const void* weight, int64_t rows, int64_t vocabulary,
                                  int64_t depth, int64_t hidden_stride, int64_t weight_stride, const void* bias,
                                  const int64_t* targets, double logit_scale, double softcap, double temperature,
                                  const void* lse, const void* entropy, const void* logprob_gradient,
                                  const void* lse_gradient, const void* entropy_gradient, const int32_t* starts,
                                  const int32_t* tokens, int64_t first_block, int64_t block_count, void* gradient,
                                  int64_t gradient_rows, int32_t device, void* stream) {
    if (rows == 0 || block_count == 0) return LOGITLESS_DONE;
    const auto transform = make_transform(logit_scale, softcap, temperature);
    const SparseGradient x{
        matrix(hidden, hidden_stride, rows, depth),
        matrix(weight, weight_stride, vocabulary, depth),
        vector(bias),
        {static_cast<float>(transform.slope), static_cast<float>(transform.inner), static_cast<float>(transform.outer)},
        {targets, vector(lse), vector(entropy), vector(logprob_gradient), vector(lse_gradient),
         vector(entropy_gradient)},
        {starts, tokens, rows, vocabulary, first_block, block_count},
        static_cast<bfloat16*>(gradient),
    };
    Check check;
    check_matrix(check, x.hidden);
    check_matrix(check, x.weight);
    check_list(check, x.list);
    check.options(logit_scale, softcap, temperature)
        .pointer(targets, sizeof(std::int64_t))
        .pointer(lse, sizeof(float))
        .require(entropy_gradient == nullptr || entropy != nullptr, LOGITLESS_BAD_POINTER)
        .pointer(gradient, 16)
        .size(gradient_rows, rows * block_count)
        .maybe(bias, sizeof(float))
        .maybe(entropy, sizeof(float))
        .maybe(logprob_gradient, sizeof(float))
        .maybe(lse_gradient, sizeof(float))
        .maybe(entropy_gradient, sizeof(float));
    if (check.code() != LOGITLESS_DONE) return check.code();
    if (const std::int32_t failed = use_device(device)) return failed;
    const dim3 grid(listed_tiles(rows), static_cast<unsigned>(block_count));
    return launch(sparse_gradient_kernel, grid, dim3(TILE_THREADS), 0, stream, x);
}

int32_t logitless_sparse_d_weight(const void* gradient, const void* hidden, int64_t rows, int64_t vocabulary,
                                  int64_t depth, int64_t hidden_stride, const int32_t* starts, const int32_t* tokens,
                                  int64_t first_block, int64_t block_count, void* d_weight, int64_t d_weight_stride,
                                  int32_t device, void* stream) {
    const SparseProduct x{static_cast<const bfloat16*>(gradient), matrix(hidden, hidden_stride, rows, depth),
                          {starts, tokens, rows, vocabulary, first_block, block_count}, static_cast<float*>(d_weight),
                          d_weight_stride};
    if (rows == 0 || block_count == 0) return LOGITLESS_DONE;
    if (const std::int32_t code = check_product(x)) return code;
    if (const std::int32_t failed = use_device(device)) return failed;
    const dim3 grid(tiles(depth), static_cast<unsigned>(block_count));
    return launch(sparse_d_weight_kernel, grid, dim3(TILE_THREADS), 0, stream, x);
}

int32_t logitless_sparse_d_hidden(const void* gradient, const void* weight, int64_t rows, int64_t vocabulary,
                                  int64_t depth, int64_t weight_stride, const int32_t* starts, const int32_t* tokens,
                                  int64_t first_block, int64_t block_count, int32_t ordered, void* d_hidden,
                                  int64_t d_hidden_stride, int32_t device, void* stream) {
    const SparseProduct x{static_cast<const bfloat16*>(gradient), matrix(weight, weight_stride, vocabulary, depth),
                          {starts, tokens, rows, vocabulary, first_block, block_count}, static_cast<float*>(d_hidden),
                          d_hidden_stride};
    if (rows == 0 || block_count == 0) return LOGITLESS_DONE;
    if (const std::int32_t code = check_product(x)) return code;
    if (const std::int32_t failed = use_device(device)) return failed;
    if (ordered) {
        const dim3 grid(tiles(depth), static_cast<unsigned>(spans_of(rows)));
        return launch(ordered_d_hidden_kernel, grid, dim3(TILE_THREADS), 0, stream, x);
    }
    const dim3 grid(listed_tiles(rows), static_cast<unsigned>(block_count), tiles(depth));
    return launch(sparse_d_hidden_kernel, grid, dim3(TILE_THREADS), 0, stream, x);
}
