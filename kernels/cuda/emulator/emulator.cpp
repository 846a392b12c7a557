// The scheduler of the emulator: fibers that run until they have to wait, and operating system
// threads that share out the blocks of a grid.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "emulator.h"

#include <ucontext.h>

namespace emulator {

__thread Thread* running = nullptr;

namespace {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t SLOT_BYTES = 64;

// Where some threads of a block wait for each other.
struct Barrier {
    unsigned arrived = 0, meetings = 0;

    void meet_if_arrived(unsigned threads);
};

struct Warp {
    Barrier barrier;
    // The last two exchanges: a fast lane may bring its next value before a slow one has read this
    // one.
    unsigned char slots[2][WARP][SLOT_BYTES];
};

struct Block;

// A thread and what lets it wait.
struct Fiber : Thread {
    Block* block;
    jmp_buf state;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK_BYTES]};
    bool is_started = false, is_done;
    // Where it has met last or waits, and the meetings there were before.
    const Barrier* barrier;
    unsigned seen;

    bool can_run() const { return !is_done && !(barrier && barrier->meetings == seen); }
    void meet_at(Barrier& place, unsigned threads);
    void leave();
};

Fiber& self() { return static_cast<Fiber&>(thread()); }

// One block under way. There is one per operating system thread, its stacks used for one block
// after another.
struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    const std::function<void()>* kernel = nullptr;
    jmp_buf scheduler;
    // Threads of this block, and those that have not returned.
    unsigned size = 0, alive = 0;
    // Number 0 is for all that have not.
    Barrier barriers[16];

    void run();
    bool run_warp(unsigned first);
    void resume(Fiber& fiber);
};

// A fiber runs one thread after another: to start it anew for every thread would cost two system
// calls.
void enter_fiber() {
    Fiber& fiber = self();
    for (;;) {
        (*fiber.block->kernel)();
        fiber.is_done = true;
        fiber.leave();
    }
}

void Barrier::meet_if_arrived(unsigned threads) {
    if (arrived == 0 || arrived < threads) return;
    arrived = 0;
    ++meetings;
}

void Fiber::meet_at(Barrier& place, unsigned threads) {
    barrier = &place;
    seen = place.meetings;
    ++place.arrived;
    place.meet_if_arrived(threads);
    if (place.meetings == seen) leave();
}

void Fiber::leave() {
    if (setjmp(state) == 0) longjmp(block->scheduler, 1);
}

void Block::run() {
    alive = size;
    warps.resize((size + WARP - 1) / WARP);
    for (Warp& warp : warps) warp.barrier.arrived = 0;
    for (Barrier& barrier : barriers) barrier.arrived = 0;
    while (alive > 0) {
        bool has_run = false;
        for (unsigned first = 0; first < size; first += WARP)
            while (run_warp(first)) has_run = true;
        if (!has_run) {
            std::fprintf(stderr, "emulator: the threads of a block wait for each other for ever\n");
            std::abort();
        }
    }
}

// Lets every thread of a warp run that can, and says whether there was one.
bool Block::run_warp(unsigned first) {
    bool has_run = false;
    for (unsigned i = first; i < std::min(first + WARP, size); ++i) {
        Fiber& fiber = *fibers[i];
        if (!fiber.can_run()) continue;
        has_run = true;
        resume(fiber);
        if (!fiber.is_done) continue;
        barriers[0].meet_if_arrived(--alive);
    }
    return has_run;
}

void Block::resume(Fiber& fiber) {
    running = &fiber;
    if (setjmp(scheduler) != 0) return;
    if (fiber.is_started) longjmp(fiber.state, 1);
    fiber.is_started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack.get();
    start.uc_stack.ss_size = STACK_BYTES;
    start.uc_link = nullptr;
    makecontext(&start, enter_fiber, 0);
    setcontext(&start);
}

// A grid under way. Every thread that helps takes the next block that nobody has taken.
struct Grid {
    uint3 size, block_size;
    size_t shared_bytes;
    const std::function<void()>* kernel;
    std::atomic<uint64_t> next_block{0};

    void help();
    void run_block(uint64_t index);
};

void Grid::help() {
    const uint64_t blocks = uint64_t(size.x) * size.y * size.z;
    for (uint64_t index; (index = next_block++) < blocks;) run_block(index);
}

