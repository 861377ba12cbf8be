// A sum over processes in memory that they share: what comm/shared_sum.py says of it, and calls.
//
//     [size] places        how far each rank has come, and what it sums; a cache line or two each
//     [2][size] slots      what ranks give of a chunk
//     [2] results          of more than two ranks: sums, of which each rank makes a share
//
// A rank's `stage` counts up. It puts a chunk into its slot, enters a stage, and waits until all have entered it. Then
// it sums all slots, in the order of ranks, in float32, and rounds once. Of more than two ranks each sums a share into
// the result, enters the next stage, waits again and takes all of it: the same order, and so the same bits.
//
// Slots and results of stages n and n+1 are two. Those of n are written again in n+2 at the soonest, by ranks that saw
// all others enter n+1, which these do when they have read what they need of n.

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 1024;              // sums at a time, so that they stay in the first cache
constexpr int64_t SHARED_FROM_BYTES = 16384;  // of more than two ranks: below it each sums all, and waits once
// A yield that took so long was another process's turn; so many waits then begin with sleep.
constexpr int64_t CROWDED_NS = 200000, CROWDED_WAITS = 64;
constexpr int64_t DONE = 0, WAITS = 1, DIFFERS = 2;

struct alignas(128) Place {
    std::atomic<uint32_t> stage, sleepers, has_left;
    int64_t count[2], dtype[2];
};

struct Call {
    char* memory;
    int64_t size, index, slots_at, chunk_bytes, spin_ns, wait_ns;
    void* x;
    int64_t count, dtype;
    int64_t other, other_count, other_dtype;  // the rank that is waited for, or differs, and what it sums
    int64_t done;                             // elements of x that are summed
    int64_t crowded;                          // waits that still begin with sleep
    uint32_t stage, step;                     // entered so far; what is next of a chunk
};

inline Place& place(const Call& call, int64_t rank) { return reinterpret_cast<Place*>(call.memory)[rank]; }

inline char* slot(const Call& call, int64_t rank, uint32_t stage) {
    return call.memory + call.slots_at + ((stage & 1) * call.size + rank) * call.chunk_bytes;
}

inline char* result(const Call& call, uint32_t stage) {
    return call.memory + call.slots_at + (2 * call.size + (stage & 1)) * call.chunk_bytes;
}

inline float widened(float x) { return x; }
inline float widened(_Float16 x) { return float(x); }
inline float widened(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void round_to(float x, float& out) { out = x; }
inline void round_to(float x, _Float16& out) { out = _Float16(x); }
inline void round_to(float x, uint16_t& out) {  // bfloat16: to the nearest, of two as near to the even one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    out = x != x ? uint16_t(0x7FC0) : uint16_t(rounded);
}

int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * int64_t(1000000000) + time.tv_nsec;
}

long futex(std::atomic<uint32_t>& word, int what, uint32_t value, const timespec* at_most) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), what, value, at_most, nullptr, 0);
}

inline bool has_entered(const Place& its, uint32_t stage) {
    return int32_t(its.stage.load(std::memory_order_acquire) - stage) >= 0;
}

void enter(const Call& call, uint32_t stage) {
    Place& own = place(call, call.index);
    own.stage.store(stage);
    if (own.sleepers.load()) futex(own.stage, FUTEX_WAKE, INT_MAX, nullptr);
}

