// logitless_measure and logitless_gradient: checks of their arguments, and the shapes of their launches.
#include <type_traits>

#include "arguments.cuh"
#include "chunk.cuh"

namespace {

using namespace logitless;

// Tuned numbers. None has been measured on a GPU; kernels/cuda/README.md says where each comes from.
constexpr std::int64_t SHORT_ROW = 2048;         // columns up to which a row is one warp's
constexpr int SHORT_ROWS_PER_BLOCK = 4;
constexpr std::int64_t ENOUGH_BLOCKS = 512;      // rows are cut where there are fewer
constexpr std::int64_t SHORTEST_PART = 8192;     // columns
// Columns that a thread has under way: 16, in 64 bytes of float32, which 255 registers hold without a spill.
template <typename Raw>
constexpr int UNROLL = sizeof(Raw) == sizeof(float) ? 4 : 2;

std::int64_t most_parts(std::int64_t rows, std::int64_t vocabulary) {
    const std::int64_t wanted = ENOUGH_BLOCKS / (rows < 1 ? 1 : rows), possible = vocabulary / SHORTEST_PART;
    const std::int64_t parts = wanted < possible ? wanted : possible;
    return parts < 1 ? 1 : parts;
}

struct Shape {
    dim3 block, grid;
    std::int64_t part_columns, parts;
};

// `multiple`: what a part's columns are one of.
Shape shape_of(std::int64_t rows, std::int64_t vocabulary, std::int64_t parts, std::int64_t multiple) {
    const bool is_short = vocabulary <= SHORT_ROW;
    const dim3 block = is_short ? dim3(WARP, SHORT_ROWS_PER_BLOCK) : dim3(LONG_ROW_THREADS);
    const std::int64_t columns = divide_up(divide_up(vocabulary, parts), multiple) * multiple;
    const std::int64_t needed = divide_up(vocabulary, columns);
    const dim3 grid(static_cast<unsigned>(divide_up(rows, block.y)), static_cast<unsigned>(needed));
    return {block, grid, columns, needed};
}

template <typename Raw>
bool vectors_fit(const Chunk<Raw>& chunk) {
    return is_aligned(chunk.raw, 16) && chunk.stride % VECTOR_WIDTH<Raw> == 0 && is_aligned(chunk.bias, 16);
}

template <typename Raw>
Check check_chunk(const Chunk<Raw>& chunk, double logit_scale, double softcap, double temperature) {
    Check check;
    check.size(chunk.rows, 0, MOST_ROWS).size(chunk.vocabulary, 1).stride(chunk.stride, chunk.vocabulary);
    check.options(logit_scale, softcap, temperature).maybe(chunk.bias, sizeof(Compute<Raw>));
    if (chunk.rows > 0) check.pointer(chunk.raw, sizeof(Raw)).pointer(chunk.targets, sizeof(std::int64_t));
    return check;
}

// ---------------------------------------------------------------------------------------------- measure

template <typename Raw>
struct Measure {
    using T = Compute<Raw>;
    Chunk<Raw> chunk;
    Results<T> to;
    T* block_lse;
    std::int64_t block_stride, block_columns;
    void* workspace;
    std::int64_t workspace_bytes;
    std::int32_t device;
    void* stream;
};

template <typename T>
std::int64_t workspace_of(std::int64_t parts, std::int64_t rows) {
    return parts < 2 ? 0 : (parts * ALL_MOMENTS + 1) * rows * static_cast<std::int64_t>(sizeof(T));
}

int shift_of(std::int64_t power_of_two) {
    int shift = 0;
    while (std::int64_t(1) << shift < power_of_two) ++shift;
    return shift;
}

template <typename Raw, int WIDTH, int UNROLLED>
std::int32_t launch_measure(const Measure<Raw>& call, std::int64_t parts) {
    using T = Compute<Raw>;
    const Chunk<Raw>& chunk = call.chunk;
    const std::int64_t warps = LONG_ROW_THREADS / WARP, group = Group<WIDTH, UNROLLED>::COLUMNS;
    const std::int64_t span = call.block_lse && call.block_columns > group ? call.block_columns : group;
    const Shape shape = shape_of(chunk.rows, chunk.vocabulary, parts, warps * span);
    PartialMoments<T> partials{nullptr, nullptr, shape.parts, chunk.rows, ALL_MOMENTS};
    if (shape.parts > 1) {
        partials.moments = static_cast<T*>(call.workspace);
        partials.target_logit = partials.moments + shape.parts * ALL_MOMENTS * chunk.rows;
    }
    const BlockLse<T> blocks{call.block_lse, call.block_stride, call.block_lse ? shift_of(call.block_columns) : 0};
    const std::int32_t code = launch(measure_kernel<Raw, WIDTH, UNROLLED>, shape.grid, shape.block, 0, call.stream,
                                     chunk, call.to, partials, blocks, shape.part_columns);
    if (code != LOGITLESS_DONE || shape.parts == 1) return code;
    return logitless_merge(partials.moments, partials.target_logit,
                           sizeof(T) == sizeof(double) ? LOGITLESS_FLOAT64 : LOGITLESS_FLOAT32, shape.parts,
                           ALL_MOMENTS, chunk.rows, chunk.vocabulary, call.to.logprob, call.to.lse, call.to.entropy,
                           call.to.mean_logit, call.to.correct, call.to.log_sum_sq, nullptr, 0, call.device,
                           call.stream);
}

template <typename Raw>
std::int32_t measure(const Measure<Raw>& call, Check check) {
    using T = Compute<Raw>;
    const Chunk<Raw>& chunk = call.chunk;
    check.results(call.to);
    if (call.block_lse) {
        const std::int64_t columns = call.block_columns;
        check.size(columns, WARP).require((columns & (columns - 1)) == 0, LOGITLESS_BAD_SIZE);
        if (check.code() == LOGITLESS_DONE)
            check.maybe(call.block_lse, sizeof(T)).stride(call.block_stride, divide_up(chunk.vocabulary, columns));
    }
    const std::int64_t parts = most_parts(chunk.rows, chunk.vocabulary), needed = workspace_of<T>(parts, chunk.rows);
    check.require(call.workspace_bytes >= needed, LOGITLESS_BAD_WORKSPACE);
    if (needed > 0) check.pointer(call.workspace, 16);
    if (check.code() != LOGITLESS_DONE || chunk.rows == 0) return check.code();
    if (const std::int32_t code = use_device(call.device)) return code;
    if (vectors_fit(chunk))
        return call.block_lse ? launch_measure<Raw, VECTOR_WIDTH<Raw>, 1>(call, parts)
                              : launch_measure<Raw, VECTOR_WIDTH<Raw>, UNROLL<Raw>>(call, parts);
    return call.block_lse ? launch_measure<Raw, 1, 1>(call, parts) : launch_measure<Raw, 1, UNROLL<Raw>>(call, parts);
}

// ---------------------------------------------------------------------------------------------- gradient

template <typename Raw>
struct Gradient {
    using T = Compute<Raw>;
    Chunk<Raw> chunk;
    RowInputs<T> from;
    T* target_gradient;
    std::int32_t device;
    void* stream;
};

template <typename Raw, typename Out, int WIDTH>
std::int32_t launch_gradient(const Gradient<Raw>& call) {
    const Chunk<Raw>& chunk = call.chunk;
    const std::int64_t parts = sizeof(Out) < sizeof(Raw) ? 1 : most_parts(chunk.rows, chunk.vocabulary);
    const std::int64_t step = LONG_ROW_THREADS / WARP * Group<WIDTH, UNROLL<Raw>>::COLUMNS;
    const Shape shape = shape_of(chunk.rows, chunk.vocabulary, parts, step);
    return launch(gradient_kernel<Raw, Out, WIDTH, UNROLL<Raw>>, shape.grid, shape.block, 0, call.stream, chunk,
                  call.from, call.target_gradient, shape.part_columns);
}

template <typename Raw, typename Out>
std::int32_t gradient(const Gradient<Raw>& call, Check check) {
    using T = Compute<Raw>;
    const RowInputs<T>& from = call.from;
    const T* const maybe[] = {from.entropy, from.logprob_gradient, from.lse_gradient, from.entropy_gradient,
                              from.mean_logit_gradient};
    for (const T* x : maybe) check.maybe(x, sizeof(T));
    check.require(from.entropy || !from.entropy_gradient, LOGITLESS_BAD_POINTER);
    if (call.chunk.rows > 0)
        check.pointer(from.logprob, sizeof(T)).pointer(from.lse, sizeof(T)).pointer(call.target_gradient, sizeof(T));
    if (check.code() != LOGITLESS_DONE || call.chunk.rows == 0) return check.code();
    if (const std::int32_t code = use_device(call.device)) return code;
    return vectors_fit(call.chunk) ? launch_gradient<Raw, Out, VECTOR_WIDTH<Raw>>(call)
                                   : launch_gradient<Raw, Out, 1>(call);
}

// ---------------------------------------------------------------------------------------------- dtypes

// Calls `use(Raw*)` with a pointer of the type that a code names.
template <typename Use>
std::int32_t with_type(std::int32_t dtype, void* raw, Use use) {
    switch (dtype) {
        case LOGITLESS_FLOAT32: return use(static_cast<float*>(raw));
        case LOGITLESS_BFLOAT16: return use(static_cast<bfloat16*>(raw));
        case LOGITLESS_FLOAT16: return use(static_cast<float16*>(raw));
        case LOGITLESS_FLOAT64: return use(static_cast<double*>(raw));
        default: return LOGITLESS_BAD_DTYPE;
    }
}

template <typename Raw>
Chunk<Raw> as_chunk(Raw* raw, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride, const void* bias,
                    const std::int64_t* targets, double logit_scale, double softcap, double temperature) {
    using T = Compute<Raw>;
    return {raw, rows, vocabulary, stride, static_cast<const T*>(bias), targets,
            make_transform(static_cast<T>(logit_scale), static_cast<T>(softcap), static_cast<T>(temperature))};
}

std::int32_t gradient_of(const Gradient<float>& call, std::int32_t gradient_dtype, const Check& check) {
    switch (gradient_dtype) {
        case LOGITLESS_FLOAT32: return gradient<float, float>(call, check);
        case LOGITLESS_BFLOAT16: return gradient<float, bfloat16>(call, check);
        case LOGITLESS_FLOAT16: return gradient<float, float16>(call, check);
        default: return LOGITLESS_BAD_DTYPE;
    }
}

template <typename Raw>
std::int32_t gradient_of(const Gradient<Raw>& call, std::int32_t, const Check& check) {
    return gradient<Raw, Raw>(call, check);
}

}  // namespace

