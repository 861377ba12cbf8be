// Tokens from logits: what draws.py says of it, and calls. Each row is read twice, nothing is written but what is found.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t GROUP = 128;

float largest_of(const float* row, int64_t num) {
    Lanes peaks[4] = {all(NONE), all(NONE), all(NONE), all(NONE)};  // one would wait for itself
    int64_t i = 0;
    for (; i + 4 * LANES <= num; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) peaks[j] = larger(load(row + i + j * LANES), peaks[j]);
    float peak = largest(larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3])));
    for (; i < num; ++i) peak = row[i] > peak ? row[i] : peak;
    return peak;
}

// exp of the numbers of a group less the peak, zeros behind its end.
void exponentials(const float* row, int64_t num, float peak, float (&found)[GROUP]) {
    float own[GROUP];
    std::fill(std::copy(row, row + num, own), own + GROUP, NONE);
    for (int64_t i = 0; i < GROUP; i += LANES) store(exp_lanes(load(own + i) - peak), found + i);
}

// As a tree, whose order no width of registers changes.
float sum_of(const float (&numbers)[GROUP]) {
    Lanes parts[GROUP / LANES];
    for (int64_t i = 0; i < GROUP / LANES; ++i) parts[i] = load(numbers + i * LANES);
    for (int64_t half = GROUP / LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) parts[i] = parts[i] + parts[i + half];
    return sum(parts[0]);
}

struct Row {
    float peak;
    double total;  // of exp(number - peak)

    double norm() const { return double(peak) + std::log(total); }
    float logprob(float number) const { return float(double(number) - norm()); }
};

Row row_of(const float* row, int64_t num, float* groups) {
    Row found{largest_of(row, num), 0.0};
    float own[GROUP];
    for (int64_t first = 0; first < num; first += GROUP) {
        exponentials(row + first, std::min(GROUP, num - first), found.peak, own);
        const float together = sum_of(own);
        found.total += together;
        if (groups) groups[first / GROUP] = together;
    }
    return found;
}

// Who comes first, at times[i] / speeds[i]; of equal ones the first. 0 where nobody comes.
int64_t winner(const double* times, const float* speeds, int64_t num) {
    double best = std::numeric_limits<double>::infinity();
    int64_t place = 0;
    for (int64_t i = 0; i < num; ++i) {
        const double time = times[i] / double(speeds[i]);
        if (time < best) best = time, place = i;
    }
    return place;
}

// No more than there are rows: others would be woken for nothing.
int used(int64_t threads, int64_t rows) { return int(std::max<int64_t>(1, std::min(threads, rows))); }

}  // namespace

extern "C" {

// scores [rows, num] of a stride; numbers [rows, GROUP + groups]; tokens and logprobs [rows].
void cpinfer_draw(const float* scores, int64_t rows, int64_t num, int64_t stride, const double* numbers, int64_t threads,
                  int64_t* tokens, float* logprobs) {
    const int64_t groups = (num + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(used(threads, rows))
    for (int64_t i = 0; i < rows; ++i) {
        const float* row = scores + i * stride;
        const double* times = numbers + i * (GROUP + groups);
        std::vector<float> sums(groups);
        const Row found = row_of(row, num, sums.data());
        const int64_t first = winner(times + GROUP, sums.data(), groups) * GROUP;
        const int64_t size = std::min(GROUP, num - first);
        float own[GROUP];
        exponentials(row + first, size, found.peak, own);
        tokens[i] = first + winner(times, own, size);
        logprobs[i] = found.logprob(row[tokens[i]]);
    }
}

// How many of the tokens are none; their logprobs are not written.
int64_t cpinfer_logprobs(const float* scores, int64_t rows, int64_t num, int64_t stride, const int64_t* tokens,
                         int64_t threads, float* logprobs) {
    int64_t beyond = 0;
#pragma omp parallel for num_threads(used(threads, rows)) reduction(+ : beyond)
    for (int64_t i = 0; i < rows; ++i) {
        const float* row = scores + i * stride;
        if (tokens[i] < 0 || tokens[i] >= num) {
            ++beyond;
            continue;
        }
        logprobs[i] = row_of(row, num, nullptr).logprob(row[tokens[i]]);
    }
    return beyond;
}

void cpinfer_norms(const float* scores, int64_t rows, int64_t num, int64_t stride, int64_t threads, double* norms) {
#pragma omp parallel for num_threads(used(threads, rows))
    for (int64_t i = 0; i < rows; ++i) norms[i] = row_of(scores + i * stride, num, nullptr).norm();
}

// The place of the first number that none is larger than; 0 where none is a number.
void cpinfer_likeliest(const float* scores, int64_t rows, int64_t num, int64_t stride, int64_t threads,
                       int64_t* tokens) {
#pragma omp parallel for num_threads(used(threads, rows))
    for (int64_t i = 0; i < rows; ++i) {
        const float *row = scores + i * stride, *end = row + num, *place = std::find(row, end, largest_of(row, num));
        tokens[i] = place == end ? 0 : place - row;
    }
}
}
