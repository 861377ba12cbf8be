// Random bits by counter: what philox.py says of them, and calls.

#include <cstdint>

extern "C" {

// places [rows, 4]: the key of each row, and the last three words of its counter. bits [rows, num].
void cpinfer_philox(const uint64_t* places, int64_t rows, int64_t num, uint64_t* bits) {
    for (int64_t row = 0; row < rows; ++row, places += 4, bits += num) {
        for (int64_t i = 0; i < num; i += 4) {
            uint64_t words[4] = {1 + static_cast<uint64_t>(i / 4), places[1], places[2], places[3]};
            uint64_t key[2] = {places[0], 0};
            for (int round = 0; round < 10; ++round) {
                unsigned __int128 first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * words[0];
                unsigned __int128 second = static_cast<unsigned __int128>(0xCA5A826395121157u) * words[2];
                words[0] = static_cast<uint64_t>(second >> 64) ^ words[1] ^ key[0];
                words[2] = static_cast<uint64_t>(first >> 64) ^ words[3] ^ key[1];
                words[1] = static_cast<uint64_t>(second);
                words[3] = static_cast<uint64_t>(first);
                key[0] += 0x9E3779B97F4A7C15u;
                key[1] += 0xBB67AE8584CAA73Bu;
            }
            for (int64_t j = i; j < num && j < i + 4; ++j) bits[j] = words[j - i];
        }
    }
}
}
