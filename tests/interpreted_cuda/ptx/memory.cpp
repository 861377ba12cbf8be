// Loads, stores, copies and atomics; every address is checked before it is touched.
#include <cstdio>

#include "machine.h"

namespace ptx {

namespace {

std::map<u64, u64>& allowed() {  // where memory begins, and where it ends
  static std::map<u64, u64> ranges;
  return ranges;
}

bool lies_in(u64 address, u64 bytes, u64 begin, u64 end) {  // no sum, which could come round to the first addresses
  return address >= begin && address <= end && bytes <= end - address;
}
bool lies_in(u64 address, u64 bytes, const std::vector<uint8_t>& room) {
  return lies_in(address, bytes, u64(room.data()), u64(room.data()) + room.size());
}

u64 combined(const Instruction& in, u64 old, u64 given, u64 other) {
  enum { add, min, max, and_, or_, xor_, exchange, compare, increase, decrease };
  if (in.type == Type::f32) return raw(bits<float>(old) + bits<float>(given));
  u64 a = integer(in.type, old), b = integer(in.type, given);
  bool has_sign = is_signed(in.type), is_less = has_sign ? i64(a) < i64(b) : a < b;
  switch (in.mode) {
    case add: return a + b;
    case min: return is_less ? a : b;
    case max: return is_less ? b : a;
    case and_: return a & b;
    case or_: return a | b;
    case xor_: return a ^ b;
    case exchange: return b;
    case compare: return a == b ? other : a;
    case increase: return a >= b ? 0 : a + 1;
    default: return a == 0 || a > b ? b : a - 1;
  }
}

}  // namespace

void allow(u64 address, u64 bytes) {
  u64& end = allowed()[address];
  end = std::max(end, address + bytes);
}
void forbid(u64 address) { allowed().erase(address); }

void Machine::check(Warp& warp, const Instruction& in, int lane, u64 address, u64 bytes, const char* what) {
  if (bytes <= 16 && address % bytes) fault(warp, in, lane, std::string("a misaligned ") + what);
  if (lies_in(address, bytes, seen_begin_, seen_end_)) return;
  u64 shared = u64(warp.cta->shared);
  if (lies_in(address, bytes, shared, shared + warp.cta->shared_bytes)) return;
  if (lies_in(address, bytes, kernel_.arguments) || lies_in(address, bytes, kernel_.call_room)) return;
  for (const auto& local : warp.local)
    if (lies_in(address, bytes, local)) return;
  auto after = allowed().upper_bound(address);
  if (after != allowed().begin()) {
    auto range = std::prev(after);
    if (lies_in(address, bytes, range->first, range->second)) {
      seen_begin_ = range->first, seen_end_ = range->second;
      return;
    }
  }
  char text[120];
  snprintf(text, sizeof text, "a %s of %lu bytes at 0x%lx, outside of the memory of the call", what,
           static_cast<unsigned long>(bytes), static_cast<unsigned long>(address));
  fault(warp, in, lane, text);
}

uint8_t* Machine::place(Warp& warp, const Instruction& in, const Address& at, Space space, int lane, u64 bytes,
                        const char* what) {
  u64 address = u64(at.offset) + (at.base >= 0 ? warp.reg(at.base)[lane] : 0);
  if (space == Space::shared || space == Space::local) {
    auto& local = warp.local[lane];
    u64 room = space == Space::shared ? warp.cta->shared_bytes : local.size();
    if (space == Space::shared) address = u32(address);
    if (address + bytes > room || address + bytes < address)
      fault(warp, in, lane, std::string("a ") + what + " at " + std::to_string(address) + " of " +
                                std::to_string(room) + " bytes of " +
                                (space == Space::shared ? "shared" : "local") + " memory");
    if (address % bytes) fault(warp, in, lane, std::string("a misaligned ") + what);
    return (space == Space::shared ? warp.cta->shared : local.data()) + address;
  }
  check(warp, in, lane, address, bytes, what);
  return reinterpret_cast<uint8_t*>(address);
}

void Machine::load(Warp& warp, const Instruction& in, u32 mask) {
  const size_t each = size_t(bytes_of(in.type)), count = in.d.size();
  each_lane(mask, [&](int l) {
    const uint8_t* from = place(warp, in, in.address, in.space, l, each * count, "read");
    for (size_t i = 0; i < count; i++) {
      u64 v = 0;
      memcpy(&v, from + i * each, each);
      if (in.d[i] >= 0) warp.reg(in.d[i])[l] = integer(in.type, v);
    }
  });
}

void Machine::store(Warp& warp, const Instruction& in, u32 mask) {
  const size_t each = size_t(bytes_of(in.type)), count = in.s.size();
  each_lane(mask, [&](int l) {
    uint8_t* to = place(warp, in, in.address, in.space, l, each * count, "write");
    for (size_t i = 0; i < count; i++) memcpy(to + i * each, &warp.reg(in.s[i])[l], each);
  });
}

// cp.async [shared], [global], bytes{, how many of them are read; the rest is zeros}
void Machine::copy_async(Warp& warp, const Instruction& in, u32 mask) {
  each_lane(mask, [&](int l) {
    const u64 bytes = u32(warp.reg(in.s[0])[l]);
    const u64 read = in.s.size() > 1 ? std::min<u64>(bytes, u32(warp.reg(in.s[1])[l])) : bytes;
    uint8_t* to = place(warp, in, in.address, Space::shared, l, bytes, "write");
    memset(to, 0, bytes);
    if (!read) return;
    u64 from = u64(in.source.offset) + (in.source.base >= 0 ? warp.reg(in.source.base)[l] : 0);
    if (from % bytes) fault(warp, in, l, "a misaligned read");
    for (u64 done = 0, step; done < read; done += step) {  // pieces that are aligned, whatever their sum
      step = u64(1) << (63 - __builtin_clzll(read - done));
      check(warp, in, l, from + done, step, "read");
    }
    memcpy(to, reinterpret_cast<const void*>(from), read);
  });
}

void Machine::atomic(Warp& warp, const Instruction& in, u32 mask) {
  const size_t bytes = size_t(bytes_of(in.type));
  each_lane(mask, [&](int l) {
    uint8_t* at = place(warp, in, in.address, in.space, l, bytes, "write");
    u64 old = 0, made;
    memcpy(&old, at, bytes);
    made = combined(in, old, warp.reg(in.s[0])[l], in.s.size() > 1 ? warp.reg(in.s[1])[l] : 0);
    memcpy(at, &made, bytes);
    if (!in.d.empty() && in.d[0] >= 0) warp.reg(in.d[0])[l] = integer(in.type, old);
  });
}

// cvta: an address within shared or local memory as one of all memory, and with .to the other way.
void Machine::convert_address(Warp& warp, const Instruction& in, u32 mask) {
  u64 *d = warp.reg(in.d[0]), *a = warp.reg(in.s[0]);
  each_lane(mask, [&](int l) {
    u64 base = in.space == Space::shared ? u64(warp.cta->shared) : in.space == Space::local ? u64(warp.local[l].data()) : 0;
    d[l] = in.to_space ? a[l] - base : a[l] + base;
  });
}

}  // namespace ptx
