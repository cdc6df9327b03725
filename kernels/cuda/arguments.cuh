// The checks of a launcher's arguments, which come before anything starts.
#pragma once

#include <cmath>
#include <cstdint>

#include "partials.cuh"
#include "platform.cuh"

namespace logitless {

// The most rows of a grid whose blocks have 32 rows or fewer.
constexpr std::int64_t MOST_ROWS = 0x7fffffff;

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Conditions tried in order; the code of the first that does not hold, else LOGITLESS_DONE.
class Check {
public:
    Check& require(bool holds, std::int32_t otherwise) {
        if (code_ == LOGITLESS_DONE && !holds) code_ = otherwise;
        return *this;
    }
    Check& size(std::int64_t size, std::int64_t smallest, std::int64_t largest = INT64_MAX) {
        return require(smallest <= size && size <= largest, LOGITLESS_BAD_SIZE);
    }
    Check& stride(std::int64_t stride, std::int64_t row) { return require(stride >= row, LOGITLESS_BAD_STRIDE); }
    Check& pointer(const void* pointer, std::size_t alignment) {
        return require(pointer != nullptr, LOGITLESS_BAD_POINTER).maybe(pointer, alignment);
    }
    Check& maybe(const void* pointer, std::size_t alignment) {
        return require(is_aligned(pointer, alignment), LOGITLESS_BAD_POINTER);
    }
    template <typename T>
    Check& results(const Results<T>& to) {
        // Not a braced list in the loop itself: nvcc 13.0 makes text of it that its host compiler refuses.
        const T* const all[] = {to.logprob, to.lse, to.entropy, to.mean_logit, to.correct, to.log_sum_sq};
        for (const T* x : all) maybe(x, sizeof(T));
        return *this;
    }
    Check& moments(std::int32_t count) {
        return require(count == FEWEST_MOMENTS || count == ALL_MOMENTS, LOGITLESS_BAD_MOMENTS);
    }
    Check& options(double logit_scale, double softcap, double temperature) {
        positive(logit_scale).positive(temperature);
        return require(softcap == 0 || usable(softcap), LOGITLESS_BAD_OPTION);
    }
    std::int32_t code() const { return code_; }

private:
    static bool usable(double x) { return x > 0 && std::isfinite(x); }
    Check& positive(double x) { return require(usable(x), LOGITLESS_BAD_OPTION); }

    std::int32_t code_ = LOGITLESS_DONE;
};

template <typename T>
Results<T> as_results(void* logprob, void* lse, void* entropy, void* mean_logit, void* correct, void* log_sum_sq) {
    return {static_cast<T*>(logprob),    static_cast<T*>(lse),     static_cast<T*>(entropy),
            static_cast<T*>(mean_logit), static_cast<T*>(correct), static_cast<T*>(log_sum_sq)};
}

}  // namespace logitless
