# Hopper's fused forward (forward_sm90.cu) needs the headers of CUTLASS, from the PyPI package nvidia-cutlass:
#
#   LOGITLESS_CUTLASS    the folder that holds cutlass/cutlass.h. Otherwise: the variable of the environment of that name,
#                        otherwise the package that the python3 in PATH has installed (Python3_EXECUTABLE names another)
#   LOGITLESS_FORWARD_CONFIGURATIONS
#                        ON builds other tiles and schedules of it too, to be timed (configurations_sm90.cu)
#
# Without them, or where 90a is not among the architectures, the kernel is left out: logitless_forward_sm90 then returns
# LOGITLESS_NOT_BUILT. Sets LOGITLESS_HOPPER_SOURCES.
set(LOGITLESS_CUTLASS "$ENV{LOGITLESS_CUTLASS}" CACHE PATH "Folder that holds cutlass/cutlass.h; empty: ask Python")
option(LOGITLESS_FORWARD_CONFIGURATIONS "All configurations of Hopper's fused forward, not the default alone" OFF)

if(NOT LOGITLESS_CUTLASS)
  find_package(Python3 COMPONENTS Interpreter QUIET)
  if(Python3_FOUND)
    # pip's isolated builds hide the environment's packages behind PYTHONPATH.
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH ${Python3_EXECUTABLE} -c
              "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
      OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(EXISTS "${package}/source/include/cutlass/cutlass.h")
      set(LOGITLESS_CUTLASS ${package}/source/include CACHE PATH "" FORCE)
    endif()
  endif()
endif()

set(LOGITLESS_HOPPER_SOURCES ${CMAKE_CURRENT_LIST_DIR}/host/absent.cpp)
if(NOT CMAKE_CUDA_ARCHITECTURES MATCHES "90a")
  message(STATUS "logitless: 90a is not among the architectures, so Hopper's fused forward is left out")
elseif(NOT EXISTS "${LOGITLESS_CUTLASS}/cutlass/cutlass.h")
  message(STATUS "logitless: no CUTLASS (pip install nvidia-cutlass), so Hopper's fused forward is left out")
else()
  add_library(logitless_hopper OBJECT ${LOGITLESS_DEVICE_SOURCES})
  target_include_directories(logitless_hopper SYSTEM PRIVATE ${LOGITLESS_CUTLASS})
  # With assertions on, their calls keep ptxas from pipelining wgmma.
  target_compile_definitions(logitless_hopper PRIVATE NDEBUG)
  if(LOGITLESS_FORWARD_CONFIGURATIONS)
    target_sources(logitless_hopper PRIVATE ${CMAKE_CURRENT_LIST_DIR}/configurations_sm90.cu)
    target_compile_definitions(logitless_hopper PRIVATE LOGITLESS_FORWARD_CONFIGURATIONS)
  endif()
  set_target_properties(logitless_hopper PROPERTIES CUDA_ARCHITECTURES 90a-real POSITION_INDEPENDENT_CODE ON)
  set(LOGITLESS_HOPPER_SOURCES $<TARGET_OBJECTS:logitless_hopper>)
endif()
