// A stand-in for libcudart: memory of the device is the host's, and a launch has run when it returns.
//
// Numbers are those of CUDA's interface: 1 an invalid value, 98 an unknown function, 101 an invalid device, 700 a fault.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "device.h"

using ptx::device;

namespace {

using Stream = void*;
struct Dim3 { unsigned x, y, z; };

// A kernel as a program knows it: the text that its name is in is looked up when it is first launched.
struct Binary {
  const char* text = nullptr;
  size_t bytes = 0;
  std::unique_ptr<ptx::Module> module;
};
struct Function {
  Binary* binary;
  std::string name;
  size_t most_dynamic_shared = 48 * 1024;
};
struct Configuration { Dim3 grid, block; size_t shared; Stream stream; };

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}
std::vector<Configuration>& configurations() {
  static std::vector<Configuration> stack;
  return stack;
}

int launch(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, bool is_cooperative) {
  auto found = functions().find(function);
  if (found == functions().end()) return device().fail(98, "a launch of a function that is not known");
  Function& of = found->second;
  if (shared > of.most_dynamic_shared)
    return device().fail(1, std::to_string(shared) + " bytes of dynamic shared memory, more than the " +
                                std::to_string(of.most_dynamic_shared) + " that were asked for, in " + of.name);
  try {
    if (!of.binary->module) {
      if (!of.binary->text) throw std::runtime_error("no text of PTX in the binary of " + of.name);
      of.binary->module = ptx::load_module(std::string(of.binary->text, of.binary->bytes));
    }
    ptx::Launch how{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, ptx::u32(shared), is_cooperative};
    device().launch(ptx::kernel_of(*of.binary->module, of.name), how, arguments);
    return 0;
  } catch (const std::exception& caught) {
    return device().fail(700, caught.what());
  }
}

const char* kept(std::string& text) {  // until the next call
  static std::string out;
  out = text;
  text.clear();
  return out.c_str();
}

}  // namespace

extern "C" {

// --- for the tests

void interpreter_configure(int sms, int major, int minor, int shared_per_sm, int shared_per_block, int runs) {
  ptx::Device& d = device();
  d.num_sms = sms, d.major = major, d.minor = minor, d.runs = runs;
  d.shared_per_sm = shared_per_sm, d.shared_per_block = shared_per_block;
}
void interpreter_allow(uint64_t address, uint64_t bytes) { ptx::allow(address, bytes); }
void interpreter_forbid(uint64_t address) { ptx::forbid(address); }
const char* interpreter_error() { return kept(device().error); }
const char* interpreter_log() { return kept(device().log); }
void interpreter_record(int on) {
  if (on) device().recorded.clear();
  device().records = on;
}
int interpreter_replay() { return device().replay(); }
// Runs the only kernel of a text: 0, or -1 and interpreter_error says why.
int interpreter_run(const char* text, const unsigned* grid, const unsigned* block, unsigned shared, int is_cooperative,
                    void** arguments) {
  try {
    auto module = ptx::load_module(text);
    if (module->kernels.size() != 1) throw std::runtime_error("one kernel was wanted");
    ptx::Kernel& kernel = ptx::kernel_of(*module, module->kernels.begin()->first);
    ptx::Launch how{{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, is_cooperative != 0};
    device().launch(kernel, how, arguments);
    return 0;
  } catch (const std::exception& caught) {
    device().fail(700, caught.what());
    return -1;
  }
}

// --- what compiled programs register before main

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper { int magic, version; const unsigned char* data; void* file; };
  const char* data = reinterpret_cast<const char*>(static_cast<Wrapper*>(wrapper)->data);
  uint16_t header;
  uint64_t size;
  memcpy(&header, data + 6, 2);
  memcpy(&size, data + 8, 8);
  auto* binary = new Binary;  // for as long as the process lives, as the code that names it
  for (size_t at = 0; at + 8 < header + size; at++) {
    if (memcmp(data + at, ".version", 8) != 0) continue;
    binary->text = data + at;
    binary->bytes = strnlen(data + at, header + size - at);
    break;
  }
  return reinterpret_cast<void**>(binary);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  functions()[host] = Function{reinterpret_cast<Binary*>(binary), name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, Stream stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  if (configurations().empty()) return device().fail(9, "a launch that was not configured");
  Configuration last = configurations().back();
  configurations().pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<Stream*>(stream) = last.stream;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return 0;
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, Stream) {
  return launch(kernel, grid, block, arguments, shared, false);
}

// --- launches

int cudaLaunchKernel(const void* f, Dim3 grid, Dim3 block, void** arguments, size_t shared, Stream) {
  return launch(f, grid, block, arguments, shared, false);
}
int cudaLaunchCooperativeKernel(const void* f, Dim3 grid, Dim3 block, void** arguments, size_t shared, Stream) {
  return launch(f, grid, block, arguments, shared, true);
}
int cudaLaunchKernelExC(const void* configuration, const void* f, void** arguments) {
  struct Attribute { int id; alignas(8) unsigned value[16]; };
  struct Extended { Dim3 grid, block; size_t shared; Stream stream; const Attribute* attributes; unsigned count; };
  const auto* given = static_cast<const Extended*>(configuration);
  bool is_cooperative = false;
  for (unsigned i = 0; i < given->count; i++) {
    const Attribute& one = given->attributes[i];
    if (one.id == 2) is_cooperative = one.value[0];
    if (one.id == 4 && one.value[0] * one.value[1] * one.value[2] > 1)
      return device().fail(1, "a launch in clusters, which are not interpreted");
  }
  return launch(f, given->grid, given->block, arguments, given->shared, is_cooperative);
}
int cudaFuncSetAttribute(const void* f, int attribute, int value) {
  auto found = functions().find(f);
  if (found == functions().end()) return device().fail(98, "an attribute of a function that is not known");
  if (attribute != 8) return 0;  // how memory is shared with the cache, and the like
  if (value > device().shared_per_block)
    return device().fail(1, std::to_string(value) + " bytes of shared memory for a block; the device has " +
                                std::to_string(device().shared_per_block));
  found->second.most_dynamic_shared = std::max<size_t>(size_t(value), 48 * 1024);
  return 0;
}
int cudaFuncGetAttributes(void* out, const void* f) {
  memset(out, 0, 64);
  return functions().count(f) ? 0 : device().fail(98, "attributes of a function that is not known");
}
// As many as shared memory and threads leave room for: registers are not known here.
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int threads, size_t shared,
                                                           unsigned) {
  if (!functions().count(f)) return device().fail(98, "the occupancy of a function that is not known");
  *blocks = std::max(0, std::min({device().shared_per_sm / (int(shared) + 1024), 2048 / threads, 16}));
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}

// --- the device

int cudaGetDevice(int* index) { return *index = 0; }
int cudaSetDevice(int index) { return index ? device().fail(101, "there is one device") : 0; }
int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const ptx::Device& d = device();
  switch (attribute) {
    case 8: *value = 48 * 1024; return 0;           // shared memory of a block that asks for nothing
    case 10: *value = ptx::LANES; return 0;
    case 16: *value = d.num_sms; return 0;
    case 39: *value = 2048; return 0;               // threads of a multiprocessor
    case 75: *value = d.major; return 0;
    case 76: *value = d.minor; return 0;
    case 81: *value = d.shared_per_sm; return 0;
    case 95: *value = 1; return 0;                  // cooperative launches
    case 97: *value = d.shared_per_block; return 0;
    default: return device().fail(1, "the device's attribute " + std::to_string(attribute) + " is not known here");
  }
}
int cudaDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

