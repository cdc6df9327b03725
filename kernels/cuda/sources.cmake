# The translation units. Portable ones are also compiled for the CPU, against host/shim.h.
set(LOGITLESS_PORTABLE_SOURCES api.cu chunk.cu forward_sm80.cu merge.cu sparse.cu)
# For nvcc alone. What they define, host/absent.cpp defines for the CPU as not built.
set(LOGITLESS_DEVICE_SOURCES forward_sm90.cu)
list(TRANSFORM LOGITLESS_PORTABLE_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
list(TRANSFORM LOGITLESS_DEVICE_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
