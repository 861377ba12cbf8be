// A grid of one kernel as it runs: a CTA after another, a warp after another, the lanes of a warp together.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

const int LANES = 32;
const u32 ALL_LANES = 0xffffffffu;

struct Dim {
  u32 x = 1, y = 1, z = 1;
  u64 count() const { return u64(x) * y * z; }
};

enum class State : uint8_t { running, at_barrier, at_sync, done };

struct Cta;

struct Warp {
  Cta* cta = nullptr;
  u32 exists = 0;  // lanes that are threads of the CTA
  int pc[LANES];
  State state[LANES];
  uint8_t barrier[LANES];   // of lanes that wait: at which of the 16,
  u32 barrier_count[LANES]; // and how many threads are expected there; 0: all
  std::vector<u64> registers;
  std::vector<uint8_t> local[LANES];
  u64* reg(int index) { return registers.data() + size_t(index) * LANES; }
};

struct Cta {
  Dim id{0, 0, 0};
  std::vector<uint8_t> room;
  uint8_t* shared = nullptr;
  u32 shared_bytes = 0;
  std::vector<Warp> warps;
  bool is_done = false;
};

// Memory of the device that kernels may touch. Nothing else is theirs.
void allow(u64 address, u64 bytes);
void forbid(u64 address);

template <class F> inline void each_lane(u32 mask, F f) {
  if (mask == ALL_LANES) {
    for (int lane = 0; lane < LANES; lane++) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}
inline bool has(u32 mask, int lane) { return mask >> lane & 1; }

struct Launch {
  Dim grid, block;
  u32 dynamic_shared_bytes = 0;
  bool is_cooperative = false;
};

class Machine {
 public:
  Machine(Kernel& kernel, const Launch& launch) : kernel_(kernel), launch_(launch) {}
  // Runs all of it; returns how many instructions warps ran. Throws std::runtime_error for a fault, with the kernel,
  // the CTA, the thread and the instruction.
  u64 run();

 private:
  // Of machine.cpp: CTAs, barriers, branches.
  void begin(Cta& cta, u64 index);
  u64 special_value(Special what, const Cta& cta, u32 thread, int lane) const;
  bool turn(Cta& cta, i64 budget);
  void run_warp(Warp& warp, i64 budget);
  void control(Warp& warp, const Instruction& in, u32 mask, u32 taken, int pc);
  void release_barriers(Cta& cta);
  bool meet(Warp& warp, u32& mask, u32 expected, int pc);
  void execute(Warp& warp, const Instruction& in, u32 mask);
  [[noreturn]] void fault(Warp& warp, const Instruction& in, int lane, const std::string& what) const;
  [[noreturn]] void deadlock(std::vector<Cta>& ctas) const;

  // Of memory.cpp. An address is checked before it is touched.
  uint8_t* place(Warp& warp, const Instruction& in, const Address& at, Space space, int lane, u64 bytes,
                 const char* what);
  void check(Warp& warp, const Instruction& in, int lane, u64 address, u64 bytes, const char* what);
  void load(Warp& warp, const Instruction& in, u32 mask);
  void store(Warp& warp, const Instruction& in, u32 mask);
  void copy_async(Warp& warp, const Instruction& in, u32 mask);
  void atomic(Warp& warp, const Instruction& in, u32 mask);
  void convert_address(Warp& warp, const Instruction& in, u32 mask);

  // Of warp_wide.cpp: what the lanes of a warp do together.
  u32 expected_lanes(Warp& warp, const Instruction& in, u32 mask) const;
  void together(Warp& warp, const Instruction& in, u32 mask);
  void matrix_product(Warp& warp, const Instruction& in);
  void load_matrices(Warp& warp, const Instruction& in);
  void store_matrices(Warp& warp, const Instruction& in);
  void shuffle(Warp& warp, const Instruction& in, u32 mask);
  void vote(Warp& warp, const Instruction& in, u32 mask);
  void reduce(Warp& warp, const Instruction& in, u32 mask);

  Kernel& kernel_;
  Launch launch_;
  u64 num_instructions_ = 0;
  u64 seen_begin_ = 1, seen_end_ = 0;  // the allowed memory that was found last
};

// Of arithmetic.cpp and conversions.cpp: false where the operation is none of theirs.
bool arithmetic(Warp& warp, const Instruction& in, u32 mask);
void convert(Warp& warp, const Instruction& in, u32 mask);

}  // namespace ptx
