// Fused forward for Hopper: CUTLASS's persistent, warp-specialised GEMM as it stands (TMA loads by a producer warp,
// wgmma by two consumer warp groups), with an epilogue that reduces rows of the accumulator (reduce_rows.cuh). Logits
// reach memory only where the raw products are asked for; the moments of a part of the columns go to logitless_merge, as
// those of forward_sm80.cuh do.
//
// Tiling of the default: 128 tokens x 256 columns x 64 of H, as many stages as shared memory holds (4 of 48 KB), clusters
// of two blocks, which share a tile of weight by multicast (2 x 1), or of hidden where the number of token tiles is odd
// (1 x 2). A consumer warp group has 64 x 256 of the tile: 128 accumulators a thread, of two rows 64 columns each
// (tile_rows.cuh), a row in one quad, so rows are reduced without shared memory. The producer goes on loading the next
// tile meanwhile; only the tensor cores wait for the epilogue. Under a ping-pong schedule each consumer has a tile of its
// own, and one multiplies while the other reduces.
// Work: 2 N H V flops, N V exponentials. Bytes: hidden and weight, each tile's operands once a cluster from L2; 8 N V
// / 128 written, or 20 N V / 128 with all moments, and 4 N V of raw products.
// Bound at N = 8192, H = 4096, V = 128256: 8.6 Tflop, 8.7 ms at 989 Tflop/s. A tile's products take 65536 cycles, the
// exponentials of its 32768 logits 2048 cycles, the 5 other instructions of each 1280, in part at the same time: 3 to 5%
// on top, less as H grows.
// 168 registers a thread, no local memory; ptxas pipelines wgmma (with assertions on it would not: hopper.cmake).
// Not yet run on a GPU. What is ours runs on the CPU: the reduction of a row in forward_sm80.cuh's tests, all of
// ReduceRows in host/hopper_rows.cpp, CuTe's layout of the accumulators and CUTLASS's order of tiles in
// host/hopper_layout.cu.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler_params.h>

#include "reduce_rows.cuh"

namespace logitless {

// ReduceRows behind CUTLASS's interface of an epilogue that is one call for each tile; Sm90TmaWarpSpecializedAdapter makes
// the rest of it. C and D are what the interface asks for: neither exists.
class RowEpilogue : public ReduceRows {
  public:
    using EpilogueSchedule = cutlass::gemm::EpilogueDefault;
    using DispatchPolicy = EpilogueSchedule;
    using ElementAccumulator = float;
    using ElementCompute = float;
    using ElementC = void;
    using ElementD = float;
    using ElementOutput = ElementD;
    using StrideC = cute::Stride<std::int64_t, cute::_1, std::int64_t>;
    using StrideD = StrideC;
    using ThreadEpilogueOp = cutlass::epilogue::thread::LinearCombination<float, 1>;
    using Arguments = Params;

    // Empty; the alignment puts CUTLASS's stages, which lie behind it, where the pattern of a 128-byte swizzle begins.
    struct alignas(1024) SharedStorage {};

    template <class Shape>
    static Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
        return arguments;
    }

    template <class Shape>
    static std::size_t get_workspace_size(const Shape&, const Arguments&) {
        return 0;
    }

    template <class Shape>
    static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                                cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }

    template <class Shape>
    static bool can_implement(const Shape&, const Arguments&) {
        return true;
    }

    CUTLASS_HOST_DEVICE RowEpilogue(const Params& params, const SharedStorage& = {}) : ReduceRows(params) {}

    template <class Problem, class Block, class Coordinate, class Accumulators, class Mma, class Residue>
    CUTLASS_DEVICE void operator()(Problem, Block block, Coordinate at, const Accumulators& accumulators, Mma mma, Residue,
                                   int thread, char*) const {
        ReduceRows::operator()(block, at, accumulators, mma, thread);
    }
};

using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using PingPong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;

