// The device that is pretended: kernels by name, launches of them, what went wrong.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"
#include "program.h"

namespace ptx {

// A launch as it was: with the parameters that it had then.
struct Recorded {
  Kernel* kernel;
  Launch launch;
  std::vector<std::vector<uint8_t>> arguments;
};

struct Device {
  // Few multiprocessors, so that plans make few CTAs; the rest as of an A100, until it is told otherwise.
  int num_sms = 4, major = 8, minor = 0;
  int shared_per_sm = 167936, shared_per_block = 166912;
  bool runs = true;  // or launches do nothing, where plans alone are wanted
  bool records = false;
  std::vector<Recorded> recorded;
  std::string error;  // of the first call that failed since it was asked for
  int last_code = 0;
  std::string log;    // a line for each launch since it was asked for

  int fail(int code, const std::string& what);
  void launch(Kernel& kernel, const Launch& launch, void** arguments);
  int replay();  // how many kernels ran; -1 after a fault
};

Device& device();

// Memory of a module's variables is the device's.
std::unique_ptr<Module> load_module(const std::string& text);
Kernel& kernel_of(Module& module, const std::string& name);

}  // namespace ptx
