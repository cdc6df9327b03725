// Which element of its tile each accumulator of the Hopper kernel holds, by CuTe itself, on the CPU: how many lie
// elsewhere than forward_sm90.cuh and tile_rows.cuh take for granted.
#include <cstdio>

#include "forward_sm90.cuh"

int main() {
    using namespace cute;
    using Forward = logitless::ForwardSm90<cutlass::bfloat16_t>;
    const Forward::Mainloop::TiledMma mma;
    int seen = 0, elsewhere = 0;
    for (int thread = 0; thread < int(size(mma)); ++thread) {
        const auto own = mma.get_thread_slice(thread).partition_C(make_identity_tensor(take<0, 2>(Forward::Tile{})));
        const int row = thread / 32 * 16 + thread % 32 / 4;  // and 8 further down
        for (int high = 0; high < 2; ++high)
            for (int half = 0; half < 2; ++half)
                for (int j = 0; j < 32; ++j) {
                    const auto at = own(make_coord(make_coord(j % 2, high, half * 16 + j / 2), 0, 0));
                    const int column = half * 128 + j / 2 * 8 + thread % 4 * 2 + j % 2;  // quad_column
                    elsewhere += get<0>(at) != row + 8 * high || get<1>(at) != column;
                    ++seen;
                }
    }
    std::printf("%d of %d accumulators elsewhere\n", elsewhere, seen);
    return 0;
}
