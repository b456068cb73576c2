// A stand-in for libcuda.so.1 on the host, for tests: devices, contexts, memory, streams, events,
// capture and graphs. What the real driver refuses, this one refuses with the same code; what the
// real one leaves undefined is made to fail here.
//
// - Work is late: it runs when somebody waits for its stream, never when it is put there.
// - Memory is poisoned (0xff, which is NaN) when it is handed out and when it is freed, and freed
//   memory is kept aside for a while, so that a late write to it is seen.
// - A call that needs a context fails where the thread has none, and a stream works in its own
//   context alone.
// - Host and devices have clocks of their own, so that times are exact: work begins when it was put
//   on the stream and the work before it is done, and takes the time that standin_delay gives it,
//   else none; the host takes what standin_host_works says, and waits.
//
// The functions standin_* are for tests: what is alive, what was done wrong, what should fail.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

enum Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_WRONG_THREAD = 905,
};

const std::map<int, const char *> ERROR_NAMES = {
    {SUCCESS, "CUDA_SUCCESS"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {NOT_READY, "CUDA_ERROR_NOT_READY"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"},
};

constexpr int DEVICES = 2, POISON = 0xff, RELAXED = 2;
constexpr size_t KEPT_ASIDE = size_t(256) << 20; // bytes of freed memory

std::recursive_mutex everything;
int devices = DEVICES, version = 13000, capability[] = {8, 0};
std::vector<std::string> wrong; // what was done that must not be
std::map<std::string, std::deque<int>> to_fail; // by function: codes of the calls to come
std::map<std::string, long> calls;

double host_ms = 0; // the host's clock, which runs when a test says so and when it waits

struct Context;

struct Op {
  std::function<int(double)> run; // given the device's time at its end
  double cost_ms = 0, put_ms = 0;
};

struct Graph {
  std::vector<Op> ops;
};

struct Stream {
  explicit Stream(Context *where) : context(where) {}
  Context *context;
  std::deque<Op> pending;
  double ready_ms = 0;
  std::unique_ptr<Graph> capture; // while it is captured
  bool broken = false;            // the capture is
  int mode = 0;
  std::thread::id thread; // that began the capture
};

struct Event {
  Context *context;
  bool done = false;
  double ms = 0;
};

struct Context {
  int device;
  int fault = SUCCESS; // sticky, as after an illegal address
  Stream legacy{this}, per_thread{this};
};

struct Block {
  uint8_t *memory;
  size_t bytes;
  int device;
};

Context contexts[DEVICES] = {{0}, {1}};
thread_local std::vector<Context *> current;
std::map<uintptr_t, Block> alive;
std::deque<Block> freed;
size_t freed_bytes = 0;
std::set<Stream *> streams;
std::set<Event *> events;
std::set<Graph *> graphs, executables;

// -- memory ---------------------------------------------------------------------------------------

bool inside(const Block &block, uintptr_t address, size_t bytes) {
  uintptr_t begin = uintptr_t(block.memory);
  return address >= begin && address + bytes <= begin + block.bytes;
}

const Block *block_of(uintptr_t address, size_t bytes) {
  auto after = alive.upper_bound(address);
  if (after == alive.begin()) return nullptr;
  const Block &block = std::prev(after)->second;
  return inside(block, address, bytes) ? &block : nullptr;
}

int usable(Context *context, uintptr_t address, size_t bytes) {
  if (block_of(address, bytes)) return SUCCESS;
  bool late = std::any_of(freed.begin(), freed.end(),
                          [&](const Block &block) { return inside(block, address, bytes); });
  wrong.push_back(late ? "memory was used after it was freed" : "no device memory was used as such");
  return context->fault = ILLEGAL_ADDRESS;
}

void drop_oldest() {
  Block block = freed.front();
  freed.pop_front();
  freed_bytes -= block.bytes;
  bool intact = std::all_of(block.memory, block.memory + block.bytes,
                            [](uint8_t byte) { return byte == POISON; });
  if (!intact) wrong.push_back("memory was written to after it was freed");
  std::free(block.memory);
}

// -- streams --------------------------------------------------------------------------------------

Stream *stream_of(void *handle) {
  if (uintptr_t(handle) < 2) return &current.back()->legacy;
  if (uintptr_t(handle) == 2) return &current.back()->per_thread;
  auto *stream = static_cast<Stream *>(handle);
  return streams.count(stream) && stream->context == current.back() ? stream : nullptr;
}

int run_pending(Stream *stream) {
  while (!stream->pending.empty()) {
    Op op = std::move(stream->pending.front());
    stream->pending.pop_front();
    stream->ready_ms = std::max(stream->ready_ms, op.put_ms) + op.cost_ms;
    if (int code = op.run(stream->ready_ms)) return stream->context->fault = code;
  }
  host_ms = std::max(host_ms, stream->ready_ms); // the host has waited
  return stream->context->fault;
}

int run_all(Context *context) {
  for (Stream *stream : std::set<Stream *>(streams))
    if (stream->context == context)
      if (int code = run_pending(stream)) return code;
  if (int code = run_pending(&context->legacy)) return code;
  return run_pending(&context->per_thread);
}

int put(void *handle, Op op) {
  Stream *stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->context->fault) return stream->context->fault;
  if (stream->capture) {
    if (stream->broken) return CAPTURE_INVALIDATED;
    stream->capture->ops.push_back(std::move(op));
    return SUCCESS;
  }
  op.put_ms = host_ms;
  stream->pending.push_back(std::move(op));
  return SUCCESS;
}

// Breaks the captures for which `is_hit` is true; whether there were any.
bool break_captures(const std::function<bool(Stream *)> &is_hit) {
  bool hit = false;
  for (Stream *stream : streams)
    if (stream->capture && is_hit(stream)) hit = stream->broken = true;
  return hit;
}

// What may wait for a device is refused to a thread that captures, unless its capture is relaxed.
bool refused_here() {
  return break_captures([](Stream *stream) {
    return stream->mode != RELAXED &&
           (stream->mode == 0 || stream->thread == std::this_thread::get_id());
  });
}

// -- calls ----------------------------------------------------------------------------------------

int begin_call(const char *name, bool needs_context) {
  ++calls[name];
  auto &codes = to_fail[name];
  if (!codes.empty()) {
    int code = codes.front();
    codes.pop_front();
    return code;
  }
  if (!needs_context) return SUCCESS;
  return current.empty() ? INVALID_CONTEXT : current.back()->fault;
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define CALL(needs_context)                                                                        \
  std::lock_guard<std::recursive_mutex> guard(everything);                                         \
  if (int code = begin_call(__func__, needs_context)) return code

// -- devices and contexts -------------------------------------------------------------------------

API cuInit(unsigned) {
  CALL(false);
  return SUCCESS;
}

API cuDriverGetVersion(int *found) {
  CALL(false);
  *found = version;
  return SUCCESS;
}

API cuGetErrorName(int code, const char **name) {
  auto found = ERROR_NAMES.find(code);
  *name = found == ERROR_NAMES.end() ? "CUDA_ERROR_UNKNOWN" : found->second;
  return SUCCESS;
}

API cuGetErrorString(int, const char **text) {
  *text = "said by the stand-in driver";
  return SUCCESS;
}

API cuDeviceGetCount(int *count) {
  CALL(false);
  *count = devices;
  return SUCCESS;
}

API cuDeviceGet(int *device, int index) {
  CALL(false);
  if (index < 0 || index >= devices) return INVALID_DEVICE;
  *device = index;
  return SUCCESS;
}

API cuDeviceGetName(char *name, int size, int device) {
  CALL(false);
  snprintf(name, size_t(size), "Stand-in GPU %d", device);
  return SUCCESS;
}

API cuDeviceGetAttribute(int *value, int attribute, int) {
  CALL(false);
  constexpr int MAJOR = 75, MINOR = 76;
  *value = attribute == MAJOR ? capability[0] : attribute == MINOR ? capability[1] : 1;
  return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void **context, int device) {
  CALL(false);
  *context = &contexts[device];
  return SUCCESS;
}

API cuCtxGetCurrent(void **context) {
  CALL(false);
  *context = current.empty() ? nullptr : current.back();
  return SUCCESS;
}

API cuCtxPushCurrent(void *context) {
  CALL(false);
  current.push_back(static_cast<Context *>(context));
  return SUCCESS;
}

API cuCtxPopCurrent(void **context) {
  CALL(false);
  if (current.empty()) return INVALID_CONTEXT;
  *context = current.back();
  current.pop_back();
  return SUCCESS;
}

API cuCtxGetDevice(int *device) {
  CALL(true);
  *device = current.back()->device;
  return SUCCESS;
}

API cuCtxSynchronize() {
  CALL(true);
  Context *context = current.back();
  if (break_captures([=](Stream *stream) { return stream->context == context; }))
    return CAPTURE_UNSUPPORTED;
  return run_all(context);
}

// -- memory ---------------------------------------------------------------------------------------

API cuMemAlloc(uintptr_t *address, size_t bytes) {
  CALL(true);
  if (refused_here()) return CAPTURE_UNSUPPORTED;
  void *memory = nullptr;
  if (!bytes) return INVALID_VALUE;
  if (posix_memalign(&memory, 256, bytes)) return OUT_OF_MEMORY;
  memset(memory, POISON, bytes);
  *address = uintptr_t(memory);
  alive[*address] = {static_cast<uint8_t *>(memory), bytes, current.back()->device};
  return SUCCESS;
}

API cuMemFree(uintptr_t address) {
  CALL(true);
  if (refused_here()) {
    wrong.push_back("memory was freed by a thread that captures");
    return CAPTURE_UNSUPPORTED;
  }
  auto found = alive.find(address);
  if (found == alive.end()) {
    wrong.push_back("memory was freed that is not alive");
    return INVALID_VALUE;
  }
  Block block = found->second;
  if (int code = run_all(&contexts[block.device])) return code; // as the driver waits
  memset(block.memory, POISON, block.bytes);
  alive.erase(found);
  freed.push_back(block);
  freed_bytes += block.bytes;
  while (freed_bytes > KEPT_ASIDE) drop_oldest();
  return SUCCESS;
}

API cuPointerGetAttribute(void *value, int attribute, uintptr_t address) {
  CALL(false);
  constexpr int DEVICE_ORDINAL = 9;
  const Block *block = block_of(address, 1);
  if (attribute != DEVICE_ORDINAL || !block) return INVALID_VALUE;
  *static_cast<int *>(value) = block->device;
  return SUCCESS;
}

API cuMemsetD8Async(uintptr_t target, unsigned char byte, size_t bytes, void *stream) {
  CALL(true);
  Context *context = current.back();
  return put(stream, {[=](double) {
               if (int code = usable(context, target, bytes)) return code;
               memset(reinterpret_cast<void *>(target), byte, bytes);
               return int(SUCCESS);
             }});
}

API cuMemcpyHtoDAsync(uintptr_t target, const void *source, size_t bytes, void *stream) {
  CALL(true);
  Context *context = current.back();
  return put(stream, {[=](double) {
               if (int code = usable(context, target, bytes)) return code;
               memcpy(reinterpret_cast<void *>(target), source, bytes);
               return int(SUCCESS);
             }});
}

API cuMemcpyDtoHAsync(void *target, uintptr_t source, size_t bytes, void *stream) {
  CALL(true);
  Context *context = current.back();
  return put(stream, {[=](double) {
               if (int code = usable(context, source, bytes)) return code;
               memcpy(target, reinterpret_cast<void *>(source), bytes);
               return int(SUCCESS);
             }});
}

API cuMemcpyDtoDAsync(uintptr_t target, uintptr_t source, size_t bytes, void *stream) {
  CALL(true);
  Context *context = current.back();
  return put(stream, {[=](double) {
               if (int code = usable(context, target, bytes)) return code;
               if (int code = usable(context, source, bytes)) return code;
               memcpy(reinterpret_cast<void *>(target), reinterpret_cast<void *>(source), bytes);
               return int(SUCCESS);
             }});
}

struct Copy2D {  // CUDA_MEMCPY2D of cuda.h
  size_t source_x, source_y;
  unsigned source_type;
  const void *source_host;
  uintptr_t source;
  void *source_array;
  size_t source_pitch, target_x, target_y;
  unsigned target_type;
  void *target_host;
  uintptr_t target;
  void *target_array;
  size_t target_pitch, width, height;
};

API cuMemcpy2DAsync(const Copy2D *given, void *stream) {
  CALL(true);
  const unsigned device = 2;
  Copy2D copy = *given;
  if (copy.source_type != device || copy.target_type != device) return INVALID_VALUE;
  if (copy.width > copy.source_pitch || copy.width > copy.target_pitch) return INVALID_VALUE;
  Context *context = current.back();
  return put(stream, {[=](double) {
               for (size_t row = 0; row < copy.height; ++row) {
                 uintptr_t source = copy.source + (copy.source_y + row) * copy.source_pitch;
                 uintptr_t target = copy.target + (copy.target_y + row) * copy.target_pitch;
                 source += copy.source_x, target += copy.target_x;
                 if (int code = usable(context, target, copy.width)) return code;
                 if (int code = usable(context, source, copy.width)) return code;
                 memcpy(reinterpret_cast<void *>(target), reinterpret_cast<void *>(source),
                        copy.width);
               }
               return int(SUCCESS);
             }});
}

// -- streams and what is put on them --------------------------------------------------------------

API cuStreamCreate(void **stream, unsigned) {
  CALL(true);
  *stream = *streams.insert(new Stream(current.back())).first;
  return SUCCESS;
}

API cuStreamDestroy(void *handle) {
  CALL(true);
  Stream *stream = stream_of(handle);
  if (!stream || uintptr_t(handle) <= 2) return INVALID_HANDLE;
  int code = run_pending(stream);
  streams.erase(stream);
  delete stream;
  return code;
}

API cuStreamGetCtx(void *handle, void **context) {
  CALL(false);
  auto *stream = static_cast<Stream *>(handle);
  if (!streams.count(stream)) return INVALID_HANDLE;
  *context = stream->context;
  return SUCCESS;
}

API cuStreamSynchronize(void *handle) {
  CALL(true);
  Stream *stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) {
    stream->broken = true;
    return CAPTURE_UNSUPPORTED;
  }
  return run_pending(stream);
}

API cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  CALL(true);
  return put(stream, {[=](double) {
               function(data);
               return int(SUCCESS);
             }});
}

