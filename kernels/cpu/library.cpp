// The interface of logitless_cpu.h: which sets of instructions this machine can run, and the functions of each.
#include <sys/syscall.h>
#include <unistd.h>

#include <cpuid.h>

#include "set.h"

namespace {

const logitless_cpu::Set& functions(std::int32_t set) {
#ifdef LOGITLESS_HAS_amx
    if (set == LOGITLESS_CPU_AMX) return logitless_cpu::AMX;
#endif
#ifdef LOGITLESS_HAS_avx512_bf16
    if (set == LOGITLESS_CPU_AVX512_BF16) return logitless_cpu::AVX512_BF16;
#endif
#ifdef LOGITLESS_HAS_avx512
    if (set == LOGITLESS_CPU_AVX512) return logitless_cpu::AVX512;
#endif
    return logitless_cpu::AVX2;
}

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
#ifdef LOGITLESS_HAS_avx512
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

bool has_avx512_bf16() {
#ifdef LOGITLESS_HAS_avx512_bf16
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// The processor's word for AMX-TILE and AMX-BF16, the kernel's leave to use its 8 KiB of registers, and a right product.
bool has_amx() {
#if defined(LOGITLESS_EMULATE_AMX)
    return has_avx512_bf16() && logitless_cpu::amx_is_right();
#elif defined(LOGITLESS_HAS_amx)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d = 0;
    if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    const bool present = (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0;
    return present && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 && logitless_cpu::amx_is_right();
#else
    return false;
#endif
}

}  // namespace

std::int32_t logitless_cpu_sets() {
    return static_cast<std::int32_t>(has_avx2()) << LOGITLESS_CPU_AVX2 |
           static_cast<std::int32_t>(has_avx512()) << LOGITLESS_CPU_AVX512 |
           static_cast<std::int32_t>(has_avx512_bf16()) << LOGITLESS_CPU_AVX512_BF16 |
           static_cast<std::int32_t>(has_amx()) << LOGITLESS_CPU_AMX;
}

std::int32_t logitless_cpu_leads(std::int32_t set) {
    return set != LOGITLESS_CPU_AVX2 && __builtin_cpu_is("amd") ? 1 : 0;
}

std::int32_t logitless_cpu_screens(std::int32_t set, std::int32_t dtype) { return functions(set).screens(dtype); }

void logitless_cpu_units(std::int32_t set, const void* rows, std::int32_t dtype, std::int64_t count, std::int64_t depth,
                         std::int64_t stride, float* out) {
    functions(set).units(rows, dtype, count, depth, stride, out);
}

std::int64_t logitless_cpu_stream(std::int32_t set, const struct logitless_stream* problem, std::int64_t first,
                                  std::int64_t count, std::int32_t* counts, std::int32_t* columns, float* values,
                                  std::int64_t room) {
    return functions(set).stream(problem, first, count, counts, columns, values, room);
}

void logitless_cpu_spread(std::int32_t set, const struct logitless_spread* x, std::int64_t first, std::int64_t last) {
    functions(set).spread(x, first, last);
}

std::int32_t logitless_cpu_product(std::int32_t set, std::int32_t dtype, const void* a, std::int64_t a_row,
                                   std::int64_t a_column, const void* b, std::int64_t b_row, std::int64_t b_column,
                                   float* out, std::int64_t out_stride, std::int64_t rows, std::int64_t columns,
                                   std::int64_t depth, std::int32_t adds) {
    return functions(set).product(dtype, a, a_row, a_column, b, b_row, b_column, out, out_stride, rows, columns, depth,
                                  adds);
}

void logitless_cpu_measure(std::int32_t set, float* z, std::int64_t stride, std::int64_t vocabulary, std::int64_t count,
                           const float* bias, float slope, const std::int64_t* targets, std::int32_t want,
                           std::uint16_t* narrow, float* target_logit, float* moments, std::int64_t moments_stride) {
    functions(set).measure(z, stride, vocabulary, count, bias, slope, targets, want, narrow, target_logit, moments,
                           moments_stride);
}

void logitless_cpu_route(const struct logitless_route* x, std::int64_t first, std::int64_t count, std::int64_t start,
                         std::int64_t* next) {
    for (std::int64_t t = first, k = start; t < first + count; ++t)
        for (const std::int64_t end = k + (x->counts[t] < 0 ? 0 : x->counts[t]); k < end; ++k) {
            const float value = x->value[k] * x->factor[t];
            const std::int64_t block = x->block[x->column[k]];
            const bool stays = value >= x->threshold || -value >= x->threshold || value != value;
            if (!stays) {
                if (x->out_token == nullptr) x->tail[t * x->tail_stride + block] += value;
            } else if (x->out_token == nullptr) {
                ++next[block];
            } else {
                const std::int64_t to = next[block]++;
                x->out_token[to] = static_cast<std::int32_t>(t);
                x->out_column[to] = x->column[k];
                x->out_value[to] = value;
            }
        }
}
