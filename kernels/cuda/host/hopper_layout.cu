// A program that prints, on the CPU, two things that forward_sm90.cuh takes from CuTe and CUTLASS:
//
//     layout                 for each configuration, how many accumulators hold another element of their tile than
//                            reduce_rows.cuh and tile_rows.cuh assume
//     order V H N N ...      for each number of tokens N: tiles that CUTLASS's scheduler gives out, cluster, swizzle
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "forward_sm90.cuh"

namespace {

using namespace logitless;
using Half = cutlass::bfloat16_t;

template <typename Forward>
void print_layout(const char* name) {
    using namespace cute;
    using Tile = typename Forward::Tile;
    const typename Forward::Mainloop::TiledMma mma;
    int seen = 0, elsewhere = 0;
    for (int thread = 0; thread < int(size(mma)); ++thread) {
        const auto own = mma.get_thread_slice(thread).partition_C(make_identity_tensor(take<0, 2>(Tile{})));
        for (int m = 0; m < int(size<1>(own)); ++m)
            for (int high = 0; high < 2; ++high)
                for (int j = 0; j < int(size<1>(Tile{})) / 4; ++j) {
                    const auto at = own(make_coord(make_coord(j % 2, high, j / 2), m, 0));
                    const int row = m * int(size(mma)) / 2 + thread / 32 * 16 + thread % 32 / 4 + 8 * high;
                    elsewhere += get<0>(at) != row || get<1>(at) != j / 2 * 8 + thread % 4 * 2 + j % 2;
                    ++seen;
                }
    }
    std::printf("%s: %d of %d accumulators elsewhere\n", name, elsewhere, seen);
}

void print_order(int vocabulary, int depth, int rows) {
    with_default_forward<Half>(rows, vocabulary, depth, [&](auto kind, TileOrder order) {
        using Cluster = typename decltype(kind)::Cluster;
        std::printf("%d %llu %dx%d %d\n", rows, static_cast<unsigned long long>(order.tiles),
                    int(cute::size<0>(Cluster{})), int(cute::size<1>(Cluster{})), order.swizzle);
        return 0;
    });
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 4 && std::strcmp(arguments[1], "order") == 0) {
        const int vocabulary = std::atoi(arguments[2]), depth = std::atoi(arguments[3]);
        for (int k = 4; k < count; ++k) print_order(vocabulary, depth, std::atoi(arguments[k]));
    } else {
        print_layout<DefaultForward<Half, 2, 1>>("cooperative_128x256x64_2x1");
        print_layout<DefaultForward<Half, 1, 2>>("cooperative_128x256x64_1x2");
        print_layout<ForwardSm90<Half, Cooperative, 256, 128, 2, 1>>("cooperative_256x128x64_2x1");
        print_layout<ForwardSm90<Half, PingPong, 128, 128, 2, 1>>("pingpong_128x128x64_2x1");
        print_layout<ForwardSm90<Half, PingPong, 64, 256, 2, 1>>("pingpong_64x256x64_2x1");
    }
}