// --- memory: fresh memory is NaN, in every type

int cudaMalloc(void** out, size_t bytes) {
  size_t whole = (bytes + 255) / 256 * 256;
  *out = aligned_alloc(256, whole);
  memset(*out, 0xff, whole);
  ptx::allow(ptx::u64(*out), bytes);
  return 0;
}
int cudaFree(void* p) {
  ptx::forbid(ptx::u64(p));
  free(p);
  return 0;
}
int cudaMallocAsync(void** out, size_t bytes, Stream) { return cudaMalloc(out, bytes); }
int cudaFreeAsync(void* p, Stream) { return cudaFree(p); }
int cudaMallocHost(void** out, size_t bytes) {
  *out = malloc(bytes);
  return 0;
}
int cudaHostAlloc(void** out, size_t bytes, unsigned) { return cudaMallocHost(out, bytes); }
int cudaFreeHost(void* p) {
  free(p);
  return 0;
}
int cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  memmove(to, from, bytes);
  return 0;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, Stream) {
  return cudaMemcpy(to, from, bytes, kind);
}
int cudaMemset(void* to, int value, size_t bytes) {
  memset(to, value, bytes);
  return 0;
}
int cudaMemsetAsync(void* to, int value, size_t bytes, Stream) { return cudaMemset(to, value, bytes); }

// --- streams and events: everything is done when it is asked for

int cudaStreamCreate(Stream* stream) {
  *stream = nullptr;
  return 0;
}
int cudaStreamSynchronize(Stream) { return 0; }
int cudaDeviceSynchronize() { return 0; }
int cudaStreamIsCapturing(Stream, int* is_capturing) { return *is_capturing = 0; }
int cudaEventCreateWithFlags(void** event, unsigned) {
  *event = nullptr;
  return 0;
}
int cudaEventRecord(void*, Stream) { return 0; }
int cudaEventDestroy(void*) { return 0; }
int cudaStreamWaitEvent(Stream, void*, unsigned) { return 0; }

int cudaGetLastError() {
  int code = device().last_code;
  device().last_code = 0;
  return code;
}
int cudaPeekAtLastError() { return device().last_code; }
const char* cudaGetErrorString(int code) {
  return !code ? "no error" : device().error.empty() ? "an error" : device().error.c_str();
}
const char* cudaGetErrorName(int code) { return code ? "cudaError" : "cudaSuccess"; }

}  // extern "C"