// A kernel, by its schedule, its tile and the blocks of a cluster, along tokens (M) and the vocabulary (N).
template <typename Half, typename Schedule, int TILE_M, int TILE_N, int CLUSTER_M, int CLUSTER_N>
struct ForwardSm90 {
    using Element = Half;
    using Tile = cute::Shape<cute::Int<TILE_M>, cute::Int<TILE_N>, cute::_64>;
    using Cluster = cute::Shape<cute::Int<CLUSTER_M>, cute::Int<CLUSTER_N>, cute::_1>;
    using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<RowEpilogue>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Half, cutlass::layout::RowMajor, 8, Half,
        cutlass::layout::ColumnMajor, 8, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
        Schedule>::CollectiveOp;
    static constexpr int GROUPS = std::is_same_v<Schedule, Cooperative> ? 2 : 1;  // of one tile
    static_assert(std::is_same_v<typename Mainloop::TiledMma, HopperMma<Half, Tile, GROUPS>>);
    using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                        cutlass::gemm::PersistentScheduler>;
};

// The configuration to use, by the half type and the cluster that it takes.
template <typename Half, int CLUSTER_M, int CLUSTER_N>
using DefaultForward = ForwardSm90<Half, Cooperative, 128, 256, CLUSTER_M, CLUSTER_N>;

// How CUTLASS walks over the tiles. Blocks at work at one time share rows of both operands, more of them the larger the
// swizzle; but it rounds both numbers of tiles up to swizzle x cluster, and multiplies what is beyond the matrix too.
struct TileOrder {
    int swizzle;
    std::uint64_t tiles;
    bool lean;  // fewer than 2% of the tiles are beyond the matrix
};

// The largest swizzle of a lean order; where there is none, the order of the fewest tiles.
template <typename Forward>
TileOrder tile_order(int rows, int vocabulary) {
    using namespace cute;
    constexpr int M = size<0>(typename Forward::Tile{}), N = size<1>(typename Forward::Tile{});
    constexpr int CLUSTER_M = size<0>(typename Forward::Cluster{}), CLUSTER_N = size<1>(typename Forward::Cluster{});
    const std::uint64_t needed = std::uint64_t(ceil_div(rows, M)) * ceil_div(vocabulary, N);
    TileOrder order{};
    for (int swizzle = 8; swizzle > 0 && !order.lean; swizzle /= 2) {
        cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90Params params;
        params.initialize(cutlass::gemm::BatchedGemmCoord(rows, vocabulary, 1, 1), {M, N, 64}, {CLUSTER_M, CLUSTER_N, 1},
                          {}, swizzle, decltype(params)::RasterOrderOptions::Heuristic);
        order = {swizzle, params.blocks_per_problem_, params.blocks_per_problem_ * 50 < needed * 51};
    }
    return order;
}

// Of hidden, how much stays in the L2 cache (50 MB) while the weight goes past.
constexpr std::int64_t STAYS_IN_L2 = 32 << 20;

// `run(forward, order)` with clusters along the tokens, which read less from L2; with clusters along the vocabulary, two
// columns of tiles at a time, where the others waste tiles or would have one column at a time read all of hidden from memory.
template <typename Half, typename Run>
auto with_default_forward(int rows, int vocabulary, int depth, Run run) {
    using Tokens = DefaultForward<Half, 2, 1>;
    using Vocabulary = DefaultForward<Half, 1, 2>;
    const TileOrder tokens = tile_order<Tokens>(rows, vocabulary), other = tile_order<Vocabulary>(rows, vocabulary);
    const bool stays = std::int64_t(rows) * depth * std::int64_t(sizeof(Half)) <= STAYS_IN_L2;
    const bool good = tokens.lean && (tokens.swizzle > 1 || stays);
    const bool along_tokens = good || (!other.lean && tokens.tiles <= other.tiles);
    return along_tokens ? run(Tokens{}, tokens) : run(Vocabulary{}, other);
}

}  // namespace logitless
