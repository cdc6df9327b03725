// The launch of a kernel of forward_sm90.cuh, as clusters of thread blocks.
#pragma once

#include <map>
#include <mutex>

#include "forward.cuh"
#include "forward_sm90.cuh"

namespace logitless {

// A launch of a kernel of clusters; `blocks` is a multiple of the cluster.
template <typename Kernel>
struct ClusterLaunch {
    cudaLaunchAttribute cluster{};
    cudaLaunchConfig_t config{};

    ClusterLaunch(dim3 blocks, void* stream) {
        using Shape = typename Kernel::ClusterShape;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {cute::size<0>(Shape{}), cute::size<1>(Shape{}), 1};
        config.gridDim = blocks;
        config.blockDim = Kernel::get_block_shape();
        config.dynamicSmemBytes = Kernel::SharedStorageSize;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    ClusterLaunch(const ClusterLaunch&) = delete;  // config has the address of cluster

    static const void* kernel() { return reinterpret_cast<const void*>(&cutlass::device_kernel<Kernel>); }
};

// Makes the kernel ready for the current device, and asks how many clusters of it fit there: once for each device.
template <typename Kernel>
std::int32_t prepare(std::int32_t device, cutlass::KernelHardwareInfo& to) {
    static std::mutex mutex;
    static std::map<std::int32_t, cutlass::KernelHardwareInfo> known;
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find(device); found != known.end()) {
        to = found->second;
        return LOGITLESS_DONE;
    }
    using Launch = ClusterLaunch<Kernel>;
    using Shape = typename Kernel::ClusterShape;
    const Launch one(dim3(cute::size<0>(Shape{}), cute::size<1>(Shape{})), nullptr);
    to.device_id = device;
    const cudaError_t codes[] = {
        cudaFuncSetAttribute(Launch::kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize),
        cudaDeviceGetAttribute(&to.sm_count, cudaDevAttrMultiProcessorCount, device),
        cudaOccupancyMaxActiveClusters(&to.max_active_clusters, Launch::kernel(), &one.config),
    };
    for (const cudaError_t code : codes)
        if (code != cudaSuccess) return settled(code);
    known[device] = to;
    return LOGITLESS_DONE;
}

// Queues the kernel. CUDA's code where it could not be started.
template <typename Kind>
std::int32_t run_sm90(const Forward& x, TileOrder order) {
    using Kernel = typename Kind::Kernel;
    using Half = typename Kind::Element;
    typename Kernel::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(x.rows), static_cast<int>(x.vocabulary), static_cast<int>(x.depth), 1},
        {static_cast<const Half*>(x.hidden),
         {x.hidden_stride, cute::_1{}, 0},
         static_cast<const Half*>(x.weight),
         {x.weight_stride, cute::_1{}, 0}},
        {x.head(), x.results()},
    };
    if (const std::int32_t code = prepare<Kernel>(x.device, arguments.hw_info)) return code;
    arguments.scheduler.max_swizzle_size = order.swizzle;
    if (!Kernel::can_implement(arguments) || Kernel::get_workspace_size(arguments) != 0) return LOGITLESS_BAD_SIZE;
    typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
    void* parameters[] = {&params};
    const ClusterLaunch<Kernel> launch(Kernel::get_grid_shape(params), x.stream);
    return settled(cudaLaunchKernelExC(&launch.config, launch.kernel(), parameters));
}

}  // namespace logitless