API cuEventCreate(void **event, unsigned) {
  CALL(true);
  *event = *events.insert(new Event{current.back()}).first;
  return SUCCESS;
}

API cuEventRecord(void *handle, void *stream) {
  CALL(true);
  auto *event = static_cast<Event *>(handle);
  if (!events.count(event) || event->context != current.back()) return INVALID_HANDLE;
  event->done = false;
  return put(stream, {[=](double ms) {
               event->done = true;
               event->ms = ms;
               return int(SUCCESS);
             }});
}

API cuEventElapsedTime(float *ms, void *begin, void *end) {
  CALL(true);
  auto *first = static_cast<Event *>(begin), *second = static_cast<Event *>(end);
  if (!events.count(first) || !events.count(second)) return INVALID_HANDLE;
  if (!first->done || !second->done) return NOT_READY;
  *ms = float(second->ms - first->ms);
  return SUCCESS;
}

API cuEventDestroy(void *handle) {
  CALL(true);
  auto *event = static_cast<Event *>(handle);
  if (!events.erase(event)) return INVALID_HANDLE;
  delete event;
  return SUCCESS;
}

// -- graphs ---------------------------------------------------------------------------------------

API cuStreamBeginCapture(void *handle, int mode) {
  CALL(true);
  Stream *stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (uintptr_t(handle) < 2 || stream->capture) return CAPTURE_UNSUPPORTED;
  stream->capture = std::make_unique<Graph>();
  stream->broken = false;
  stream->mode = mode;
  stream->thread = std::this_thread::get_id();
  return SUCCESS;
}

