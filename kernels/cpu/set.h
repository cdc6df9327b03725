// The functions of one set of instructions, as library.cpp calls them: those of logitless_cpu.h without the set.
#pragma once

#include <cstdint>

#include "logitless_cpu.h"

namespace logitless_cpu {

template <typename Function>
struct WithoutSet;

template <typename Result, typename... Arguments>
struct WithoutSet<Result(std::int32_t, Arguments...)> {
    typedef Result (*type)(Arguments...);
};

struct Set {
    WithoutSet<decltype(logitless_cpu_screens)>::type screens;
    WithoutSet<decltype(logitless_cpu_units)>::type units;
    WithoutSet<decltype(logitless_cpu_stream)>::type stream;
    WithoutSet<decltype(logitless_cpu_spread)>::type spread;
    WithoutSet<decltype(logitless_cpu_product)>::type product;
    WithoutSet<decltype(logitless_cpu_measure)>::type measure;
};

// Whether AMX's tiles have the product that they should (tiles.h).
bool amx_is_right();

extern const Set AVX2, AVX512, AVX512_BF16, AMX;

}  // namespace logitless_cpu
