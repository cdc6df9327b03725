// Fibers on one thread of the CPU, and the exchanges of a warp and of a block. See shim.h.
//
// This file is compiled without ThreadSanitizer: to it, fibers are threads, and the releases and acquires below are all
// that orders them. A launch's memory is used once under it, so that blocks stay unordered.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "shim.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#ifdef LOGITLESS_SANITIZE_THREAD
#include <sanitizer/tsan_interface.h>
#endif

namespace logitless {
namespace host {
namespace {

constexpr std::size_t STACK_BYTES = 96 * 1024;
constexpr unsigned LANES = 32;
constexpr std::size_t SLOT_BYTES = 64;
constexpr int NAN_BYTE = 0xff;

// All who are alive arrive, then all leave. Two sides in turn keep a quick thread's next arrival apart.
struct Barrier {
    unsigned arrived = 0, generation = 0;
    char sides[2] = {0, 0};
};

struct Warp {
    unsigned alive = LANES;
    Barrier memory, exchanges;
    alignas(16) char slots[2][LANES][SLOT_BYTES];
};

struct Fiber {
    dim3 index;
    Warp* warp = nullptr;
    unsigned place = 0;  // in its block
    bool started = false, finished = false;
    ucontext_t context;
    jmp_buf kept;
    void* thread = nullptr;  // ThreadSanitizer's
    std::unique_ptr<char[]> stack;
};

struct Block {
    dim3 index;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    unsigned alive = 0, idle_turns = 0;
    std::map<const void*, std::unique_ptr<char[]>> shared;
};

struct Launch {
    dim3 grid, block;
    std::size_t shared_bytes;
    const std::function<void()>& thread;
    char end = 0;
};

// One launch at a time on a thread of the CPU.
thread_local Launch* launch = nullptr;
thread_local Block* block = nullptr;
thread_local Fiber* self = nullptr;
thread_local Fiber outside;

[[noreturn]] void stop(const char* sentence) {
    std::fprintf(stderr, "logitless host shim: %s\n", sentence);
    std::abort();
}

#ifdef LOGITLESS_SANITIZE_THREAD
constexpr bool KEEPS_BLOCKS = true;
void release(char* place) { __tsan_release(place); }
void acquire(char* place) { __tsan_acquire(place); }
void* new_thread() { return __tsan_create_fiber(0); }
void end_thread(void* thread) { __tsan_destroy_fiber(thread); }
#else
constexpr bool KEEPS_BLOCKS = false;
void release(char*) {}
void acquire(char*) {}
void* new_thread() { return nullptr; }
void end_thread(void*) {}
#endif

// memcpy and memset that ThreadSanitizer does not watch.
void copy(void* to, const void* from, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = static_cast<const char*>(from)[i];
}
void fill(void* to, int byte, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = static_cast<char>(byte);
}

void jump(Fiber& from, Fiber& to) {
    self = &to;
#if defined(LOGITLESS_SANITIZE_THREAD)
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
    swapcontext(&from.context, &to.context);
#elif defined(LOGITLESS_SANITIZE)
    swapcontext(&from.context, &to.context);
#else
    // What swapcontext does, without its two system calls.
    if (_setjmp(from.kept) != 0) return;
    if (to.started) _longjmp(to.kept, 1);
    to.started = true;
    setcontext(&to.context);
#endif
}

// The next thread of the block that is alive has its turn; outside, when there is none.
void yield() {
    const unsigned count = static_cast<unsigned>(block->fibers.size());
    for (unsigned step = 1; step <= count; ++step) {
        Fiber& next = *block->fibers[(self->place + step) % count];
        if (next.finished) continue;
        if (&next != self) jump(*self, next);
        return;
    }
    jump(*self, outside);
}

void wait(Barrier& barrier, const unsigned& alive, bool orders_memory) {
    const unsigned mine = barrier.generation;
    char* const side = &barrier.sides[mine % 2];
    if (orders_memory) release(side);
    ++barrier.arrived;
    while (barrier.generation == mine) {
        if (barrier.arrived == alive) {
            barrier.arrived = 0;
            ++barrier.generation;
            block->idle_turns = 0;
        } else {
            if (++block->idle_turns > 4 * block->fibers.size()) stop("a barrier that some threads never reach");
            yield();
        }
    }
    if (orders_memory) acquire(side);
}

// Everything of a thread's life. It never returns: its last act is to give its turn away.
void live() {
    block->idle_turns = 0;
    launch->thread();
    release(&launch->end);
    block->idle_turns = 0;
    self->finished = true;
    --self->warp->alive;
    --block->alive;
    yield();
    stop("a thread that has ended was called");
}

std::unique_ptr<Fiber> make_fiber(unsigned place, Warp& warp) {
    auto fiber = std::make_unique<Fiber>();
    const dim3& size = launch->block;
    fiber->index = dim3(place % size.x, place / size.x % size.y, place / size.x / size.y);
    fiber->place = place;
    fiber->warp = &warp;
    fiber->stack.reset(new char[STACK_BYTES]);
    fiber->thread = new_thread();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, live, 0);
    return fiber;
}

std::unique_ptr<Block> run_block(dim3 index) {
    auto made = std::make_unique<Block>();
    block = made.get();
    block->index = index;
    block->alive = launch->block.x * launch->block.y * launch->block.z;
    block->warps.resize(block->alive / LANES);
    for (unsigned place = 0; place < block->alive; ++place)
        block->fibers.push_back(make_fiber(place, block->warps[place / LANES]));
    jump(outside, *block->fibers[0]);
    block = nullptr;
    return made;
}

void check(dim3 grid, dim3 size) {
    const std::size_t threads = std::size_t(size.x) * size.y * size.z;
    if (threads == 0 || threads > 1024 || threads % LANES != 0) stop("a block's size is a multiple of 32 up to 1024");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) stop("an empty grid");
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) stop("a grid beyond a GPU's limits");
}

