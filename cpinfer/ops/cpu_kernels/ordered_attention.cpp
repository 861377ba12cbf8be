// Attention in an order that nothing changes: what ordered_attention.py says of it, and calls.
//
// Of a query and a virtual shard the keys are taken 64 at a time, in order. A tile's logits are sums over the head dim,
// one product after another; its weights are summed as a tree; the state (m, l, acc) takes tile after tile:
//
//     m' = max(m, max s)    l' = l exp(m - m') + sum exp(s - m')    acc' = acc exp(m - m') + sum exp(s - m') v
//
// No sum runs over queries, heads, rows or threads; a key that a query does not see adds an exact zero to its sum of
// weights, and its values are not taken at all: zero times what is no number is none. So the bits of a state are a
// function of the query and of the keys it sees, whatever is computed beside it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int STEP = HELD * LANES;
constexpr int TILE = 64, GROUPS = TILE / LANES;  // keys that enter a state together
constexpr int TOGETHER = 4;  // queries whose sums are in registers at once

// tanh by a polynomial near 0 (Cephes), where the quotient behind it would lose what is left of small numbers.
inline Lanes tanh_lanes(Lanes x) {
    const Lanes size = x < 0.0f ? -x : x, square = x * x;
    Lanes y = all(-5.70498872745e-3f);
    y = y * square + 2.06390887954e-2f;
    y = y * square - 5.37397155531e-2f;
    y = y * square + 1.33314422036e-1f;
    y = y * square - 3.33332819422e-1f;
    y = y * square * x + x;
    const Lanes t = exp_lanes(size * -2.0f);
    const Lanes far = (1.0f - t) / (1.0f + t);
    return size < 0.625f ? y : x < 0.0f ? -far : far;
}

// As many rows as lanes become columns: blocks of 8, 4, 2 and 1 change places.
template <int SIZE>
inline void swap_blocks(Lanes* rows) {
    IntLanes upper, lower;
    for (int i = 0; i < LANES; i++) {
        upper[i] = i & SIZE ? LANES + i - SIZE : i;
        lower[i] = i & SIZE ? LANES + i : i + SIZE;
    }
    for (int i = 0; i < LANES; i++) {
        if (i & SIZE) continue;
        const Lanes a = rows[i], b = rows[i + SIZE];
        rows[i] = __builtin_shuffle(a, b, upper);
        rows[i + SIZE] = __builtin_shuffle(a, b, lower);
    }
}

inline void transpose(Lanes* rows) {
    if constexpr (LANES > 8) swap_blocks<8>(rows);
    if constexpr (LANES > 4) swap_blocks<4>(rows);
    swap_blocks<2>(rows);
    swap_blocks<1>(rows);
}

