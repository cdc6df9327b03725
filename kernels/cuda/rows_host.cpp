// rows.h behind a C interface, for the tests: rows of logits on the host, cut into parts as a kernel would cut them.
#include <cstdint>
#include <utility>
#include <vector>

#include "../rows.h"

namespace {

using namespace logitless;

// Merged pairwise, as the lanes of a warp do.
template <typename T>
Moments<T> merge_tree(std::vector<Moments<T>> parts) {
    for (std::size_t step = 1; step < parts.size(); step *= 2)
        for (std::size_t i = 0; i + step < parts.size(); i += 2 * step) parts[i] = merge(parts[i], parts[i + step]);
    return parts[0];
}

template <typename T>
RowStatistics<T> row_statistics(const std::vector<T>& logits, std::int64_t target, const std::int32_t* part_of,
                                std::int32_t parts) {
    std::vector<Moments<T>> moments(static_cast<std::size_t>(parts), no_columns<T>());
    for (std::size_t j = 0; j < logits.size(); ++j) {
        if (static_cast<std::int64_t>(j) == target) continue;
        Moments<T>& part = moments[static_cast<std::size_t>(part_of[j])];
        part = merge(part, one_column(logits[j]));
    }
    return finish(merge_tree(std::move(moments)), logits[static_cast<std::size_t>(target)],
                  static_cast<std::int64_t>(logits.size()));
}

// raw [rows, vocabulary], targets [rows], part_of [vocabulary] in [0, parts), options = {logit_scale, softcap or 0,
// temperature}, upstream [rows, 4]; statistics [rows, 6] and gradient [rows, vocabulary] are written.
template <typename T>
void run(const T* raw, const std::int64_t* targets, std::int64_t rows, std::int64_t vocabulary,
         const std::int32_t* part_of, std::int32_t parts, const T* options, const T* upstream, T* statistics,
         T* gradient) {
    const Transform<T> options_ = make_transform(options[0], options[1], options[2]);
    std::vector<T> logits(static_cast<std::size_t>(vocabulary));
    for (std::int64_t i = 0; i < rows; ++i) {
        const T* s = raw + i * vocabulary;
        for (std::int64_t j = 0; j < vocabulary; ++j) logits[static_cast<std::size_t>(j)] = transform(options_, s[j]);
        const RowStatistics<T> row = row_statistics(logits, targets[i], part_of, parts);
        const T found[] = {row.logprob, row.lse, row.entropy, row.log_sum_sq, row.mean_logit, row.correct};
        for (int k = 0; k < 6; ++k) statistics[i * 6 + k] = found[k];
        const T* u = upstream + i * 4;
        const Upstream<T> g{u[0], u[1], u[2], u[3]};
        for (std::int64_t j = 0; j < vocabulary; ++j) {
            const T dz = j == targets[i] ? target_gradient(g, row, vocabulary)
                                         : other_gradient(g, row, logits[static_cast<std::size_t>(j)], vocabulary);
            gradient[i * vocabulary + j] = dz * derivative(options_, s[j]);
        }
    }
}

}  // namespace

#define LOGITLESS_ROWS(NAME, T)                                                                                       \
    extern "C" __attribute__((visibility("default"))) void NAME(                                                      \
        const T* raw, const std::int64_t* targets, std::int64_t rows, std::int64_t vocabulary,                        \
        const std::int32_t* part_of, std::int32_t parts, const T* options, const T* upstream,                         \
        T* statistics, T* gradient) {                                                                                 \
        run<T>(raw, targets, rows, vocabulary, part_of, parts, options, upstream, statistics, gradient);              \
    }

LOGITLESS_ROWS(logitless_rows_float, float)
LOGITLESS_ROWS(logitless_rows_double, double)