// Whether all have entered a stage, after `wait_ns` at most; else `other` has not.
//
// Who looks again and again lets others run in between, who may be on the same core, and sleeps after `spin_ns`. Where
// yet other processes want the core, a yield costs a turn of theirs, and sleep is the sooner way back.
bool all_entered(Call& call, uint32_t stage) {
    int64_t began_ns = 0, spin_ns = 0;
    for (int64_t rank = 0; rank < call.size; rank++) {
        Place& its = place(call, rank);
        while (!has_entered(its, stage)) {
            const int64_t now = now_ns();
            if (!began_ns) {
                began_ns = now;
                spin_ns = call.crowded ? 0 : call.spin_ns;
                call.crowded -= call.crowded > 0;
            }
            if (now - began_ns < spin_ns) {
                sched_yield();
                if (now_ns() - now > CROWDED_NS && !has_entered(its, stage)) {
                    call.crowded = CROWDED_WAITS;
                    spin_ns = 0;
                }
                continue;
            }
            const int64_t left_ns = call.wait_ns - (now - began_ns);
            if (left_ns <= 0) {
                call.other = rank;
                return false;
            }
            const timespec at_most = {time_t(left_ns / 1000000000), long(left_ns % 1000000000)};
            its.sleepers.fetch_add(1);
            const uint32_t seen = its.stage.load();
            if (int32_t(seen - stage) < 0) futex(its.stage, FUTEX_WAIT, seen, &at_most);
            its.sleepers.fetch_sub(1);
        }
    }
    return true;
}

bool all_sum_the_same(Call& call, uint32_t stage) {
    for (int64_t rank = 0; rank < call.size; rank++) {
        const Place& its = place(call, rank);
        call.other = rank, call.other_count = its.count[stage & 1], call.other_dtype = its.dtype[stage & 1];
        if (call.other_count != call.count || call.other_dtype != call.dtype) return false;
    }
    return true;
}

// Elements [first, last) of all slots' sum.
template <typename T>
void sum(const Call& call, int64_t first, int64_t last, T* out) {
    float sums[BLOCK];
    for (int64_t at = first; at < last; at += BLOCK) {
        const int64_t num = std::min(BLOCK, last - at);
        for (int64_t rank = 0; rank < call.size; rank++) {
            const T* x = reinterpret_cast<const T*>(slot(call, rank, call.stage)) + at;
            if (rank == 0)
                for (int64_t i = 0; i < num; i++) sums[i] = widened(x[i]);
            else
                for (int64_t i = 0; i < num; i++) sums[i] += widened(x[i]);
        }
        for (int64_t i = 0; i < num; i++) round_to(sums[i], out[at + i]);
    }
}

// Goes on where it was when it last had to wait.
template <typename T>
int64_t run(Call& call) {
    do {
        const int64_t num = std::min(call.count - call.done, call.chunk_bytes / int64_t(sizeof(T)));
        const bool in_shares = call.size > 2 && num * int64_t(sizeof(T)) > SHARED_FROM_BYTES;
        T* x = static_cast<T*>(call.x) + call.done;
        if (call.step == 0) {
            Place& own = place(call, call.index);
            call.stage++;
            std::memcpy(slot(call, call.index, call.stage), x, num * sizeof(T));
            own.count[call.stage & 1] = call.count, own.dtype[call.stage & 1] = call.dtype;
            enter(call, call.stage);
            call.step = 1;
        }
        if (call.step == 1) {
            if (!all_entered(call, call.stage)) return WAITS;
            if (!all_sum_the_same(call, call.stage)) return DIFFERS;
            if (in_shares) {
                const int64_t share = (num + call.size - 1) / call.size, first = std::min(num, share * call.index);
                sum<T>(call, first, std::min(num, first + share), reinterpret_cast<T*>(result(call, call.stage)));
                enter(call, ++call.stage);
                call.step = 2;
            } else {
                sum<T>(call, 0, num, x);
            }
        }
        if (call.step == 2) {
            if (!all_entered(call, call.stage)) return WAITS;
            std::memcpy(x, result(call, call.stage - 1), num * sizeof(T));
        }
        call.step = 0;
        call.done += num;
    } while (call.done < call.count);
    return DONE;
}

}  // namespace

extern "C" {

int64_t cpinfer_shared_sum(Call* call) {
    switch (call->dtype) {
        case 0: return run<float>(*call);
        case 1: return run<uint16_t>(*call);
        default: return run<_Float16>(*call);
    }
}

// This rank sums no more.
void cpinfer_leave_shared_sum(const Call* call) { place(*call, call->index).has_left.store(1); }

int64_t cpinfer_has_left_shared_sum(const Call* call, int64_t rank) { return place(*call, rank).has_left.load(); }

}