int64_t logitless_measure_workspace(int64_t rows, int64_t vocabulary, int32_t raw_dtype) {
    const std::int64_t parts = most_parts(rows, vocabulary);
    return raw_dtype == LOGITLESS_FLOAT64 ? workspace_of<double>(parts, rows) : workspace_of<float>(parts, rows);
}

int32_t logitless_measure(const void* raw, int32_t raw_dtype, int64_t rows, int64_t vocabulary, int64_t raw_stride,
                          const void* bias, const int64_t* targets, double logit_scale, double softcap,
                          double temperature, void* logprob, void* lse, void* entropy, void* mean_logit, void* correct,
                          void* log_sum_sq, void* block_lse, int64_t block_stride, int64_t block_columns,
                          void* workspace, int64_t workspace_bytes, int32_t device, void* stream) {
    // read alone: the type is the one that logitless_gradient writes through
    return with_type(raw_dtype, const_cast<void*>(raw), [&](auto* typed) {
        using Raw = std::remove_pointer_t<decltype(typed)>;
        using T = Compute<Raw>;
        const auto chunk =
            as_chunk(typed, rows, vocabulary, raw_stride, bias, targets, logit_scale, softcap, temperature);
        const Measure<Raw> call{chunk,
                                as_results<T>(logprob, lse, entropy, mean_logit, correct, log_sum_sq),
                                static_cast<T*>(block_lse),
                                block_stride,
                                block_columns,
                                workspace,
                                workspace_bytes,
                                device,
                                stream};
        return measure(call, check_chunk(chunk, logit_scale, softcap, temperature));
    });
}

