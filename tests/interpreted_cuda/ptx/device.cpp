#include "device.h"

#include <cstdio>
#include <stdexcept>

namespace ptx {

const u64 MAX_THREADS = 1024;

Device& device() {
  static Device the_device;
  return the_device;
}

int Device::fail(int code, const std::string& what) {
  if (error.empty()) error = what;
  return last_code = code;
}

void Device::launch(Kernel& kernel, const Launch& how, void** arguments) {
  const Dim &grid = how.grid, &block = how.block;
  if (!grid.count() || !block.count() || block.count() > MAX_THREADS)
    throw std::runtime_error("a launch of " + std::to_string(grid.count()) + " CTAs of " +
                             std::to_string(block.count()) + " threads");
  if (records) {
    Recorded made{&kernel, how, {}};
    for (size_t i = 0; i < kernel.parameters.size(); i++) {
      const uint8_t* from = static_cast<const uint8_t*>(arguments[i]);
      made.arguments.emplace_back(from, from + kernel.parameters[i].bytes);
    }
    recorded.push_back(made);
  }
  for (size_t i = 0; i < kernel.parameters.size(); i++)
    memcpy(kernel.arguments.data() + kernel.parameters[i].offset, arguments[i], kernel.parameters[i].bytes);
  u64 num_instructions = runs ? Machine(kernel, how).run() : 0;
  char sizes[160];
  snprintf(sizes, sizeof sizes, " grid=(%u,%u,%u) block=(%u,%u,%u) shared=%u instructions=%lu\n", grid.x, grid.y, grid.z,
           block.x, block.y, block.z, how.dynamic_shared_bytes, static_cast<unsigned long>(num_instructions));
  log += kernel.name + sizes;
}

int Device::replay() {
  try {
    for (Recorded& one : recorded) {
      std::vector<void*> arguments;
      for (auto& argument : one.arguments) arguments.push_back(argument.data());
      launch(*one.kernel, one.launch, arguments.data());
    }
    return int(recorded.size());
  } catch (const std::exception& caught) {
    fail(700, caught.what());
    return -1;
  }
}

std::unique_ptr<Module> load_module(const std::string& text) {
  auto module = parse_module(text);
  for (auto& [name, variable] : module->variables)
    if (!variable.is_shared && !variable.room.empty()) allow(u64(variable.room.data()), variable.room.size());
  return module;
}

Kernel& kernel_of(Module& module, const std::string& name) {
  auto found = module.kernels.find(name);
  if (found == module.kernels.end()) throw std::runtime_error("there is no kernel " + name);
  parse_kernel(module, found->second);
  return found->second;
}

}  // namespace ptx