void full(unsigned mask) {
    if (mask != 0xffffffffu) stop("a warp's mask that is not full");
    if (self->warp->alive != LANES) stop("a warp operation after some of its lanes have ended");
}

unsigned own_lane() { return self->place % LANES; }

// Every lane's `bytes` become visible to its warp; where, until the next but one call.
char (*publish(unsigned mask, const void* given, std::size_t bytes))[SLOT_BYTES] {
    full(mask);
    if (bytes > SLOT_BYTES) stop("an exchange of more bytes than a slot has");
    Warp& warp = *self->warp;
    auto* const slots = warp.slots[warp.exchanges.generation % 2];
    copy(slots[own_lane()], given, bytes);
    wait(warp.exchanges, warp.alive, false);
    return slots;
}

}  // namespace

const dim3& thread_index() { return self->index; }
const dim3& block_index() { return block->index; }
const dim3& block_size() { return launch->block; }
const dim3& grid_size() { return launch->grid; }

void* shared_array(const void* place, std::size_t bytes) {
    std::unique_ptr<char[]>& memory = block->shared[place];
    if (!memory) {  // the first thread to come makes it for all
        memory.reset(new char[bytes]);
        fill(memory.get(), NAN_BYTE, bytes);
        release(memory.get());
    }
    acquire(memory.get());
    return memory.get();
}

void* dynamic_shared() { return shared_array(&launch->shared_bytes, launch->shared_bytes); }

void run_grid(dim3 grid, dim3 size, std::size_t shared_bytes, const std::function<void()>& thread) {
    check(grid, size);
    Launch now{grid, size, shared_bytes, thread};
    launch = &now;
#ifdef LOGITLESS_SANITIZE_THREAD
    outside.thread = __tsan_get_current_fiber();
#endif
    outside.started = true;
    std::vector<std::unique_ptr<Block>> kept;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                kept.push_back(run_block(dim3(x, y, z)));
                if (!KEEPS_BLOCKS) kept.clear();
            }
    acquire(&now.end);
    for (auto& done : kept)
        for (auto& fiber : done->fibers) end_thread(fiber->thread);
    launch = nullptr;
}

void block_barrier() { wait(block->barrier, block->alive, true); }

void warp_barrier(unsigned mask) {
    full(mask);
    wait(self->warp->memory, self->warp->alive, true);
}

void exchange(unsigned mask, const void* given, void* received, std::size_t bytes, unsigned source) {
    copy(received, publish(mask, given, bytes)[source % LANES], bytes);
}

unsigned ballot(unsigned mask, bool vote) {
    const char given = vote ? 1 : 0;
    auto* const slots = publish(mask, &given, 1);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < LANES; ++lane) votes |= unsigned(slots[lane][0]) << lane;
    return votes;
}

float widen(bfloat16 x) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float widen(float16 x) {
    _Float16 value;
    std::memcpy(&value, &x.bits, sizeof value);
    return float(value);
}

template <>
bfloat16 narrow<bfloat16>(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return {std::uint16_t(bits >> 16 | 0x40)};
    return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
float16 narrow<float16>(float x) {
    const _Float16 value = _Float16(x);
    float16 made;
    std::memcpy(&made.bits, &value, sizeof made.bits);
    return made;
}

}  // namespace host
}  // namespace logitless