// What keys and values are stored in, as float32. Of eight bits the table says what each of the 256 means.
inline float wide(float x, const float*) { return x; }
inline float wide(_Float16 x, const float*) { return float(x); }
inline float wide(uint8_t x, const float* meanings) { return meanings[x]; }
inline float wide(uint16_t bfloat16, const float*) {
    uint32_t bits = uint32_t(bfloat16) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// STEP numbers that several queries are multiplied by, in registers. A compiler would rather read them from memory for
// each query, and a core reads no faster than it multiplies.
inline void hold(const float* from, Lanes (&row)[HELD]) {
    for (int g = 0; g < HELD; g++) {
        Lanes lanes = load(from + g * LANES);
#ifdef __x86_64__
        __asm__("" : "+v"(lanes));
#endif
        row[g] = lanes;
    }
}

// Of NQ queries to a tile: logits[q][key] = sum over d of q[d] * k[d][key].
template <int NQ>
inline void products(const float* q, int64_t q_stride, const float* keys, int dim, float (*logits)[TILE]) {
    for (int key = 0; key < TILE; key += STEP) {
        Lanes acc[NQ][HELD] = {};
        for (int d = 0; d < dim; d++) {
            Lanes row[HELD];
            hold(keys + int64_t(d) * TILE + key, row);
            for (int i = 0; i < NQ; i++)
                for (int g = 0; g < HELD; g++) acc[i][g] = acc[i][g] + row[g] * q[i * q_stride + d];
        }
        for (int i = 0; i < NQ; i++)
            for (int g = 0; g < HELD; g++) store(acc[i][g], &logits[i][key + g * LANES]);
    }
}

// Work of as many queries as there are, from 1 to TOGETHER, which it is told at compile time.
template <typename Work>
inline void by_count(int count, Work work) {
    switch (count) {
        case 1: return work(std::integral_constant<int, 1>());
        case 2: return work(std::integral_constant<int, 2>());
        case 3: return work(std::integral_constant<int, 3>());
        default: return work(std::integral_constant<int, 4>());
    }
}

// Keys [first, last) of a tile: those that a query sees.
struct Seen {
    int first, last;
};

// acc[q][:] of STEP columns += sum over keys of weights[q][key] * values[key][column:], key after key.
template <int NQ>
inline void weigh(const float (*weights)[TILE], const float* const* values, int64_t column, Seen seen, float* acc,
                  int64_t acc_stride) {
    Lanes sums[NQ][HELD];
    for (int i = 0; i < NQ; i++)
        for (int g = 0; g < HELD; g++) sums[i][g] = load(acc + i * acc_stride + g * LANES);
    for (int key = seen.first; key < seen.last; key++) {
        Lanes row[HELD];
        hold(values[key] + column, row);
        for (int i = 0; i < NQ; i++)
            for (int g = 0; g < HELD; g++) sums[i][g] = sums[i][g] + row[g] * weights[i][key];
    }
    for (int i = 0; i < NQ; i++)
        for (int g = 0; g < HELD; g++) store(sums[i][g], acc + i * acc_stride + g * LANES);
}

// N states of one query and head as one, in their order; those without keys (lse -inf) add exact zeros.
inline void merge(const float* outs, const float* lses, int64_t num, int64_t out_stride, int64_t lse_stride, int v_dim,
                  float* out, float* lse) {
    float peak = NONE;
    for (int64_t i = 0; i < num; i++) peak = std::fmax(peak, lses[i * lse_stride]);
    for (int c = 0; c < v_dim; c++) out[c] = 0.0f;
    bool is_fault = false;
    for (int64_t i = 0; i < num; i++) is_fault |= std::isnan(lses[i * lse_stride]);
    if (is_fault) peak = std::numeric_limits<float>::quiet_NaN();
    if (peak == NONE) {
        *lse = NONE;
        return;
    }
    float total = 0.0f;
    for (int64_t i = 0; i < num; i++) total = total + exp_one(lses[i * lse_stride] - peak);
    for (int64_t i = 0; i < num; i++) {
        if (lses[i * lse_stride] == NONE) continue;
        float share = exp_one(lses[i * lse_stride] - peak) / total;
        for (int c = 0; c < v_dim; c++) out[c] = out[c] + share * outs[i * out_stride + c];
    }
    *lse = std::log(total) + peak;
}

}  // namespace

// What AttentionRows says, and the tensors. Strides in elements; the last dim of each tensor is contiguous.
struct Call {
    int64_t num_rows;
    const int32_t *q_indptr, *kv_lo, *kv_hi, *block_indptr, *block_ids;
    const int64_t* first_place;  // of each row's first key, among those that are dealt to virtual shards
    int64_t block_size, causal, window;  // window 0: none
    int64_t num_shards, interleave;
    int64_t num_q_heads, num_kv_heads, dim, v_dim;
    const float* q;
    const void *keys, *values;
    const float* meanings;
    int64_t stored_in;  // 0 float32, 1 bfloat16, 2 float16, 3 eight bits
    int64_t q_row, q_head, k_slot, k_head, v_slot, v_head;
    float scale, soft_cap;  // soft_cap 0: none
    float *out, *lse;  // merged: [T, H, V], [T, H]; else [T, H, shards, V], [T, H, shards]
    int64_t is_merged, queries_per_unit, num_threads;
};

