// Collectives of processes in memory that they share: what comm/shared_memory.py says of them, and calls.
//
//     [size] places        how far each rank has come, and what it is at; a cache line or two each
//     [2][size] slots      what ranks give of a chunk
//     [2] results          of more than two ranks: sums for all, of which each rank makes a share
//
// A rank's `stage` counts up. It puts a chunk into its slot (one message for all, or one for each), enters a stage, and
// waits until all have entered it. Then it takes from all slots what is for it: copies, or the sum, in the order of
// ranks, in float32, rounded once. Of more than two ranks a sum for all is made in shares: each sums one into the
// result, enters the next stage, waits again and takes all of it: the same order, and so the same bits.
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

constexpr int64_t BLOCK = 1024;               // sums at a time, so that they stay in the first cache
constexpr int64_t SHARED_FROM_BYTES = 16384;  // of more than two ranks: below it each sums all, and waits once
// A yield that took so long was another process's turn; so many waits then begin with sleep.
constexpr int64_t CROWDED_NS = 200000, CROWDED_WAITS = 64;
constexpr int64_t DONE = 0, WAITS = 1, DIFFERS = 2;
constexpr int64_t ALL_GATHER = 0, ALL_TO_ALL = 1, REDUCE_SCATTER = 2, ALL_REDUCE = 3;

struct alignas(128) Place {
    std::atomic<uint32_t> stage, sleepers, has_left;
    int64_t kind[2], count[2], dtype[2];
};

struct Call {
    char* memory;
    int64_t size, index, slots_at, chunk_bytes, spin_ns, wait_ns;
    const void* x;
    void* out;                     // of a sum for all it may be x
    int64_t kind, count, dtype;    // count: elements of a message
    int64_t other, other_kind, other_count, other_dtype;  // the rank that is waited for, or differs, and what it is at
    int64_t status;
    int64_t done;                  // elements of each message that have arrived
    int64_t crowded;               // waits that still begin with sleep
    uint32_t stage, step;          // entered so far; what is next of a chunk
};

inline Place& place(const Call& call, int64_t rank) { return reinterpret_cast<Place*>(call.memory)[rank]; }

inline char* slot(const Call& call, int64_t rank, uint32_t stage) {
    return call.memory + call.slots_at + ((stage & 1) * call.size + rank) * call.chunk_bytes;
}

inline char* result(const Call& call, uint32_t stage) {
    return call.memory + call.slots_at + (2 * call.size + (stage & 1)) * call.chunk_bytes;
}

inline bool has_one_for_each(const Call& call) { return call.kind == ALL_TO_ALL || call.kind == REDUCE_SCATTER; }
inline bool sums(const Call& call) { return call.kind >= REDUCE_SCATTER; }