API cuStreamEndCapture(void *handle, void **graph) {
  CALL(true);
  *graph = nullptr;
  Stream *stream = stream_of(handle);
  if (!stream || !stream->capture) return INVALID_HANDLE;
  if (stream->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
  std::unique_ptr<Graph> captured = std::move(stream->capture);
  if (stream->broken) return CAPTURE_INVALIDATED;
  *graph = *graphs.insert(captured.release()).first;
  return SUCCESS;
}

API cuGraphInstantiateWithFlags(void **executable, void *handle, unsigned long long) {
  CALL(true);
  auto *graph = static_cast<Graph *>(handle);
  if (!graphs.count(graph)) return INVALID_HANDLE;
  *executable = *executables.insert(new Graph(*graph)).first;
  return SUCCESS;
}

API cuGraphUpload(void *executable, void *stream) {
  CALL(true);
  if (!executables.count(static_cast<Graph *>(executable))) return INVALID_HANDLE;
  return stream_of(stream) ? SUCCESS : INVALID_HANDLE;
}

API cuGraphLaunch(void *executable, void *stream) {
  CALL(true);
  auto *graph = static_cast<Graph *>(executable);
  if (!executables.count(graph)) return INVALID_HANDLE;
  for (const Op &op : graph->ops)
    if (int code = put(stream, op)) return code;
  return SUCCESS;
}

API cuGraphDestroy(void *handle) {
  CALL(true);
  auto *graph = static_cast<Graph *>(handle);
  if (!graphs.erase(graph)) return INVALID_HANDLE;
  delete graph;
  return SUCCESS;
}

API cuGraphExecDestroy(void *handle) {
  CALL(true);
  auto *graph = static_cast<Graph *>(handle);
  if (!executables.erase(graph)) return INVALID_HANDLE;
  delete graph;
  return SUCCESS;
}

// -- how cuda-bindings finds them -----------------------------------------------------------------

#define ENTRY(name) {#name, reinterpret_cast<void *>(&name)}

static const std::map<std::string, void *> FUNCTIONS = {
    ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuGetErrorName), ENTRY(cuGetErrorString),
    ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetName),
    ENTRY(cuDeviceGetAttribute), ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuCtxGetCurrent),
    ENTRY(cuCtxPushCurrent), ENTRY(cuCtxPopCurrent), ENTRY(cuCtxGetDevice),
    ENTRY(cuCtxSynchronize), ENTRY(cuMemAlloc), ENTRY(cuMemFree), ENTRY(cuPointerGetAttribute),
    ENTRY(cuMemsetD8Async), ENTRY(cuMemcpyHtoDAsync), ENTRY(cuMemcpyDtoHAsync),
    ENTRY(cuMemcpyDtoDAsync), ENTRY(cuMemcpy2DAsync), ENTRY(cuStreamCreate), ENTRY(cuStreamDestroy),
    ENTRY(cuStreamGetCtx), ENTRY(cuStreamSynchronize), ENTRY(cuLaunchHostFunc),
    ENTRY(cuEventCreate), ENTRY(cuEventRecord), ENTRY(cuEventElapsedTime), ENTRY(cuEventDestroy),
    ENTRY(cuStreamBeginCapture), ENTRY(cuStreamEndCapture), ENTRY(cuGraphInstantiateWithFlags),
    {"cuGraphInstantiate", reinterpret_cast<void *>(&cuGraphInstantiateWithFlags)},
    ENTRY(cuGraphUpload), ENTRY(cuGraphLaunch), ENTRY(cuGraphDestroy), ENTRY(cuGraphExecDestroy),
};

