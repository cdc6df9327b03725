// Fused forward for Hopper: CUTLASS's persistent, warp-specialised GEMM as it stands (TMA loads by a producer warp,
// wgmma by two consumer warp groups), with an epilogue that reduces rows of the accumulator instead of storing it.
// Logits never reach memory; the moments of 128 columns each go to logitless_merge, as those of forward_sm80.cuh do.
//
// Tiling: 128 tokens x 256 columns x 64 of H, as many stages as shared memory holds (4 of 48 KB), clusters of 2 x 1
// blocks, which share a tile of weight by multicast. A consumer warp group has 64 x 256 of the tile: 128 accumulators a
// thread, of two rows 64 columns each (tile_rows.cuh), a row in one quad, so rows are reduced without shared memory.
// The producer goes on loading the next tile meanwhile; only the tensor cores wait for the epilogue.
// Work: 2 N H V flops, N V exponentials. Bytes: hidden and weight, each tile's operands once a cluster from L2; 20 N V
// / 128 written.
// Bound at N = 8192, H = 4096, V = 128256: 8.6 Tflop, 8.7 ms at 989 Tflop/s. A tile's products take 65536 cycles; its
// 32768 logits 2048 cycles of exponentials and some 16 other instructions each, 4096 cycles: 6 to 10% on top, less as H
// grows. 168 registers a thread, no local memory; ptxas pipelines wgmma (with assertions on it would not:
// hopper.cmake).
// Not yet run on a GPU. What is ours, the reduction of a row, is the text that forward_sm80.cuh's tests check on the
// CPU; host/hopper_layout.cu asks CuTe, on the CPU, which element each accumulator holds.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "tile_rows.cuh"

namespace logitless {

// CUTLASS's interface of an epilogue that is one call for each tile; Sm90TmaWarpSpecializedAdapter makes the rest of
// it.
// C and D are what the interface asks for: neither exists.
class ReduceRows {
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

    struct SharedStorage {};

    struct Arguments {
        RowHead head;
        PartialMoments<float> out;
    };
    using Params = Arguments;

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

    CUTLASS_HOST_DEVICE ReduceRows(const Params& params, const SharedStorage& = {}) : params_(params) {}

    // accumulators ((2, 2, 32), 1, 1): column in a pair, row or row + 8, pair of columns 8 further on.
    template <class Problem, class Block, class Coordinate, class Engine, class Layout, class Mma, class Residue>
    CUTLASS_DEVICE void operator()(Problem, Block block, Coordinate at,
                                   const cute::Tensor<Engine, Layout>& accumulators, Mma mma, Residue, int thread,
                                   char*) {
        using namespace cute;
        constexpr int PART = 128, OWN = PART / 4;
        CUTE_STATIC_ASSERT_V(shape(accumulators) == make_shape(make_shape(_2{}, _2{}, _32{}), _1{}, _1{}));
        const auto own = mma.get_thread_slice(thread).partition_C(make_identity_tensor(take<0, 2>(block)));
        const std::int64_t first_row = std::int64_t(get<0>(at)) * size<0>(block) + get<0>(own(0));
        const std::int64_t first_part = std::int64_t(get<1>(at)) * (size<1>(block) / PART);
        CUTLASS_PRAGMA_UNROLL
        for (int high = 0; high < 2; ++high) {
            const std::int64_t row = first_row + 8 * high;
            CUTLASS_PRAGMA_UNROLL
            for (int half = 0; half < 2; ++half) {
                float s[OWN];
                CUTLASS_PRAGMA_UNROLL
                for (int j = 0; j < OWN; ++j)
                    s[j] = accumulators(make_coord(make_coord(j % 2, high, half * OWN / 2 + j / 2), 0, 0));
                const std::int64_t part = first_part + half, column = part * PART;
                const Moments<float> found = reduce_row(s, column, row, params_.head, params_.out);
                if (thread % 4 == 0 && row < params_.out.rows && column < params_.head.vocabulary)
                    write(params_.out, part, row, found);
            }
        }
    }

  private:
    Params params_;
};

template <typename Half>
struct ForwardSm90 {
    using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
    using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
    using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<ReduceRows>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Half, cutlass::layout::RowMajor, 8, Half,
        cutlass::layout::ColumnMajor, 8, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
        cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                        cutlass::gemm::PersistentScheduler>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

}  // namespace logitless
