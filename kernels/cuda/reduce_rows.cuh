// The accumulators of a tile of Hopper's forward, as CuTe lays them out: its rows are reduced (tile_rows.cuh), and stored
// where the raw products are asked for. No shared memory and no barrier, so it runs on a CPU too (host/hopper_rows.cpp).
#pragma once

#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "tile_rows.cuh"

namespace logitless {

// The products of a tile, both operands contiguous along H, by so many warp groups side by side along the tokens.
template <typename Half, typename Tile, int GROUPS>
using HopperMma = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<Half, Half, float, Tile, cute::GMMA::Major::K, cute::GMMA::Major::K>(),
    cute::Layout<cute::Shape<cute::Int<GROUPS>, cute::_1, cute::_1>>{}));

class ReduceRows {
  public:
    struct Params {
        RowHead head;
        RowResults out;
    };

    CUTE_HOST_DEVICE explicit ReduceRows(const Params& params) : params_(params) {}

    // `at` is the tile's place among the tiles of size `block`, `thread` that of the calling thread among `mma`'s.
    // accumulators ((2, 2, columns / 8), M, 1): column in a pair, row or row + 8, pair of columns 8 further on, and, where a
    // warp group has more than 64 rows, which 64.
    template <class Block, class Coordinate, class Engine, class Layout, class Mma>
    CUTE_DEVICE void operator()(Block block, Coordinate at, const cute::Tensor<Engine, Layout>& accumulators, Mma mma,
                                int thread) const {
        using namespace cute;
        constexpr int M = size<1>(Layout{}), COLUMNS = size<1>(Block{});
        static_assert(COLUMNS % PART_COLUMNS == 0 && size(Layout{}) == M * COLUMNS / 2 && size<2>(Layout{}) == 1);
        const auto own = mma.get_thread_slice(thread).partition_C(make_identity_tensor(take<0, 2>(block)));
        const int first_row = int(get<0>(at)) * int(size<0>(block));
        const int first_part = int(get<1>(at)) * (COLUMNS / PART_COLUMNS);
        int rows[2 * M], targets[2 * M];  // known before the first is reduced: one wait for memory, not 2 M
        LOGITLESS_UNROLL
        for (int k = 0; k < 2 * M; ++k) {
            rows[k] = first_row + get<0>(own(make_coord(make_coord(0, k % 2, 0), k / 2, 0)));
            targets[k] = params_.out.target(params_.head, rows[k]);
        }
        LOGITLESS_UNROLL
        for (int k = 0; k < 2 * M; ++k) {
            LOGITLESS_UNROLL
            for (int part = 0; part < COLUMNS / PART_COLUMNS; ++part)
                reduce(accumulators, k, part, first_part + part, rows[k], targets[k], thread);
        }
    }

  private:
    template <class Accumulators>
    CUTE_DEVICE void reduce(const Accumulators& accumulators, int k, int part_of_tile, std::int64_t part,
                            std::int64_t row, int target, int thread) const {
        constexpr int OWN = PART_COLUMNS / 4;
        float s[OWN];
        LOGITLESS_UNROLL
        for (int j = 0; j < OWN; ++j) {
            const auto place = cute::make_coord(j % 2, k % 2, part_of_tile * OWN / 2 + j / 2);
            s[j] = accumulators(cute::make_coord(place, k / 2, 0));
        }
        const std::int64_t column = part * PART_COLUMNS;
        const Moments<float> found = reduce_row(s, column, row, target, params_.head, params_.out);
        if (thread % 4 == 0 && params_.out.holds(row) && column < params_.head.vocabulary)
            write(params_.out.partials, part, row, found);
    }

    Params params_;
};

}  // namespace logitless
