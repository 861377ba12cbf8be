// CTAs, warps, branches and barriers.
//
// The lanes of a warp that are furthest behind run, together, until they reach those that wait further on: so lanes that
// part at a branch meet again where its ways do. A warp runs until all its lanes wait or are done, then the next.
#include "machine.h"

#include <climits>
#include <cstdio>
#include <stdexcept>

namespace ptx {

namespace {

const i64 NO_END = INT64_MAX;
const i64 TURN_OF_A_GRID = 200000;  // instructions of a warp before other CTAs of a cooperative grid have a turn
const size_t SHARED_ALIGNMENT = 1024;

u64 rounded_up(u64 value, u64 multiple) { return (value + multiple - 1) / multiple * multiple; }

// What a cooperative grid counts its CTAs in, where it waits for all of them.
std::vector<u64>& grid_workspace() {
  static std::vector<u64> room(1024);
  return room;
}

bool is_wide(Op op) {
  return op == Op::mma || op == Op::ldmatrix || op == Op::stmatrix || op == Op::shfl || op == Op::vote ||
         op == Op::redux || op == Op::bar_warp;
}

void move(Warp& warp, const Instruction& in, u32 mask) {
  if (in.d.size() == 1 && in.s.size() == 1) {
    u64 *d = warp.reg(in.d[0]), *a = warp.reg(in.s[0]);
    return each_lane(mask, [&](int l) { d[l] = a[l]; });
  }
  // mov.b32 r, {low, high} and the other way
  const size_t count = std::max(in.d.size(), in.s.size());
  const int width = int(8 * size_t(bytes_of(in.type)) / count);
  const u64 ones = (u64(1) << width) - 1;
  each_lane(mask, [&](int l) {
    if (in.d.size() == 1) {
      u64 v = 0;
      for (size_t i = 0; i < count; i++) v |= (warp.reg(in.s[i])[l] & ones) << (width * int(i));
      warp.reg(in.d[0])[l] = v;
    } else {
      u64 v = warp.reg(in.s[0])[l];
      for (size_t i = 0; i < count; i++)
        if (in.d[i] >= 0) warp.reg(in.d[i])[l] = v >> (width * int(i)) & ones;
    }
  });
}

}  // namespace

void Machine::fault(Warp& warp, const Instruction& in, int lane, const std::string& what) const {
  const Dim& id = warp.cta->id;
  long thread = (&warp - warp.cta->warps.data()) * LANES + lane;
  char where[120];
  snprintf(where, sizeof where, "CTA (%u, %u, %u) of (%u, %u, %u), thread %ld", id.x, id.y, id.z, launch_.grid.x,
           launch_.grid.y, launch_.grid.z, thread);
  throw std::runtime_error("a kernel failed: " + what + "; " + where + ", at `" + in.text + "` of " +
                           kernel_.name.substr(0, 200));
}

void Machine::deadlock(std::vector<Cta>& ctas) const {
  for (Cta& cta : ctas)
    for (Warp& warp : cta.warps)
      for (int l = 0; l < LANES; l++)
        if (has(warp.exists, l) && warp.state[l] != State::done) {
          // Who waits at a barrier goes on behind it.
          int pc = warp.state[l] == State::at_barrier ? warp.pc[l] - 1 : warp.pc[l];
          fault(warp, kernel_.code[size_t(pc)], l, "threads wait for threads that never come");
        }
  throw std::runtime_error("a kernel failed: nothing moves");
}

void Machine::execute(Warp& warp, const Instruction& in, u32 mask) {
  switch (in.op) {
    case Op::load: return load(warp, in, mask);
    case Op::store: return store(warp, in, mask);
    case Op::cp_async: return copy_async(warp, in, mask);
    case Op::atom: return atomic(warp, in, mask);
    case Op::cvta: return convert_address(warp, in, mask);
    case Op::mov: return move(warp, in, mask);
    case Op::cvt: return convert(warp, in, mask);
    case Op::activemask: case Op::clock: {
      u64* d = warp.reg(in.d[0]);
      u64 value = in.op == Op::clock ? num_instructions_ : mask;
      return each_lane(mask, [&](int l) { d[l] = value; });
    }
    case Op::trap: if (mask) fault(warp, in, __builtin_ctz(mask), "it trapped"); return;
    case Op::call: if (mask) fault(warp, in, __builtin_ctz(mask), "it printed, or an assertion of its failed"); return;
    default:
      if (!arithmetic(warp, in, mask)) fault(warp, in, 0, "an instruction that cannot be run");
  }
}

// Lanes of `mask` have come to `pc`; when all that are expected have, true, with all of them in `mask`.
bool Machine::meet(Warp& warp, u32& mask, u32 expected, int pc) {
  u32 here = mask, wanted = 0;
  each_lane(warp.exists, [&](int l) {
    if (warp.state[l] == State::at_sync && warp.pc[l] == pc) here |= 1u << l;
    if (has(expected, l) && warp.state[l] != State::done) wanted |= 1u << l;
  });
  bool have_met = (here & wanted) == wanted;
  each_lane(have_met ? here : mask, [&](int l) {
    warp.state[l] = have_met ? State::running : State::at_sync;
    warp.pc[l] = pc;
  });
  if (have_met) mask = here;
  return have_met;
}

// Branches, exits and barriers, of the lanes `taken` out of `mask`. Lanes that run are to be chosen anew.
void Machine::control(Warp& warp, const Instruction& in, u32 mask, u32 taken, int pc) {
  each_lane(mask & ~taken, [&](int l) { warp.pc[l] = pc + 1; });
  each_lane(taken, [&](int l) {
    switch (in.op) {
      case Op::exit: warp.state[l] = State::done; break;
      case Op::bra: warp.pc[l] = in.targets[0]; break;
      case Op::brx: {
        u32 index = u32(warp.reg(in.s[0])[l]);
        if (index >= in.targets.size()) fault(warp, in, l, "a jump beyond its table");
        warp.pc[l] = in.targets[index];
        break;
      }
      default:
        warp.state[l] = State::at_barrier;
        warp.barrier[l] = uint8_t(warp.reg(in.s[0])[l] & 15);
        warp.barrier_count[l] = in.s.size() > 1 ? u32(warp.reg(in.s[1])[l]) : 0;
        warp.pc[l] = pc + 1;
    }
  });
}

void Machine::run_warp(Warp& warp, i64 budget) {
  const Instruction* code = kernel_.code.data();
  while (budget > 0) {
    int pc = INT_MAX, next = INT_MAX;  // of those that run, and of those ahead of them
    u32 mask = 0;
    each_lane(warp.exists, [&](int l) {
      if (warp.state[l] != State::running) return;
      if (warp.pc[l] < pc) next = pc, pc = warp.pc[l], mask = 1u << l;
      else if (warp.pc[l] == pc) mask |= 1u << l;
      else next = std::min(next, warp.pc[l]);
    });
    if (!mask) return;
    auto stop_at = [&](int at) { each_lane(mask, [&](int l) { warp.pc[l] = at; }); };
    for (bool is_same = true; is_same;) {
      const Instruction& in = code[pc];
      num_instructions_++, budget--;
      u32 taken = mask;
      if (in.guard >= 0) {
        const u64* guard = warp.reg(in.guard);
        u32 yes = 0;
        for (int l = 0; l < LANES; l++) yes |= u32(guard[l] & 1) << l;
        taken = mask & (in.guard_is_negated ? ~yes : yes);
      }
      bool jumps_together = in.op == Op::bra && (taken == mask || !taken);
      if (jumps_together) {
        pc = taken ? in.targets[0] : pc + 1;
      } else if (in.op == Op::bra || in.op == Op::brx || in.op == Op::exit || in.op == Op::bar) {
        control(warp, in, mask, taken, pc);
        break;
      } else if (is_wide(in.op)) {
        if (taken != mask) {  // those that it is for are behind the others then, and come back to it
          each_lane(mask, [&](int l) { warp.pc[l] = has(taken, l) ? pc : pc + 1; });
          break;
        }
        if (!meet(warp, mask, expected_lanes(warp, in, mask), pc)) break;
        together(warp, in, mask);
        pc++;
      } else {
        if (taken) execute(warp, in, taken);
        pc++;
      }
      if (pc >= next || budget <= 0) {
        stop_at(pc);
        is_same = false;
      }
    }
  }
}

// A barrier opens when as many threads wait there as it says, or all that are not done.
void Machine::release_barriers(Cta& cta) {
  u32 num_alive = 0, num_waiting[16] = {}, expected[16] = {};
  for (Warp& warp : cta.warps)
    each_lane(warp.exists, [&](int l) {
      num_alive += warp.state[l] != State::done;
      if (warp.state[l] != State::at_barrier) return;
      num_waiting[warp.barrier[l]]++;
      expected[warp.barrier[l]] = warp.barrier_count[l];
    });
  for (Warp& warp : cta.warps)
    each_lane(warp.exists, [&](int l) {
      if (warp.state[l] != State::at_barrier) return;
      int which = warp.barrier[l];
      if (num_waiting[which] >= (expected[which] ? expected[which] : num_alive)) warp.state[l] = State::running;
    });
}

// False when nothing moved.
bool Machine::turn(Cta& cta, i64 budget) {
  const u64 before = num_instructions_;
  for (Warp& warp : cta.warps) run_warp(warp, budget);
  release_barriers(cta);
  bool is_done = true;
  for (Warp& warp : cta.warps) each_lane(warp.exists, [&](int l) { is_done &= warp.state[l] == State::done; });
  cta.is_done = is_done;
  return is_done || num_instructions_ != before;
}

u64 Machine::special_value(Special what, const Cta& cta, u32 thread, int lane) const {
  const Dim &grid = launch_.grid, &block = launch_.block;
  switch (what) {
    case Special::tid_x: return thread % block.x;
    case Special::tid_y: return thread / block.x % block.y;
    case Special::tid_z: return thread / block.x / block.y;
    case Special::ntid_x: return block.x;
    case Special::ntid_y: return block.y;
    case Special::ntid_z: return block.z;
    case Special::ctaid_x: return cta.id.x;
    case Special::ctaid_y: return cta.id.y;
    case Special::ctaid_z: return cta.id.z;
    case Special::nctaid_x: return grid.x;
    case Special::nctaid_y: return grid.y;
    case Special::nctaid_z: return grid.z;
    case Special::laneid: return u64(lane);
    case Special::warpid: return thread / LANES;
    case Special::lanemask_lt: return (1u << lane) - 1;
    case Special::lanemask_le: return (2u << lane) - 1;
    case Special::lanemask_eq: return 1u << lane;
    case Special::lanemask_gt: return u32(~((2u << lane) - 1));
    case Special::lanemask_ge: return u32(~((1u << lane) - 1));
    case Special::envreg1: return u64(grid_workspace().data()) >> 32;
    case Special::envreg2: return u32(u64(grid_workspace().data()));
    case Special::dynamic_smem_size: return launch_.dynamic_shared_bytes;
    case Special::total_smem_size: return cta.shared_bytes;
    case Special::extern_shared: return cta.shared_bytes - launch_.dynamic_shared_bytes;
    case Special::smid: return 0;
    case Special::nsmid: return 1;
  }
  throw std::runtime_error("a special register that is not known");
}

void Machine::begin(Cta& cta, u64 index) {
  const Dim& grid = launch_.grid;
  cta.id = {u32(index % grid.x), u32(index / grid.x % grid.y), u32(index / grid.x / grid.y)};
  cta.is_done = false;
  cta.shared_bytes = u32(rounded_up(kernel_.static_shared_bytes, 128)) + launch_.dynamic_shared_bytes;
  cta.room.assign(cta.shared_bytes + SHARED_ALIGNMENT, 0xff);  // NaN in every type: who reads before writing sees it
  cta.shared = reinterpret_cast<uint8_t*>(rounded_up(u64(cta.room.data()), SHARED_ALIGNMENT));
  const u32 num_threads = u32(launch_.block.count());
  cta.warps.resize((num_threads + LANES - 1) / LANES);
  for (size_t w = 0; w < cta.warps.size(); w++) {
    Warp& warp = cta.warps[w];
    warp.cta = &cta;
    warp.exists = 0;
    warp.registers.resize(size_t(kernel_.num_registers) * LANES);
    for (int l = 0; l < LANES; l++) {
      warp.pc[l] = 0, warp.state[l] = State::running;
      if (w * LANES + size_t(l) >= num_threads) continue;
      warp.exists |= 1u << l;
      if (kernel_.local_bytes) warp.local[l].assign(kernel_.local_bytes, 0xff);
    }
    for (auto& [index_of, value] : kernel_.constants) std::fill_n(warp.reg(index_of), LANES, value);
    for (auto& [index_of, what] : kernel_.specials)
      for (int l = 0; l < LANES; l++) warp.reg(index_of)[l] = special_value(what, cta, u32(w * LANES) + u32(l), l);
  }
}

u64 Machine::run() {
  std::vector<u64>& workspace = grid_workspace();
  std::fill(workspace.begin(), workspace.end(), 0);
  if (launch_.is_cooperative) allow(u64(workspace.data()), workspace.size() * sizeof(u64));
  // CTAs of a cooperative grid wait for each other, so all of them are there at once.
  const u64 num_ctas = launch_.grid.count(), at_once = launch_.is_cooperative ? num_ctas : 1;
  std::vector<Cta> ctas(at_once);
  for (u64 first = 0; first < num_ctas; first += at_once) {
    for (u64 i = 0; i < at_once; i++) begin(ctas[i], first + i);
    for (bool all_done = false; !all_done;) {
      bool has_moved = false;
      all_done = true;
      for (Cta& cta : ctas) {
        if (!cta.is_done) has_moved |= turn(cta, launch_.is_cooperative ? TURN_OF_A_GRID : NO_END);
        all_done &= cta.is_done;
      }
      if (!all_done && !has_moved) deadlock(ctas);
    }
  }
  return num_instructions_;
}

}  // namespace ptx
