// Hopper's epilogue, ReduceRows, on the CPU, for the tests. A matrix of products is cut into the tiles and accumulators
// of a configuration of forward_sm90.cu, and goes through the epilogue with a fiber for each thread (shim.h).
#include "reduce_rows.cuh"

#include "forward.cuh"

namespace {

using namespace logitless;

// One tile, on as many threads as multiply it. What lies beyond the matrix is 0, as TMA leaves it.
template <typename Tile, typename Mma>
void reduce_tile(const Forward& x, const float* products, int tile_row, int tile_column) {
    using namespace cute;
    const Mma mma;
    const ReduceRows reduce({x.head(), x.results()});
    host::run_grid(dim3(1), dim3(unsigned(size(mma))), 0, [&] {
        const int thread = int(threadIdx.x);
        const auto shape = take<0, 2>(Tile{});
        const auto own = mma.get_thread_slice(thread).partition_C(make_identity_tensor(shape));
        auto accumulators = partition_fragment_C(mma, shape);
        for (int k = 0; k < int(size(accumulators)); ++k) {
            const std::int64_t row = tile_row * size<0>(Tile{}) + get<0>(own(k));
            const std::int64_t column = tile_column * size<1>(Tile{}) + get<1>(own(k));
            const bool inside = row < x.rows && column < x.vocabulary;
            accumulators(k) = inside ? products[row * x.vocabulary + column] : 0.0f;
        }
        reduce(Tile{}, make_coord(tile_row, tile_column, _, 0), accumulators, mma, thread);
    });
}

// All tiles, and a row and a column of tiles that lie beyond the matrix, as CUTLASS's rounding adds them.
template <int TILE_M, int TILE_N, int GROUPS>
void reduce_all(const Forward& x, const float* products) {
    using Tile = cute::Shape<cute::Int<TILE_M>, cute::Int<TILE_N>, cute::_64>;
    const auto rows = int(divide_up(x.rows, TILE_M)), columns = int(divide_up(x.vocabulary, TILE_N));
    for (int row = 0; row <= rows; ++row)
        for (int column = 0; column <= columns; ++column)
            reduce_tile<Tile, HopperMma<cute::bfloat16_t, Tile, GROUPS>>(x, products, row, column);
}

}  // namespace

// products [rows, vocabulary]; the rest as for logitless_forward_sm90. `groups` warp groups have a tile together.
extern "C" int32_t hopper_rows(int32_t tile_rows, int32_t tile_columns, int32_t groups, const float* products,
                               int64_t rows, int64_t vocabulary, const void* bias, const int64_t* targets,
                               double logit_scale, double softcap, double temperature, void* moments,
                               int32_t moment_count, void* target_logit, void* raw, int64_t raw_stride) {
    const Forward x{nullptr, nullptr, LOGITLESS_BFLOAT16, rows, vocabulary, 8, 8, 8, bias, targets, logit_scale, softcap,
                    temperature, moments, moment_count, target_logit, raw, raw_stride, 0, nullptr};
    const auto run = tile_rows == 128 && tile_columns == 256 && groups == 2   ? reduce_all<128, 256, 2>
                     : tile_rows == 256 && tile_columns == 128 && groups == 2 ? reduce_all<256, 128, 2>
                     : tile_rows == 128 && tile_columns == 128 && groups == 1 ? reduce_all<128, 128, 1>
                     : tile_rows == 64 && tile_columns == 256 && groups == 1  ? reduce_all<64, 256, 1>
                                                                              : nullptr;
    if (run == nullptr) return LOGITLESS_BAD_CONFIGURATION;
    run(x, products);
    return LOGITLESS_DONE;
}