int32_t logitless_gradient(void* raw, int32_t raw_dtype, int64_t rows, int64_t vocabulary, int64_t raw_stride,
                           const void* bias, const int64_t* targets, double logit_scale, double softcap,
                           double temperature, const void* logprob, const void* lse, const void* entropy,
                           const void* logprob_gradient, const void* lse_gradient, const void* entropy_gradient,
                           const void* mean_logit_gradient, void* target_gradient, int32_t gradient_dtype,
                           int32_t device, void* stream) {
    if (gradient_dtype != raw_dtype && raw_dtype != LOGITLESS_FLOAT32) return LOGITLESS_BAD_DTYPE;
    return with_type(raw_dtype, raw, [&](auto* typed) {
        using Raw = std::remove_pointer_t<decltype(typed)>;
        using T = Compute<Raw>;
        const auto vector = [](const void* x) { return static_cast<const T*>(x); };
        const auto chunk =
            as_chunk(typed, rows, vocabulary, raw_stride, bias, targets, logit_scale, softcap, temperature);
        const RowInputs<T> from{vector(logprob),          vector(lse),          vector(entropy),
                                vector(logprob_gradient), vector(lse_gradient), vector(entropy_gradient),
                                vector(mean_logit_gradient)};
        const Gradient<Raw> call{chunk, from, static_cast<T*>(target_gradient), device, stream};
        return gradient_of(call, gradient_dtype, check_chunk(chunk, logit_scale, softcap, temperature));
    });
}