namespace {

template <typename T>
struct Unit {
    const Call& call;
    const std::vector<T> nothing;  // zeros of a key, or of its values
    std::vector<float> queries, keys, values, acc, states, state_lses;
    std::vector<float> m, l;

    // Columns that only pad values stay the zeros that they are here.
    explicit Unit(const Call& call)
        : call(call),
          nothing(std::max(call.dim, call.v_dim)),
          keys(call.dim * TILE),
          values(TILE * padded(call.v_dim)) {}

    static int64_t padded(int64_t dim) { return (dim + STEP - 1) / STEP * STEP; }

    // Queries [first, last) of a row, and the query heads of one KV head.
    void run(int64_t row, int64_t first, int64_t last, int64_t head) {
        const int64_t group = call.num_q_heads / call.num_kv_heads, num = (last - first) * group;
        const int64_t dim = call.dim, v_dim = call.v_dim, v_wide = padded(v_dim), V = call.num_shards;
        const int64_t q_begin = call.q_indptr[row], num_queries = call.q_indptr[row + 1] - q_begin;
        queries.resize(num * dim);
        for (int64_t i = 0; i < num; i++) {
            const int64_t query = q_begin + first + i / group, query_head = head * group + i % group;
            const float* from = call.q + query * call.q_row + query_head * call.q_head;
            std::memcpy(&queries[i * dim], from, dim * sizeof(float));
        }
        states.resize(num * V * v_dim);
        state_lses.resize(num * V);
        // Of each query the table indices that it sees are [lo, hi).
        const int64_t kv_lo = call.kv_lo[row], kv_hi = call.kv_hi[row];
        auto sees_from = [&](int64_t i) {
            int64_t at = kv_hi - num_queries + first + i / group;
            return call.window && at - call.window + 1 > kv_lo ? at - call.window + 1 : kv_lo;
        };
        auto sees_to = [&](int64_t i) { return call.causal ? kv_hi - num_queries + first + i / group + 1 : kv_hi; };
        const int64_t begin = call.first_place[row];
        const int64_t lo = begin + sees_from(0), hi = begin + (num ? sees_to(num - 1) : 0);
        for (int64_t shard = 0; shard < V; shard++) {
            m.assign(num, NONE);
            l.assign(num, 0.0f);
            acc.assign(num * v_wide, 0.0f);
            const int64_t from = held(lo, shard), to = held(hi, shard);  // its own places of them
            Tile tiles[2];  // this one and the next
            const int64_t first_tile = from / TILE, num_tiles = from < to ? (to + TILE - 1) / TILE - first_tile : 0;
            auto find_tile = [&](int64_t i) {
                if (i < num_tiles) find(tiles[i % 2], row, head, shard, first_tile + i, begin, lo, hi);
            };
            find_tile(0);
            for (int64_t i = 0; i < num_tiles; i++) {
                find_tile(i + 1);
                take(tiles[i % 2], tiles[(i + 1 < num_tiles ? i + 1 : i) % 2], num, begin, sees_from, sees_to);
            }
            for (int64_t i = 0; i < num; i++) {
                float* state = &states[(i * V + shard) * v_dim];
                const bool is_empty = l[i] == 0.0f;
                for (int64_t c = 0; c < v_dim; c++) state[c] = is_empty ? 0.0f : acc[i * v_wide + c] / l[i];
                state_lses[i * V + shard] = is_empty ? NONE : std::log(l[i]) + m[i];
            }
        }
        for (int64_t i = 0; i < num; i++) {
            const int64_t at = (q_begin + first + i / group) * call.num_q_heads + head * group + i % group;
            const float *outs = &states[i * V * v_dim], *lses = &state_lses[i * V];
            if (call.is_merged) {
                merge(outs, lses, V, v_dim, 1, int(v_dim), call.out + at * v_dim, call.lse + at);
            } else {
                std::memcpy(call.out + at * V * v_dim, outs, V * v_dim * sizeof(float));
                std::memcpy(call.lse + at * V, lses, V * sizeof(float));
            }
        }
    }