API cuGetProcAddress_v2(const char *name, void **function, int, uint64_t, int *status) {
  auto found = FUNCTIONS.find(name);
  bool known = found != FUNCTIONS.end();
  *function = known ? found->second
              : strcmp(name, "cuGetProcAddress") ? nullptr
                                                 : reinterpret_cast<void *>(&cuGetProcAddress_v2);
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}

// -- for tests ------------------------------------------------------------------------------------

#define FOR_TESTS extern "C" __attribute__((visibility("default")))

// Blocks, streams, events, graphs and executable graphs that are alive.
FOR_TESTS void standin_alive(int64_t counts[5]) {
  std::lock_guard<std::recursive_mutex> guard(everything);
  size_t sizes[] = {alive.size(), streams.size(), events.size(), graphs.size(), executables.size()};
  std::copy(std::begin(sizes), std::end(sizes), counts);
}

// What was done that must not be, a line each; forgotten with this, as is what was freed.
FOR_TESTS const char *standin_wrong() {
  std::lock_guard<std::recursive_mutex> guard(everything);
  static std::string text;
  while (!freed.empty()) drop_oldest();
  text.clear();
  for (const std::string &line : wrong) text += line + "\n";
  wrong.clear();
  return text.c_str();
}

// As new: one fault must not spoil the next test.
FOR_TESTS void standin_reset() {
  std::lock_guard<std::recursive_mutex> guard(everything);
  for (Context &context : contexts) context.fault = SUCCESS;
  devices = DEVICES;
  version = 13000;
  capability[0] = 8;
  capability[1] = 0;
  to_fail.clear();
  calls.clear();
}

FOR_TESTS void standin_have(int count, int cuda_version) {
  std::lock_guard<std::recursive_mutex> guard(everything);
  devices = count;
  version = cuda_version;
}

FOR_TESTS void standin_capability(int major, int minor) {
  std::lock_guard<std::recursive_mutex> guard(everything);
  capability[0] = major;
  capability[1] = minor;
}

// The next call of a function that is not told otherwise already returns `code`.
FOR_TESTS void standin_fail(const char *function, int code) {
  std::lock_guard<std::recursive_mutex> guard(everything);
  to_fail[function].push_back(code);
}

FOR_TESTS long standin_calls(const char *function) {
  std::lock_guard<std::recursive_mutex> guard(everything);
  return calls[function];
}

// The host is busy for `ms`.
FOR_TESTS void standin_host_works(double ms) {
  std::lock_guard<std::recursive_mutex> guard(everything);
  host_ms += ms;
}

// A kernel that takes `ms` of the device's time.
FOR_TESTS int standin_delay(void *stream, double ms) {
  std::lock_guard<std::recursive_mutex> guard(everything);
  return put(stream, {[](double) { return int(SUCCESS); }, ms});
}
