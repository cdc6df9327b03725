// logitless_merge: checks of its arguments, and its launch.
#include "arguments.cuh"
#include "merge.cuh"

namespace {

using namespace logitless;

template <typename T>
std::int32_t merge_parts(const PartialMoments<T>& from, std::int64_t vocabulary, const Results<T>& to, T* block_lse,
                         std::int64_t stride, std::int32_t device, void* stream) {
    if (from.rows == 0) return LOGITLESS_DONE;
    if (const std::int32_t code = use_device(device)) return code;
    const dim3 grid(static_cast<unsigned>(divide_up(from.rows, WARP)));
    return launch(merge_kernel<T>, grid, dim3(WARP, MERGE_WARPS), 0, stream, from, vocabulary, to, block_lse, stride);
}

template <typename T>
std::int32_t merge_as(const void* moments, const void* target_logit, std::int64_t parts, std::int32_t moment_count,
                      std::int64_t rows, std::int64_t vocabulary, const Results<T>& to, void* block_lse,
                      std::int64_t block_stride, std::int32_t device, void* stream) {
    Check check;
    const bool enough = moment_count == ALL_MOMENTS || !(to.entropy || to.mean_logit || to.log_sum_sq);
    check.moments(moment_count).require(enough, LOGITLESS_BAD_MOMENTS);
    check.size(parts, 1).size(rows, 0, MOST_ROWS).size(vocabulary, 1);
    if (rows > 0) check.pointer(moments, sizeof(T)).pointer(target_logit, sizeof(T)).results(to);
    if (block_lse) check.maybe(block_lse, sizeof(T)).stride(block_stride, parts);
    if (check.code() != LOGITLESS_DONE) return check.code();
    // read alone
    T* const from = const_cast<T*>(static_cast<const T*>(moments));
    T* const target = const_cast<T*>(static_cast<const T*>(target_logit));
    return merge_parts<T>({from, target, parts, rows, moment_count}, vocabulary, to, static_cast<T*>(block_lse),
                          block_stride, device, stream);
}

}  // namespace

int32_t logitless_merge(const void* moments, const void* target_logit, int32_t dtype, int64_t parts,
                        int32_t moment_count, int64_t rows, int64_t vocabulary, void* logprob, void* lse, void* entropy,
                        void* mean_logit, void* correct, void* log_sum_sq, void* block_lse, int64_t block_stride,
                        int32_t device, void* stream) {
    if (dtype == LOGITLESS_FLOAT32)
        return merge_as<float>(moments, target_logit, parts, moment_count, rows, vocabulary,
                               as_results<float>(logprob, lse, entropy, mean_logit, correct, log_sum_sq), block_lse,
                               block_stride, device, stream);
    if (dtype == LOGITLESS_FLOAT64)
        return merge_as<double>(moments, target_logit, parts, moment_count, rows, vocabulary,
                                as_results<double>(logprob, lse, entropy, mean_logit, correct, log_sum_sq), block_lse,
                                block_stride, device, stream);
    return LOGITLESS_BAD_DTYPE;
}