    // How many of the places below `place` a virtual shard holds.
    int64_t held(int64_t place, int64_t shard) const {
        const int64_t deal = call.interleave * call.num_shards, rest = place % deal - shard * call.interleave;
        return place / deal * call.interleave + (rest < 0 ? 0 : rest > call.interleave ? call.interleave : rest);
    }

    // Of the keys of a tile. Counted on, not divided: divisions for every key take longer than their products.
    void place_keys(int64_t shard, int64_t tile, int64_t* places) const {
        const int64_t local = tile * TILE;
        int64_t in_deal = local % call.interleave;
        int64_t place = (local / call.interleave * call.num_shards + shard) * call.interleave + in_deal;
        for (int key = 0; key < TILE; key++) {
            places[key] = place++;
            if (++in_deal == call.interleave) {
                in_deal = 0;
                place += call.interleave * (call.num_shards - 1);
            }
        }
    }

    // Where its keys and values lie; `nothing` in place of what nobody sees: it may not be in the table.
    struct Tile {
        int64_t places[TILE];
        const T *keys[TILE], *values[TILE];
        int num_keys;
    };

    // Tile `index` of a virtual shard.
    void find(Tile& tile, int64_t row, int64_t head, int64_t shard, int64_t index, int64_t begin, int64_t lo,
              int64_t hi) const {
        const T* all_keys = static_cast<const T*>(call.keys);
        const T* all_values = static_cast<const T*>(call.values);
        const int32_t* table = call.block_ids + call.block_indptr[row];
        place_keys(shard, index, tile.places);
        tile.num_keys = 0;
        int64_t slot = 0, left = 0;  // left: so many keys follow in the block of the last one
        for (int key = 0; key < TILE; key++) {
            tile.keys[key] = tile.values[key] = nothing.data();
            const int64_t place = tile.places[key];
            if (place >= hi) continue;
            tile.num_keys = key + 1;
            if (place < lo) continue;
            if (left > 0 && place == tile.places[key - 1] + 1) {
                slot++, left--;
            } else {
                const int64_t at = place - begin, offset = at % call.block_size;
                slot = int64_t(table[at / call.block_size]) * call.block_size + offset;
                left = call.block_size - 1 - offset;
            }
            tile.keys[key] = all_keys + slot * call.k_slot + head * call.k_head;
            tile.values[key] = all_values + slot * call.v_slot + head * call.v_head;
        }
    }

