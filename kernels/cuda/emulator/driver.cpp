// A CUDA driver without a GPU: the part of the driver API that the runtime calls, with the kernels
// of this folder run by the emulator. Built as libcuda.so by scripts/cuda-emulator; with its folder
// in LD_LIBRARY_PATH the product runs unchanged.
//
// Work is done when it is submitted, or recorded while its stream is captured. Stricter than a card
// where that finds mistakes: new memory is full of NaN, a kernel that writes around an allocation
// is named, blocks are whole warps, and the module must be one that the oldest supported driver
// loads. It shows no missing synchronisation.
//
//   SLIMLLM_EMULATOR_DEVICES   number of devices, 1 unless given
//   SLIMLLM_EMULATOR_MEMORY    bytes of memory of each, 8 GiB unless given
//   SLIMLLM_EMULATOR_CUDA      version of the driver, 12000 unless given
//   SLIMLLM_EMULATOR_COMPUTE   compute capability, 80 unless given

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "../kernels.cu"

namespace {

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
    STREAM_CAPTURE_WRONG_THREAD = 908,
};

// By error: its name and what it means.
const std::map<Result, std::pair<const char*, const char*>> ERRORS = {
    {SUCCESS, {"CUDA_SUCCESS", "no error"}},
    {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {NOT_INITIALIZED, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {NO_DEVICE, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {INVALID_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {INVALID_IMAGE, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {NO_BINARY_FOR_GPU, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for the device"}},
    {UNSUPPORTED_PTX_VERSION, {"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the PTX is newer than the driver"}},
    {INVALID_HANDLE, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {ILLEGAL_STATE, {"CUDA_ERROR_ILLEGAL_STATE", "not permitted in the present state"}},
    {NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {ILLEGAL_ADDRESS, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {NOT_SUPPORTED, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {STREAM_CAPTURE_UNSUPPORTED, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted while a stream is captured"}},
    {STREAM_CAPTURE_INVALIDATED, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "an earlier error spoilt the capture"}},
    {STREAM_CAPTURE_ISOLATION, {"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "the event was recorded outside the capture"}},
    {CAPTURED_EVENT, {"CUDA_ERROR_CAPTURED_EVENT", "the event was last recorded in a capture"}},
    {STREAM_CAPTURE_WRONG_THREAD, {"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "another thread began the capture"}},
};

// ---- the emulated card ----

size_t from_environment(const char* name, size_t otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

const int DEVICES = int(from_environment("SLIMLLM_EMULATOR_DEVICES", 1));
const size_t DEVICE_BYTES = from_environment("SLIMLLM_EMULATOR_MEMORY", size_t(8) << 30);
const int DRIVER_VERSION = int(from_environment("SLIMLLM_EMULATOR_CUDA", 12000));
const int COMPUTE_CAPABILITY = int(from_environment("SLIMLLM_EMULATOR_COMPUTE", 80));
constexpr int PTX_VERSION = 80;
constexpr int MAX_BLOCK_THREADS = 1024;
constexpr u32 MAX_BLOCK_Z = 64;
constexpr u32 MAX_GRID_X = 2147483647;
constexpr u32 MAX_GRID_YZ = 65535;
constexpr int MULTIPROCESSOR_THREADS = 2048;
constexpr int MULTIPROCESSOR_BLOCKS = 32;
constexpr int MULTIPROCESSOR_SHARED_BYTES = 164 << 10;
constexpr int RESERVED_SHARED_BYTES = 1 << 10;
constexpr int BLOCK_SHARED_BYTES = 48 << 10;
constexpr int RAISED_SHARED_BYTES = 163 << 10;

// By CUDA's number of the attribute.
const std::map<int, int> ATTRIBUTES = {
    {1, MAX_BLOCK_THREADS},
    {2, MAX_BLOCK_THREADS},  // of a block along x
    {3, MAX_BLOCK_THREADS},  // y
    {4, MAX_BLOCK_Z},
    {5, MAX_GRID_X},
    {6, MAX_GRID_YZ},
    {7, MAX_GRID_YZ},
    {8, BLOCK_SHARED_BYTES},
    {10, WARP},
    {16, 4},         // multiprocessors
    {18, 0},         // is integrated
    {38, 40 << 20},  // L2 cache, bytes
    {39, MULTIPROCESSOR_THREADS},
    {41, 1},  // unified addressing
    {75, COMPUTE_CAPABILITY / 10},
    {76, COMPUTE_CAPABILITY % 10},
    {81, MULTIPROCESSOR_SHARED_BYTES},
    {83, 0},  // managed memory
    {95, 0},  // cooperative launch
    {97, RAISED_SHARED_BYTES},
    {106, MULTIPROCESSOR_BLOCKS},
    {111, RESERVED_SHARED_BYTES},
    {115, 1},  // memory pools: cuMemAllocAsync
};

// ---- kernels ----

typedef std::function<void()> Call;

template <class T>
T argument(const void* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <class... Args, size_t... I>
Call bind_arguments(void (*kernel)(Args...), void** arguments, std::index_sequence<I...>) {
    return [kernel, values = std::make_tuple(argument<Args>(arguments[I])...)] { std::apply(kernel, values); };
}

// A call of the kernel with a copy of its arguments.
template <class... Args>
Call bind(void (*kernel)(Args...), void** arguments) {
    return bind_arguments(kernel, arguments, std::index_sequence_for<Args...>());
}

#define KERNEL(name) {#name, [](void** arguments) { return bind(name, arguments); }}

const std::map<std::string, std::function<Call(void**)>> KERNELS = {
    KERNEL(embed_packed),
    KERNEL(embed_trellis),
    KERNEL(embed_dense),
    KERNEL(norm_rows),
    KERNEL(norm_add),
    KERNEL(matvec_packed),
    KERNEL(matvec_raw),
    KERNEL(matvec_trellis),
    KERNEL(matvec_dense),
    KERNEL(matmul_packed),
    KERNEL(matmul_trellis),
    KERNEL(matmul_dense),
    KERNEL(route),
    KERNEL(experts_packed),
    KERNEL(experts_trellis),
    KERNEL(experts_dense),
    KERNEL(weigh_rows),
    KERNEL(rope_store_f16),
    KERNEL(rope_store_q8),
    KERNEL(attention_decode_f16),
    KERNEL(attention_decode_q8),
    KERNEL(attention_prefill_f16),
    KERNEL(attention_prefill_q8),
    KERNEL(activate),
    KERNEL(finish_logits),
    KERNEL(top_k),
    KERNEL(gemm_f32),
};

// ---- memory ----

// As fp16, fp32 and integers these bytes are NaN or absurd.
constexpr int UNWRITTEN = 0xff;
// Before and behind every allocation.
constexpr size_t GUARD_BYTES = 1024;

struct Allocation {
    size_t bytes;
    int device;

    static bool is_untouched(const u8* guard) {
        return guard[0] == UNWRITTEN && std::memcmp(guard, guard + 1, GUARD_BYTES - 1) == 0;
    }
};

class Memory {
public:
    // Null when the device is full.
    u8* allocate(int device, size_t bytes) {
        if (bytes > free_bytes(device)) return nullptr;
        const size_t padded = (bytes + 3 * GUARD_BYTES - 1) / GUARD_BYTES * GUARD_BYTES;
        u8* const base = static_cast<u8*>(std::aligned_alloc(GUARD_BYTES, padded));
        if (!base) return nullptr;
        std::memset(base, UNWRITTEN, padded);
        allocations[base + GUARD_BYTES] = {bytes, device};
        used[device] += bytes;
        return base + GUARD_BYTES;
    }

    Result release(u8* start) {
        const auto found = allocations.find(start);
        if (found == allocations.end()) return INVALID_VALUE;
        used[found->second.device] -= found->second.bytes;
        allocations.erase(found);
        std::free(start - GUARD_BYTES);
        return SUCCESS;
    }

    size_t free_bytes(int device) { return DEVICE_BYTES - used[device]; }

    // The allocation that a range of bytes lies in, or null.
    const Allocation* holder(const u8* start, size_t bytes) const {
        auto next = allocations.upper_bound(const_cast<u8*>(start));
        if (next == allocations.begin()) return nullptr;
        const auto& [first, allocation] = *--next;
        const size_t offset = start - first;
        return offset <= allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
    }

    // The size of an allocation whose guards were written to, or -1.
    long long damaged_bytes() const {
        for (const auto& [start, allocation] : allocations)
            if (!Allocation::is_untouched(start - GUARD_BYTES) || !Allocation::is_untouched(start + allocation.bytes))
                return (long long)allocation.bytes;
        return -1;
    }

private:
    std::map<u8*, Allocation> allocations;
    std::map<int, size_t> used;
};

// ---- objects behind the handles ----

typedef std::function<Result()> Work;

struct Context {
    int device;
    int retained;
};

struct Graph {
    std::vector<Work> work;
};

struct ExecutableGraph {
    std::shared_ptr<const Graph> graph;
};

struct Capture {
    u64 number;
    std::thread::id thread;
    bool is_relaxed;
    bool is_invalid;
    std::unique_ptr<Graph> graph;
};

struct Stream {
    Context* context;
    std::unique_ptr<Capture> capture;
};

struct Event {
    Context* context;
    bool has_timing;
    bool is_recorded;
    u64 capture;  // number of the capture that it was last recorded in, 0 if none
    std::chrono::steady_clock::time_point time;
};

struct Function {
    Context* context;
    std::string name;
    std::function<Call(void**)> bind;
    size_t shared_limit;  // of dynamic shared memory, bytes
};

struct Module {
    std::map<std::string, Function> functions;
};

std::mutex api;
bool is_initialized = false;
Memory memory;
std::map<int, Context> contexts;
std::map<u8*, std::unique_ptr<u8[]>> host_memory;
// Every stream that is captured now.
std::vector<Stream*> capturing;
u64 captures = 0;
thread_local Context* current = nullptr;

#define REQUIRE(condition, error) \
    if (!(condition)) return error

// How the functions of the API begin: one call at a time, after cuInit.
#define ENTER()                                  \
    const std::lock_guard<std::mutex> lock(api); \
    REQUIRE(is_initialized, NOT_INITIALIZED)
#define ENTER_CONTEXT() \
    ENTER();            \
    REQUIRE(current, INVALID_CONTEXT)
// A call that may wait for the device must not be made beside a capture: it spoils the capture.
#define ENTER_UNCAPTURED() \
    ENTER_CONTEXT();       \
    REQUIRE(!spoil_captures(), STREAM_CAPTURE_UNSUPPORTED)

bool spoil_captures() {
    bool any = false;
    for (Stream* stream : capturing) {
        Capture& capture = *stream->capture;
        if (capture.is_relaxed || capture.thread != std::this_thread::get_id()) continue;
        capture.is_invalid = any = true;
    }
    return any;
}

// The handles 0, 1 and 2 are the default streams, which are never captured.
bool is_default(const Stream* stream) { return reinterpret_cast<uintptr_t>(stream) <= 2; }
Capture* capture_of(const Stream* stream) { return is_default(stream) ? nullptr : stream->capture.get(); }

// Does work now, or records it.
Result submit(Stream* stream, Work work) {
    Capture* const capture = capture_of(stream);
    if (!capture) return work();
    REQUIRE(!capture->is_invalid, STREAM_CAPTURE_INVALIDATED);
    capture->graph->work.push_back(std::move(work));
    return SUCCESS;
}

Result run(const Graph& graph) {
    for (const Work& work : graph.work)
        if (const Result result = work()) return result;
    return SUCCESS;
}

Result copy_to_device(u8* to, const void* from, size_t bytes) {
    REQUIRE(memory.holder(to, bytes) && (from || bytes == 0), INVALID_VALUE);
    if (bytes > 0) std::memcpy(to, from, bytes);
    return SUCCESS;
}

Result copy_to_host(void* to, const u8* from, size_t bytes) {
    REQUIRE(memory.holder(from, bytes) && (to || bytes == 0), INVALID_VALUE);
    if (bytes > 0) std::memcpy(to, from, bytes);
    return SUCCESS;
}

Result copy_on_device(u8* to, const u8* from, size_t bytes) {
    REQUIRE(memory.holder(to, bytes) && memory.holder(from, bytes), INVALID_VALUE);
    std::memmove(to, from, bytes);
    return SUCCESS;
}

Result copy_to_peer(u8* to, const Context* to_context, const u8* from, const Context* from_context, size_t bytes) {
    const Allocation* const target = memory.holder(to, bytes);
    const Allocation* const source = memory.holder(from, bytes);
    REQUIRE(target && target->device == to_context->device, INVALID_VALUE);
    REQUIRE(source && source->device == from_context->device, INVALID_VALUE);
    return copy_on_device(to, from, bytes);
}

Result fill(u8* start, u8 value, size_t bytes) {
    REQUIRE(memory.holder(start, bytes), INVALID_VALUE);
    std::memset(start, value, bytes);
    return SUCCESS;
}

Result allocate(u8** start, size_t bytes) {
    *start = memory.allocate(current->device, bytes);
    return *start ? SUCCESS : OUT_OF_MEMORY;
}

Result launch(const std::string& name, const Call& call, uint3 grid, uint3 block, size_t shared_bytes) {
    emulator::launch(grid, block, shared_bytes, call);
    const long long damaged = memory.damaged_bytes();
    if (damaged < 0) return SUCCESS;
    std::fprintf(stderr, "emulator: `%s` wrote around an allocation of %lld bytes\n", name.c_str(), damaged);
    return ILLEGAL_ADDRESS;
}

// ---- modules ----

// The number behind a directive, `.version 8.0` or `.target sm_80`, without its point; -1 if there
// is none.
int directive(const std::string& text, const char* name) {
    const size_t at = text.find(name);
    if (at == std::string::npos) return -1;
    int value = 0;
    bool has_digits = false;
    for (size_t i = at + std::strlen(name); i < text.size() && text[i] != '\n' && text[i] != ','; ++i) {
        if (text[i] < '0' || text[i] > '9') continue;
        value = 10 * value + (text[i] - '0');
        has_digits = true;
    }
    return has_digits ? value : -1;
}

// An ELF file or a fat binary, by the first bytes.
bool is_binary(const char* image) {
    return std::strncmp(image, "\x7f" "ELF", 4) == 0 || std::strncmp(image, "\x50\xed\x55\xba", 4) == 0;
}

Result check_ptx(const std::string& text) {
    const int version = directive(text, ".version "), target = directive(text, ".target ");
    REQUIRE(version > 0 && target > 0, INVALID_IMAGE);
    REQUIRE(version <= PTX_VERSION, UNSUPPORTED_PTX_VERSION);
    REQUIRE(target <= COMPUTE_CAPABILITY, NO_BINARY_FOR_GPU);
    return SUCCESS;
}

}  // namespace

// ---- the API: names and arguments are CUDA's ----

#define API extern "C" __attribute__((visibility("default"))) Result

API cuInit(unsigned) {
    const std::lock_guard<std::mutex> lock(api);
    REQUIRE(DEVICES > 0, NO_DEVICE);
    is_initialized = true;
    return SUCCESS;
}

API cuDriverGetVersion(int* version) {
    *version = DRIVER_VERSION;
    return SUCCESS;
}

API cuGetErrorName(Result error, const char** name) {
    const auto found = ERRORS.find(error);
    *name = found == ERRORS.end() ? nullptr : found->second.first;
    return *name ? SUCCESS : INVALID_VALUE;
}

API cuGetErrorString(Result error, const char** text) {
    const auto found = ERRORS.find(error);
    *text = found == ERRORS.end() ? nullptr : found->second.second;
    return *text ? SUCCESS : INVALID_VALUE;
}

// Devices.

API cuDeviceGetCount(int* count) {
    ENTER();
    *count = DEVICES;
    return SUCCESS;
}

API cuDeviceGet(int* device, int ordinal) {
    ENTER();
    REQUIRE(ordinal >= 0 && ordinal < DEVICES, INVALID_DEVICE);
    *device = ordinal;
    return SUCCESS;
}

API cuDeviceGetName(char* name, int capacity, int) {
    ENTER();
    REQUIRE(capacity > 0, INVALID_VALUE);
    std::snprintf(name, size_t(capacity), "CUDA emulator");
    return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int attribute, int) {
    ENTER();
    const auto found = ATTRIBUTES.find(attribute);
    REQUIRE(found != ATTRIBUTES.end(), INVALID_VALUE);
    *value = found->second;
    return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int) {
    ENTER();
    *bytes = DEVICE_BYTES;
    return SUCCESS;
}

API cuDeviceGetUuid(u8* uuid, int device) {
    ENTER();
    std::snprintf(reinterpret_cast<char*>(uuid), 16, "emulator %6d", device);
    return SUCCESS;
}

API cuDeviceGetUuid_v2(u8* uuid, int device) { return cuDeviceGetUuid(uuid, device); }

// Contexts: the primary one of each device.

API cuDevicePrimaryCtxRetain(Context** context, int device) {
    ENTER();
    REQUIRE(device >= 0 && device < DEVICES, INVALID_DEVICE);
    Context& primary = contexts[device];
    primary.device = device;
    ++primary.retained;
    *context = &primary;
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER();
    const auto found = contexts.find(device);
    REQUIRE(found != contexts.end() && found->second.retained > 0, INVALID_CONTEXT);
    --found->second.retained;
    return SUCCESS;
}

API cuCtxGetCurrent(Context** context) {
    ENTER();
    *context = current;
    return SUCCESS;
}

API cuCtxSetCurrent(Context* context) {
    ENTER();
    current = context;
    return SUCCESS;
}

API cuCtxSynchronize() {
    ENTER_UNCAPTURED();
    return SUCCESS;
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER_CONTEXT();
    *least = *greatest = 0;
    return SUCCESS;
}

// Memory.

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER_CONTEXT();
    *free = memory.free_bytes(current->device);
    *total = DEVICE_BYTES;
    return SUCCESS;
}

API cuMemAlloc_v2(u8** start, size_t bytes) {
    ENTER_UNCAPTURED();
    REQUIRE(bytes > 0, INVALID_VALUE);
    return allocate(start, bytes);
}

API cuMemFree_v2(u8* start) {
    ENTER_UNCAPTURED();
    return start ? memory.release(start) : SUCCESS;
}

API cuMemAllocAsync(u8** start, size_t bytes, Stream* stream) {
    ENTER_CONTEXT();
    REQUIRE(!capture_of(stream), STREAM_CAPTURE_UNSUPPORTED);
    return allocate(start, bytes);
}

API cuMemFreeAsync(u8* start, Stream* stream) {
    ENTER_CONTEXT();
    REQUIRE(!capture_of(stream), STREAM_CAPTURE_UNSUPPORTED);
    return start ? memory.release(start) : SUCCESS;
}

API cuMemHostAlloc(u8** start, size_t bytes, unsigned) {
    ENTER_UNCAPTURED();
    REQUIRE(bytes > 0, INVALID_VALUE);
    std::unique_ptr<u8[]> host(new u8[bytes]);
    std::memset(host.get(), UNWRITTEN, bytes);
    *start = host.get();
    host_memory[*start] = std::move(host);
    return SUCCESS;
}

API cuMemFreeHost(u8* start) {
    ENTER_UNCAPTURED();
    return host_memory.erase(start) == 1 ? SUCCESS : INVALID_VALUE;
}

API cuMemcpyHtoD_v2(u8* to, const void* from, size_t bytes) {
    ENTER_UNCAPTURED();
    return copy_to_device(to, from, bytes);
}

API cuMemcpyHtoDAsync_v2(u8* to, const void* from, size_t bytes, Stream* stream) {
    ENTER_CONTEXT();
    return submit(stream, [=] { return copy_to_device(to, from, bytes); });
}

API cuMemcpyDtoH_v2(void* to, const u8* from, size_t bytes) {
    ENTER_UNCAPTURED();
    return copy_to_host(to, from, bytes);
}

API cuMemcpyDtoHAsync_v2(void* to, const u8* from, size_t bytes, Stream* stream) {
    ENTER_CONTEXT();
    return submit(stream, [=] { return copy_to_host(to, from, bytes); });
}

API cuMemcpyDtoD_v2(u8* to, const u8* from, size_t bytes) {
    ENTER_UNCAPTURED();
    return copy_on_device(to, from, bytes);
}

API cuMemcpyDtoDAsync_v2(u8* to, const u8* from, size_t bytes, Stream* stream) {
    ENTER_CONTEXT();
    return submit(stream, [=] { return copy_on_device(to, from, bytes); });
}

API cuMemcpyPeerAsync(u8* to, const Context* to_context, const u8* from, const Context* from_context, size_t bytes,
                      Stream* stream) {
    ENTER_CONTEXT();
    return submit(stream, [=] { return copy_to_peer(to, to_context, from, from_context, bytes); });
}

API cuMemsetD8_v2(u8* start, u8 value, size_t bytes) {
    ENTER_UNCAPTURED();
    return fill(start, value, bytes);
}

API cuMemsetD8Async(u8* start, u8 value, size_t bytes, Stream* stream) {
    ENTER_CONTEXT();
    return submit(stream, [=] { return fill(start, value, bytes); });
}

// Streams.

API cuStreamCreate(Stream** stream, unsigned) {
    ENTER_CONTEXT();
    *stream = new Stream{current, nullptr};
    return SUCCESS;
}

API cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

API cuStreamDestroy_v2(Stream* stream) {
    ENTER();
    REQUIRE(!is_default(stream), INVALID_HANDLE);
    capturing.erase(std::remove(capturing.begin(), capturing.end(), stream), capturing.end());
    delete stream;
    return SUCCESS;
}

API cuStreamSynchronize(Stream* stream) {
    ENTER_CONTEXT();
    Capture* const capture = capture_of(stream);
    if (!capture) return SUCCESS;
    capture->is_invalid = true;
    return STREAM_CAPTURE_UNSUPPORTED;
}

API cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    ENTER_CONTEXT();
    const Capture* const capture = capture_of(stream);
    const u64 number = capture ? capture->number : 0;
    return event->capture == number ? SUCCESS : STREAM_CAPTURE_ISOLATION;
}

API cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* data) {
    ENTER_CONTEXT();
    return submit(stream, [=] {
        function(data);
        return SUCCESS;
    });
}

// Capture and graphs.

API cuStreamBeginCapture_v2(Stream* stream, int mode) {
    ENTER_CONTEXT();
    REQUIRE(!is_default(stream), STREAM_CAPTURE_UNSUPPORTED);
    REQUIRE(!stream->capture, ILLEGAL_STATE);
    constexpr int RELAXED = 2;
    const auto thread = std::this_thread::get_id();
    stream->capture.reset(new Capture{++captures, thread, mode == RELAXED, false, std::make_unique<Graph>()});
    capturing.push_back(stream);
    return SUCCESS;
}

API cuStreamEndCapture(Stream* stream, Graph** graph) {
    ENTER_CONTEXT();
    *graph = nullptr;
    REQUIRE(capture_of(stream), ILLEGAL_STATE);
    Capture& capture = *stream->capture;
    REQUIRE(capture.is_relaxed || capture.thread == std::this_thread::get_id(), STREAM_CAPTURE_WRONG_THREAD);
    if (!capture.is_invalid) *graph = capture.graph.release();
    stream->capture.reset();
    capturing.erase(std::remove(capturing.begin(), capturing.end(), stream), capturing.end());
    return *graph ? SUCCESS : STREAM_CAPTURE_INVALIDATED;
}

API cuStreamIsCapturing(const Stream* stream, int* status) {
    ENTER_CONTEXT();
    enum { NONE, ACTIVE, INVALIDATED };
    const Capture* const capture = capture_of(stream);
    *status = !capture ? NONE : capture->is_invalid ? INVALIDATED : ACTIVE;
    return SUCCESS;
}

API cuGraphInstantiateWithFlags(ExecutableGraph** executable, const Graph* graph, u64) {
    ENTER_CONTEXT();
    *executable = new ExecutableGraph{std::make_shared<const Graph>(*graph)};
    return SUCCESS;
}

API cuGraphUpload(ExecutableGraph*, Stream*) {
    ENTER_CONTEXT();
    return SUCCESS;
}

API cuGraphLaunch(ExecutableGraph* executable, Stream* stream) {
    ENTER_CONTEXT();
    return submit(stream, [graph = executable->graph] { return run(*graph); });
}

API cuGraphExecDestroy(ExecutableGraph* executable) {
    ENTER();
    delete executable;
    return SUCCESS;
}

API cuGraphDestroy(Graph* graph) {
    ENTER();
    delete graph;
    return SUCCESS;
}

// Events.

API cuEventCreate(Event** event, unsigned flags) {
    ENTER_CONTEXT();
    constexpr unsigned DISABLE_TIMING = 2;
    *event = new Event{current, !(flags & DISABLE_TIMING), false, 0, {}};
    return SUCCESS;
}

API cuEventDestroy_v2(Event* event) {
    ENTER();
    delete event;
    return SUCCESS;
}

API cuEventRecord(Event* event, Stream* stream) {
    ENTER_CONTEXT();
    REQUIRE(event->context == (is_default(stream) ? current : stream->context), INVALID_HANDLE);
    const Capture* const capture = capture_of(stream);
    event->is_recorded = true;
    event->capture = capture ? capture->number : 0;
    event->time = std::chrono::steady_clock::now();
    return SUCCESS;
}

API cuEventQuery(const Event* event) {
    ENTER();
    return event->capture == 0 ? SUCCESS : CAPTURED_EVENT;
}

API cuEventSynchronize(const Event* event) { return cuEventQuery(event); }

API cuEventElapsedTime(float* milliseconds, const Event* start, const Event* end) {
    ENTER();
    for (const Event* event : {start, end}) {
        REQUIRE(event->has_timing && event->is_recorded, INVALID_HANDLE);
        REQUIRE(event->capture == 0, CAPTURED_EVENT);
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return SUCCESS;
}

API cuEventElapsedTime_v2(float* milliseconds, const Event* start, const Event* end) {
    return cuEventElapsedTime(milliseconds, start, end);
}

// Modules and functions.

API cuModuleLoadData(Module** module, const char* image) {
    ENTER_UNCAPTURED();
    REQUIRE(image, INVALID_VALUE);
    const std::string ptx = is_binary(image) ? "" : image;
    if (!is_binary(image))
        if (const Result result = check_ptx(ptx)) return result;
    auto loaded = std::make_unique<Module>();
    for (const auto& [name, bind] : KERNELS)
        if (is_binary(image) || ptx.find(".entry " + name + "(") != std::string::npos)
            loaded->functions[name] = {current, name, bind, BLOCK_SHARED_BYTES};
    *module = loaded.release();
    return SUCCESS;
}

API cuModuleUnload(Module* module) {
    ENTER_UNCAPTURED();
    delete module;
    return SUCCESS;
}

API cuModuleGetFunction(Function** function, Module* module, const char* name) {
    ENTER_CONTEXT();
    const auto found = module->functions.find(name);
    REQUIRE(found != module->functions.end(), NOT_FOUND);
    *function = &found->second;
    return SUCCESS;
}

enum FunctionAttribute { MAX_THREADS = 0, BINARY_VERSION = 6, MAX_DYNAMIC_SHARED_BYTES = 8, SHARED_CARVEOUT = 9 };

API cuFuncGetAttribute(int* value, FunctionAttribute attribute, const Function* function) {
    ENTER_CONTEXT();
    switch (attribute) {
        case MAX_THREADS: *value = MAX_BLOCK_THREADS; return SUCCESS;
        case BINARY_VERSION: *value = COMPUTE_CAPABILITY; return SUCCESS;
        case MAX_DYNAMIC_SHARED_BYTES: *value = int(function->shared_limit); return SUCCESS;
        default: return NOT_SUPPORTED;
    }
}

API cuFuncSetAttribute(Function* function, FunctionAttribute attribute, int value) {
    ENTER_CONTEXT();
    if (attribute == SHARED_CARVEOUT) return SUCCESS;
    REQUIRE(attribute == MAX_DYNAMIC_SHARED_BYTES, NOT_SUPPORTED);
    REQUIRE(value >= 0 && value <= RAISED_SHARED_BYTES, INVALID_VALUE);
    function->shared_limit = size_t(value);
    return SUCCESS;
}

API cuFuncSetCacheConfig(Function*, int) {
    ENTER_CONTEXT();
    return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const Function* function, int block_threads,
                                                size_t shared_bytes) {
    ENTER_CONTEXT();
    REQUIRE(block_threads > 0 && block_threads <= MAX_BLOCK_THREADS, INVALID_VALUE);
    REQUIRE(shared_bytes <= function->shared_limit, INVALID_VALUE);
    const int by_shared = MULTIPROCESSOR_SHARED_BYTES / (int(shared_bytes) + RESERVED_SHARED_BYTES);
    *blocks = std::min({MULTIPROCESSOR_BLOCKS, MULTIPROCESSOR_THREADS / block_threads, by_shared});
    return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const Function* function, int block_threads,
                                                         size_t shared_bytes, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, block_threads, shared_bytes);
}

API cuLaunchKernel(const Function* function, u32 grid_x, u32 grid_y, u32 grid_z, u32 block_x, u32 block_y, u32 block_z,
                   u32 shared_bytes, Stream* stream, void** arguments, void** extra) {
    ENTER_CONTEXT();
    REQUIRE(!extra && arguments, NOT_SUPPORTED);
    REQUIRE(function->context == current && (is_default(stream) || stream->context == current), INVALID_HANDLE);
    REQUIRE(grid_x > 0 && grid_y > 0 && grid_z > 0, INVALID_VALUE);
    REQUIRE(grid_x <= MAX_GRID_X && grid_y <= MAX_GRID_YZ && grid_z <= MAX_GRID_YZ, INVALID_VALUE);
    const u64 threads = u64(block_x) * block_y * block_z;
    REQUIRE(threads > 0 && threads <= MAX_BLOCK_THREADS && threads % WARP == 0 && block_z <= MAX_BLOCK_Z, INVALID_VALUE);
    REQUIRE(shared_bytes <= function->shared_limit, INVALID_VALUE);
    const uint3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    return submit(stream, [=, name = function->name, call = function->bind(arguments)] {
        return launch(name, call, grid, block, shared_bytes);
    });
}

// What cudarc can also call.
#define UNSUPPORTED(name) \
    API name() { return NOT_SUPPORTED; }
UNSUPPORTED(cuCtxCreate_v3)
UNSUPPORTED(cuCtxCreate_v4)
UNSUPPORTED(cuCtxDestroy_v2)
UNSUPPORTED(cuCtxGetCacheConfig)
UNSUPPORTED(cuCtxGetLimit)
UNSUPPORTED(cuCtxSetCacheConfig)
UNSUPPORTED(cuCtxSetFlags)
UNSUPPORTED(cuCtxSetLimit)
UNSUPPORTED(cuDestroyExternalMemory)
UNSUPPORTED(cuDeviceGetDefaultMemPool)
UNSUPPORTED(cuDeviceGetMemPool)
UNSUPPORTED(cuDeviceSetMemPool)
UNSUPPORTED(cuExternalMemoryGetMappedBuffer)
UNSUPPORTED(cuImportExternalMemory)
UNSUPPORTED(cuLaunchCooperativeKernel)
UNSUPPORTED(cuMemAdvise_v2)
UNSUPPORTED(cuMemAllocFromPoolAsync)
UNSUPPORTED(cuMemAllocManaged)
UNSUPPORTED(cuMemPoolCreate)
UNSUPPORTED(cuMemPoolDestroy)
UNSUPPORTED(cuMemPoolGetAttribute)
UNSUPPORTED(cuMemPoolSetAttribute)
UNSUPPORTED(cuMemPoolTrimTo)
UNSUPPORTED(cuMemPrefetchAsync_v2)
UNSUPPORTED(cuModuleGetGlobal_v2)
UNSUPPORTED(cuModuleLoad)
UNSUPPORTED(cuOccupancyAvailableDynamicSMemPerBlock)
UNSUPPORTED(cuOccupancyMaxActiveClusters)
UNSUPPORTED(cuOccupancyMaxPotentialBlockSize)
UNSUPPORTED(cuOccupancyMaxPotentialBlockSizeWithFlags)
UNSUPPORTED(cuOccupancyMaxPotentialClusterSize)
UNSUPPORTED(cuProfilerStart)
UNSUPPORTED(cuProfilerStop)
UNSUPPORTED(cuStreamAttachMemAsync)