inline float widened(float x) { return x; }
inline float widened(_Float16 x) { return float(x); }
inline float widened(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline float widened(uint8_t x) { return x; }

inline void round_to(float x, float& out) { out = x; }
inline void round_to(float x, _Float16& out) { out = _Float16(x); }
inline void round_to(float x, uint16_t& out) {  // bfloat16: to the nearest, of two as near to the even one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    out = x != x ? uint16_t(0x7FC0) : uint16_t(rounded);
}
inline void round_to(float x, uint8_t& out) { out = uint8_t(x); }

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

bool all_do_the_same(Call& call, uint32_t stage) {
    for (int64_t rank = 0; rank < call.size; rank++) {
        const Place& its = place(call, rank);
        call.other = rank;
        call.other_kind = its.kind[stage & 1], call.other_count = its.count[stage & 1];
        call.other_dtype = its.dtype[stage & 1];
        if (call.other_kind != call.kind || call.other_count != call.count || call.other_dtype != call.dtype) {
            return false;
        }
    }
    return true;
}

// How many elements of each message a chunk holds.
template <typename T>
int64_t most_of_a_message(const Call& call) {
    return call.chunk_bytes / (has_one_for_each(call) ? call.size : 1) / int64_t(sizeof(T));
}

// `num` elements of x, from `done` on, where others find them.
template <typename T>
void give(const Call& call, int64_t num) {
    const T* x = static_cast<const T*>(call.x) + call.done;
    T* own = reinterpret_cast<T*>(slot(call, call.index, call.stage));
    if (!has_one_for_each(call)) {
        std::memcpy(own, x, num * sizeof(T));
        return;
    }
    for (int64_t rank = 0; rank < call.size; rank++) {
        if (rank != call.index) {
            std::memcpy(own + rank * most_of_a_message<T>(call), x + rank * call.count, num * sizeof(T));
        }
    }
}

// Where this rank finds what another gave it.
template <typename T>
const T* given_by(const Call& call, int64_t rank) {
    if (!has_one_for_each(call)) return reinterpret_cast<const T*>(slot(call, rank, call.stage));
    if (rank == call.index) return static_cast<const T*>(call.x) + rank * call.count + call.done;
    return reinterpret_cast<const T*>(slot(call, rank, call.stage)) + call.index * most_of_a_message<T>(call);
}

// Elements [first, last) of the sum of what all gave.
template <typename T>
void sum(const Call& call, int64_t first, int64_t last, T* out) {
    float total[BLOCK];
    for (int64_t at = first; at < last; at += BLOCK) {
        const int64_t num = std::min(BLOCK, last - at);
        for (int64_t rank = 0; rank < call.size; rank++) {
            const T* x = given_by<T>(call, rank) + at;
            if (rank == 0)
                for (int64_t i = 0; i < num; i++) total[i] = widened(x[i]);
            else
                for (int64_t i = 0; i < num; i++) total[i] += widened(x[i]);
        }
        for (int64_t i = 0; i < num; i++) round_to(total[i], out[at + i]);
    }
}

template <typename T>
void take(const Call& call, int64_t num) {
    T* out = static_cast<T*>(call.out) + call.done;
    if (sums(call)) {
        sum<T>(call, 0, num, out);
        return;
    }
    for (int64_t rank = 0; rank < call.size; rank++) {
        std::memcpy(out + rank * call.count, given_by<T>(call, rank), num * sizeof(T));
    }
}

// Goes on where it was when it last had to wait.
template <typename T>
int64_t run(Call& call) {
    do {
        const int64_t num = std::min(call.count - call.done, most_of_a_message<T>(call));
        const bool in_shares = call.kind == ALL_REDUCE && call.size > 2 && num * int64_t(sizeof(T)) > SHARED_FROM_BYTES;
        if (call.step == 0) {
            Place& own = place(call, call.index);
            call.stage++;
            give<T>(call, num);
            own.kind[call.stage & 1] = call.kind, own.count[call.stage & 1] = call.count;
            own.dtype[call.stage & 1] = call.dtype;
            enter(call, call.stage);
            call.step = 1;
        }
        if (call.step == 1) {
            if (!all_entered(call, call.stage)) return WAITS;
            if (!all_do_the_same(call, call.stage)) return DIFFERS;
            if (in_shares) {
                const int64_t share = (num + call.size - 1) / call.size, first = std::min(num, share * call.index);
                sum<T>(call, first, std::min(num, first + share), reinterpret_cast<T*>(result(call, call.stage)));
                enter(call, ++call.stage);
                call.step = 2;
            } else {
                take<T>(call, num);
            }
        }
        if (call.step == 2) {
            if (!all_entered(call, call.stage)) return WAITS;
            std::memcpy(static_cast<T*>(call.out) + call.done, result(call, call.stage - 1), num * sizeof(T));
        }
        call.step = 0;
        call.done += num;
    } while (call.done < call.count);
    return DONE;
}

}  // namespace

extern "C" {

// Returns, and leaves in `status`, whether the collective is done. One that is, is not run again.
int64_t cpinfer_run_collective(Call* call) {
    if (call->status == DONE) return DONE;
    switch (call->dtype) {
        case 0: return call->status = run<float>(*call);
        case 1: return call->status = run<uint16_t>(*call);
        case 2: return call->status = run<_Float16>(*call);
        default: return call->status = run<uint8_t>(*call);
    }
}

// This rank takes part no more.
void cpinfer_leave_collectives(const Call* call) { place(*call, call->index).has_left.store(1); }

int64_t cpinfer_has_left_collectives(const Call* call, int64_t rank) { return place(*call, rank).has_left.load(); }

}
