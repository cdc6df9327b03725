// The epilogue of Hopper's forward, on the accumulators of a tile as CuTe lays them out. It reduces their rows
// (tile_rows.cuh), and stores the raw products if they are asked for. It uses no shared memory and no barrier, so it
// runs on a CPU too (host/hopper_rows.cpp).
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
        constexpr int PARTS = COLUMNS / PART_COLUMNS, OWN = PART_COLUMNS / 4;
        static_assert(COLUMNS % PART_COLUMNS == 0 && size(Layout{}) == M * COLUMNS / 2 && size<2>(Layout{}) == 1);
        const auto own = mma.get_thread_slice(thread).partition_C(make_identity_tensor(take<0, 2>(block)));
        const int first_row = int(get<0>(at)) * int(size<0>(block));
        const int first_part = int(get<1>(at)) * PARTS;
        Row rows[2 * M];
        LOGITLESS_UNROLL
        for (int k = 0; k < 2 * M; ++k) {
            const int row = first_row + get<0>(own(make_coord(make_coord(0, k % 2, 0), k / 2, 0)));
            rows[k] = {row, params_.out.target(params_.head, row)};  // all wait for memory together
        }
        float s[2 * M][PARTS][OWN], totals[2 * M][PARTS];
        LOGITLESS_UNROLL
        for (int k = 0; k < 2 * M * PARTS; ++k) {
            auto& own_s = s[k / PARTS][k % PARTS];
            LOGITLESS_UNROLL
            for (int j = 0; j < OWN; ++j) {
                const auto place = make_coord(j % 2, k / PARTS % 2, k % PARTS * OWN / 2 + j / 2);
                own_s[j] = accumulators(make_coord(place, k / PARTS / 2, 0));
            }
            const std::int64_t column = std::int64_t(first_part + k % PARTS) * PART_COLUMNS;
            const Row row = rows[k / PARTS];
            totals[k / PARTS][k % PARTS] = prepare_row(own_s, column, row.place, row.target, params_.head, params_.out);
        }
        if (params_.out.partials.count == ALL_MOMENTS) reduce<true>(s, totals, rows, first_part, thread);
        else reduce<false>(s, totals, rows, first_part, thread);
    }

  private:
    struct Row {
        int place, target;
    };

    // Without a branch between the rows, so that one's exponentials fill the time in which another waits.
    template <bool ALL, int ROWS, int PARTS, int OWN>
    CUTE_DEVICE void reduce(const float (&s)[ROWS][PARTS][OWN], const float (&totals)[ROWS][PARTS],
                            const Row (&rows)[ROWS], int first_part, int thread) const {
        Moments<float> found[ROWS][PARTS];
        LOGITLESS_UNROLL
        for (int k = 0; k < ROWS; ++k) {
            LOGITLESS_UNROLL
            for (int part = 0; part < PARTS; ++part)
                found[k][part] =
                    quad_moments<ALL>(s[k][part], params_.head.slope, params_.head.rate, totals[k][part]);
        }
        if (thread % 4 != 0) return;
        LOGITLESS_UNROLL
        for (int k = 0; k < ROWS * PARTS; ++k) {
            const std::int64_t part = first_part + k % PARTS, row = rows[k / PARTS].place;
            if (params_.out.holds(row) && part * PART_COLUMNS < params_.head.vocabulary)
                write(params_.out.partials, part, row, found[k / PARTS][k % PARTS]);
        }
    }

    Params params_;
};

}  // namespace logitless