    template <typename From, typename To>
    void take(const Tile& tile, const Tile& next, int64_t num, int64_t begin, From sees_from, To sees_to) {
        const int64_t dim = call.dim, v_dim = call.v_dim, v_wide = padded(v_dim);
        const int num_keys = tile.num_keys, groups = (num_keys + LANES - 1) / LANES;
        // For queries that are all in one go keys are not laid out: each number would be written once, and read once. They
        // are for one alone: not every compiler fuses a single chain of products for every processor (GCC for Zen 2 and 3
        // does not), and its bits would not be those that it has in company.
        const bool is_once = num <= TOGETHER, is_laid_out = !is_once || num == 1;
        if (is_laid_out)
            for (int g = 0; g < groups; g++) lay_out(tile, next, g * LANES);
        const float* value_rows[TILE];
        for (int key = 0; key < num_keys; key++) {
            const T* from = tile.values[key];
            if constexpr (std::is_same_v<T, float>) {
                if (is_once && v_dim == v_wide) {
                    value_rows[key] = from;
                    continue;
                }
            }
            float* row = &values[key * v_wide];
            value_rows[key] = row;
            for (int64_t c = 0; c < v_dim; c++) row[c] = wide(from[c], call.meanings);
        }
        for (int64_t at = 0; at < num;) {
            float weights[TOGETHER][TILE];  // logits first
            const int n = int(std::min<int64_t>(TOGETHER, num - at));
            const float* q = &queries[at * dim];
            by_count(n, [&](auto count) {
                constexpr int NQ = decltype(count)::value;
                if (is_laid_out) products<NQ>(q, dim, keys.data(), int(dim), weights);
                else
                    for (int g = 0; g < groups; g++) products_where_they_lie<NQ>(tile, next, q, g * LANES, weights);
            });
            Seen seen[TOGETHER], shared = {0, num_keys};
            for (int i = 0; i < n; i++) {
                const int64_t from = begin + sees_from(at + i), to = begin + sees_to(at + i);
                seen[i] = weigh_logits(weights[i], groups, num_keys, tile.places, from, to, at + i);
                shared = {std::max(shared.first, seen[i].first), std::min(shared.last, seen[i].last)};
            }
            if (shared.first >= shared.last) shared = {num_keys, num_keys};  // each takes its own
            for (int64_t c = 0; c < v_wide; c += STEP) {
                float* sums = &acc[at * v_wide + c];
                auto alone = [&](int i, Seen keys) {
                    if (keys.first < keys.last)
                        weigh<1>(weights + i, value_rows, c, keys, sums + i * v_wide, v_wide);
                };
                for (int i = 0; i < n; i++) alone(i, {seen[i].first, std::min(seen[i].last, shared.first)});
                if (shared.first < shared.last)
                    by_count(n, [&](auto count) {
                        weigh<decltype(count)::value>(weights, value_rows, c, shared, sums, v_wide);
                    });
                for (int i = 0; i < n; i++) alone(i, {shared.last, seen[i].last});
            }
            at += n;
        }
    }

    // What `products` says, of NQ queries to the keys of a group, read where they lie.
    template <int NQ>
    void products_where_they_lie(const Tile& tile, const Tile& next, const float* q, int first,
                                 float (*logits)[TILE]) const {
        const int64_t dim = call.dim, whole = dim / LANES * LANES;
        Lanes acc[NQ] = {};
        for (int64_t d = 0; d < whole; d += LANES) {
            Lanes block[LANES];
            columns_of(tile, first, d, block);
            for (int i = 0; i < LANES; i++) {
                ask_for(next, first + i, d);
                for (int query = 0; query < NQ; query++) acc[query] = acc[query] + block[i] * q[query * dim + d + i];
            }
        }
        for (int64_t d = whole; d < dim; d++) {
            float column[LANES];
            for (int i = 0; i < LANES; i++) column[i] = wide(tile.keys[first + i][d], call.meanings);
            for (int query = 0; query < NQ; query++) acc[query] = acc[query] + load(column) * q[query * dim + d];
        }
        for (int query = 0; query < NQ; query++) store(acc[query], &logits[query][first]);
    }

    // What lies at column d of a key and its values begins to come from memory. A tile asks for the next one, a key at
    // a time: a core that asks for more than memory is about to give waits for it.
    static void ask_for(const Tile& next, int key, int64_t d) {
        __builtin_prefetch(next.keys[key] + d, 0, 2);
        __builtin_prefetch(next.values[key] + d, 0, 2);
    }

    // Of as many keys as lanes, LANES columns from `d` on: block[i][key].
    void columns_of(const Tile& tile, int first, int64_t d, Lanes (&block)[LANES]) const {
        for (int key = 0; key < LANES; key++) {
            float numbers[LANES];
            for (int i = 0; i < LANES; i++) numbers[i] = wide(tile.keys[first + key][d + i], call.meanings);
            block[key] = load(numbers);
        }
        transpose(block);
    }

    // Keys of a group side by side: keys[d][key] for as many rows as lanes.
    void lay_out(const Tile& tile, const Tile& next, int first) {
        const int64_t dim = call.dim, whole = dim / LANES * LANES;
        for (int64_t d = 0; d < whole; d += LANES) {
            Lanes block[LANES];
            columns_of(tile, first, d, block);
            for (int i = 0; i < LANES; i++) {
                ask_for(next, first + i, d);
                store(block[i], &keys[(d + i) * TILE + first]);
            }
        }
        for (int64_t d = whole; d < dim; d++)
            for (int key = first; key < first + LANES; key++)
                keys[d * TILE + key] = wide(tile.keys[key][d], call.meanings);
    }

