// Tiles and schedules of logitless_forward_sm90 besides the default, to be timed. LOGITLESS_FORWARD_CONFIGURATIONS
// builds them.
#include "configurations_sm90.h"

#include "launch_sm90.cuh"

namespace logitless {
namespace {

template <typename Schedule, int TILE_M, int TILE_N>
std::int32_t run_other(const Forward& x) {
    using Kind = ForwardSm90<cutlass::bfloat16_t, Schedule, TILE_M, TILE_N, 2, 1>;
    return run_sm90<Kind>(x, tile_order<Kind>(static_cast<int>(x.rows), static_cast<int>(x.vocabulary)));
}

constexpr Configuration ALL[] = {
    {"cooperative_256x128x64_2x1", run_other<Cooperative, 256, 128>},
    {"pingpong_128x128x64_2x1", run_other<PingPong, 128, 128>},
    {"pingpong_64x256x64_2x1", run_other<PingPong, 64, 256>},
};

}  // namespace

const Configuration* other_configuration(std::int32_t index) {
    return index >= 0 && index < static_cast<std::int32_t>(std::size(ALL)) ? &ALL[index] : nullptr;
}

}  // namespace logitless