void Grid::run_block(uint64_t index) {
    thread_local Block block;
    const uint3 of_block = {unsigned(index % size.x), unsigned(index / size.x % size.y), unsigned(index / size.x / size.y)};
    block.size = block_size.x * block_size.y * block_size.z;
    block.kernel = kernel;
    // What nobody writes must not look like zero: as fp16, fp32 and counters these bytes are NaN or
    // absurd.
    block.shared.assign(shared_bytes + 16, 0xff);
    while (block.fibers.size() < block.size) block.fibers.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < block.size; ++i) {
        Fiber& fiber = *block.fibers[i];
        fiber.thread_index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
        fiber.block_index = of_block;
        fiber.block_size = block_size;
        fiber.grid_size = size;
        fiber.block = &block;
        fiber.is_done = false;
        fiber.barrier = nullptr;
    }
    block.run();
}

// The other cores: threads that help with a grid and then wait for the next, until the process
// ends.
class Helpers {
public:
    Helpers() {
        for (unsigned i = 1; i < std::thread::hardware_concurrency(); ++i) {
            std::thread([this] { help_for_ever(); }).detach();
            ++count;
        }
    }

    // Runs a grid to its end, together with the calling thread.
    void run(Grid& grid) {
        const std::lock_guard<std::mutex> one_grid_at_a_time(running);
        start(&grid);
        grid.help();
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this] { return at_work == 0; });
    }

private:
    std::mutex running, mutex;
    std::condition_variable changed;
    Grid* current = nullptr;
    uint64_t started = 0;
    unsigned count = 0, at_work = 0;

    void start(Grid* grid) {
        const std::lock_guard<std::mutex> lock(mutex);
        current = grid;
        at_work = count;
        ++started;
        changed.notify_all();
    }

    void help_for_ever() {
        for (uint64_t seen = 0;; ++seen) {
            std::unique_lock<std::mutex> lock(mutex);
            changed.wait(lock, [&] { return started > seen; });
            Grid& grid = *current;
            lock.unlock();
            grid.help();
            lock.lock();
            if (--at_work == 0) changed.notify_all();
        }
    }
};

}  // namespace

unsigned char* dynamic_shared() {
    unsigned char* const bytes = self().block->shared.data();
    return bytes + (16 - uintptr_t(bytes) % 16) % 16;
}

void launch(uint3 grid_size, uint3 block_size, size_t shared_bytes, const std::function<void()>& kernel) {
    // Never destroyed: the threads outlive `main`.
    static Helpers& helpers = *new Helpers;
    Grid grid{grid_size, block_size, shared_bytes, &kernel};
    const uint64_t blocks = uint64_t(grid_size.x) * grid_size.y * grid_size.z;
    if (blocks == 1) return grid.run_block(0);
    helpers.run(grid);
}

void synchronize_block() { synchronize(0, self().block->alive); }

void synchronize(unsigned barrier, unsigned threads) { self().meet_at(self().block->barriers[barrier], threads); }

const unsigned char* exchange(const void* mine, size_t bytes) {
    Fiber& fiber = self();
    const uint3 at = fiber.thread_index, size = fiber.block_size;
    const unsigned index = at.x + size.x * (at.y + size.y * at.z);
    Warp& warp = fiber.block->warps[index / WARP];
    auto& slots = warp.slots[warp.barrier.meetings % 2];
    if (bytes > 0) std::memcpy(slots[index % WARP], mine, bytes);
    fiber.meet_at(warp.barrier, WARP);
    return &slots[0][0];
}

void mma_16x8x16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    struct Operands {
        float a[4][2], b[2][2];
    };
    Operands mine;
    const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    for (unsigned i = 0; i < 2; ++i) {
        for (unsigned word = 0; word < 4; ++word) mine.a[word][i] = half_to_float((unsigned short)(a[word] >> (16 * i)));
        for (unsigned word = 0; word < 2; ++word) mine.b[word][i] = half_to_float((unsigned short)(b[word] >> (16 * i)));
    }
    const unsigned char* all = exchange(&mine, sizeof mine);
    const unsigned lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    const auto of = [all](unsigned lane) {
        Operands operands;
        std::memcpy(&operands, all + SLOT_BYTES * lane, sizeof operands);
        return operands;
    };
    // Columns 2q, 2q + 1 of c need b of lanes 4 * column + 0..3; rows g, g + 8 need a of lanes 4g +
    // 0..3.
    for (unsigned peer = 0; peer < 4; ++peer) {
        const Operands row = of(4 * g + peer);
        for (unsigned n = 0; n < 2; ++n) {
            const Operands column = of(4 * (2 * q + n) + peer);
            for (unsigned m = 0; m < 2; ++m)
                for (unsigned high = 0; high < 2; ++high)
                    for (unsigned i = 0; i < 2; ++i) c[2 * m + n] += row.a[2 * high + m][i] * column.b[high][i];
        }
    }
}

}  // namespace emulator
