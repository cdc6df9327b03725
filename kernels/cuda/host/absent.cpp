// Substitutes in liblogitless_host for the kernels that only a GPU can run (sources.cmake, LOGITLESS_DEVICE_SOURCES).
#include "../logitless.h"

int32_t logitless_forward_sm90(const void*, const void*, int32_t, int64_t, int64_t, int64_t, int64_t, int64_t, const void*,
                               const int64_t*, double, double, double, void*, int32_t, void*, void*, int64_t, int32_t,
                               int32_t, void*) {
    return LOGITLESS_NOT_BUILT;
}
const char* logitless_forward_sm90_configuration(int32_t) { return nullptr; }
