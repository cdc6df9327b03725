// The configurations of logitless_forward_sm90 besides the default, for measurements (configurations_sm90.cu).
#pragma once

#include <cstdint>

namespace logitless {

struct Forward;

struct Configuration {
    const char* name;
    std::int32_t (*run)(const Forward&);  // bfloat16
};

// Null beyond the last.
const Configuration* other_configuration(std::int32_t index);

}  // namespace logitless
