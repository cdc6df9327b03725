// mma.cuh for the CPU: its functions, by the fragment layouts that its header states, on the exchanges of host/shim.h.
//
// A copy happens as late as a GPU may make it, at the wait for it. Until then its place holds NaNs. So the results show
// a missing wait, and ThreadSanitizer shows a stage that is refilled while others still read it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "shim.h"

#define LOGITLESS_UNROLL

namespace logitless {

class Copies {
  public:
    void copy(void* shared, const void* global, bool present) {
        std::memset(shared, 0xff, 16);
        open_.push_back({shared, present ? global : nullptr});
    }

    void commit() {
        groups_.push_back(std::move(open_));
        open_.clear();
    }

    template <int PENDING>
    void wait() {
        for (; groups_.size() > PENDING; groups_.pop_front())
            for (const Copy& one : groups_.front()) {
                if (one.from == nullptr) std::memset(one.to, 0, 16);
                else std::memcpy(one.to, one.from, 16);
            }
    }

  private:
    struct Copy {
        void* to;
        const void* from;
    };
    std::vector<Copy> open_;
    std::deque<std::vector<Copy>> groups_;
};

namespace host {

struct Half2 {
    std::uint16_t at[2];
};

inline void load_matrices(std::uint32_t (&to)[4], const void* row, bool transposed) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) std::abort();
    for (unsigned m = 0; m < 4; ++m) {
        Half2 found;
        for (unsigned k = 0; k < 2; ++k) {
            const unsigned major = lane() / 4, minor = lane() % 4 * 2 + k;
            const auto* from = from_lane(0xffffffffu, static_cast<const std::uint16_t*>(row),
                                         8 * m + (transposed ? minor : major));
            found.at[k] = from[transposed ? major : minor];
        }
        std::memcpy(&to[m], &found, 4);
    }
}

template <typename Half>
float element(std::uint32_t both, unsigned which) {
    Half2 halves;
    std::memcpy(&halves, &both, 4);
    return widen(Half{halves.at[which]});
}

struct FragmentA {
    std::uint32_t at[4];
};
struct FragmentB {
    std::uint32_t at[2];
};

}  // namespace host

inline void load_matrices(std::uint32_t (&to)[4], const void* row) { host::load_matrices(to, row, false); }
inline void load_matrices_transposed(std::uint32_t (&to)[4], const void* row) { host::load_matrices(to, row, true); }

template <typename Half>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, Half) {
    const host::FragmentA own_a{{a[0], a[1], a[2], a[3]}};
    const host::FragmentB own_b{{b0, b1}};
    const unsigned lane = host::lane(), row = lane / 4, column = lane % 4 * 2;
    for (unsigned q = 0; q < 4; ++q) {  // of k: 2 q, 2 q + 1, 2 q + 8, 2 q + 9
        const host::FragmentA left = host::from_lane(0xffffffffu, own_a, row * 4 + q);
        for (unsigned v = 0; v < 2; ++v) {
            const host::FragmentB right = host::from_lane(0xffffffffu, own_b, (column + v) * 4 + q);
            for (unsigned high = 0; high < 2; ++high)
                for (unsigned k = 0; k < 4; ++k)
                    c[2 * high + v] += host::element<Half>(left.at[high + k / 2 * 2], k % 2) *
                                       host::element<Half>(right.at[k / 2], k % 2);
        }
    }
}

inline void add_to_global(float* to, const float (&v)[4]) {
    if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0) std::abort();
    for (int k = 0; k < 4; ++k) atomicAdd(to + k, v[k]);
}

}  // namespace logitless