    // Logits of one query become weights, and its state made ready for them; of the keys that it sees.
    Seen weigh_logits(float* weights, int groups, int num_keys, const int64_t* places, int64_t lo, int64_t hi,
                      int64_t query) {
        int first = 0, last = num_keys;
        while (first < last && places[first] < lo) first++;
        while (last > first && places[last - 1] >= hi) last--;
        const Seen seen = {first, last};
        if (first == last) return seen;
        Lanes scaled[GROUPS], peaks = all(NONE);
        IntLanes lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        const bool is_full = first == 0 && last == groups * LANES;
        for (int g = 0; g < groups; g++) {
            Lanes x = load(weights + g * LANES) * call.scale;
            if (call.soft_cap != 0.0f) x = tanh_lanes(x / call.soft_cap) * call.soft_cap;
            if (!is_full) x = ((lane >= first - g * LANES) & (lane < last - g * LANES)) ? x : all(NONE);
            peaks = larger(x, peaks);
            scaled[g] = x;
        }
        // A NaN is no peak, but its weight is one, and so are the sum of weights and all that is made of it.
        const float peak = largest(peaks);
        const float before = m[query], now = before > peak ? before : peak;
        const float kept = before == NONE ? 0.0f : before == now ? 1.0f : exp_one(before - now);
        Lanes total[GROUPS] = {};
        for (int g = 0; g < GROUPS; g++) {
            if (g < groups) total[g] = exp_lanes(scaled[g] - now);
            store(total[g], weights + g * LANES);
        }
        l[query] = l[query] * kept;
        for (int half = GROUPS / 2; half; half /= 2)
            for (int g = 0; g < half; g++) total[g] = total[g] + total[g + half];
        l[query] = l[query] + sum(total[0]);
        m[query] = now;
        if (kept == 1.0f) return seen;
        const int64_t v_wide = padded(call.v_dim);
        for (int64_t c = 0; c < v_wide; c++) acc[query * v_wide + c] = acc[query * v_wide + c] * kept;
        return seen;
    }
};

template <typename T>
void run_all(const Call& call) {
    std::vector<int64_t> rows, firsts;
    for (int64_t row = 0; row < call.num_rows; row++) {
        const int64_t num = call.q_indptr[row + 1] - call.q_indptr[row];
        for (int64_t first = 0; first < num; first += call.queries_per_unit) {
            rows.push_back(row);
            firsts.push_back(first);
        }
    }
    const int64_t num_units = int64_t(rows.size()) * call.num_kv_heads;
#pragma omp parallel num_threads(int(call.num_threads)) if (call.num_threads > 1)
    {
        Unit<T> unit(call);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_units; i++) {
            const int64_t at = i / call.num_kv_heads, row = rows[at], first = firsts[at];
            const int64_t rest = call.q_indptr[row + 1] - call.q_indptr[row] - first;
            const int64_t num = rest < call.queries_per_unit ? rest : call.queries_per_unit;
            unit.run(row, first, first + num, i % call.num_kv_heads);
        }
    }
}

}  // namespace

extern "C" {

void cpinfer_ordered_attention(const Call* call) {
    switch (call->stored_in) {
        case 0: return run_all<float>(*call);
        case 1: return run_all<uint16_t>(*call);
        case 2: return run_all<_Float16>(*call);
        default: return run_all<uint8_t>(*call);
    }
}

// [num, count, V] states, with lse [num, count], merged in their order to [count, V], [count].
void cpinfer_merge_ordered(const float* outs, const float* lses, int64_t num, int64_t count, int64_t v_dim, float* out,
                           float* lse) {
    for (int64_t i = 0; i < count; i++)
        merge(outs + i * v_dim, lses + i, num, count * v_dim, count, int(v_dim), out + i * v_dim, lse + i);
}

}
