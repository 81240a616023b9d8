// What attention_bfloat16.cpp and attention_float.cpp are told of heads, and the memory they work in.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "numbers.h"

// Numbers from one sample, head and row of [batch heads length width] to the next; the width is dense.
struct Place {
    int64_t batch, head, row;
};

struct Heads {
    int64_t batch, heads, queries, keys, width;
    Place query, key, value, out;  // gradients lie as what they are of: of_query as query, ...
    int64_t mask_batch, mask_head, mask_query, mask_key;
};

// Minus infinity in place of the scores of what may not be seen, or is no key.
INLINE void hide(const Heads &shape, const uint8_t *mask, int64_t rows, int64_t keys, float *scores) {
    for (int64_t i = 0; i < rows; i++) {
        float *row = scores + i * keys;
        for (int64_t j = shape.keys; j < keys; j++) row[j] = -INFINITY;
        if (mask)
            for (int64_t j = 0; j < shape.keys; j++)
                if (!mask[i * shape.mask_query + j * shape.mask_key]) row[j] = -INFINITY;
    }
}

INLINE const uint8_t *masked(const Heads &s, const uint8_t *mask, int64_t b, int64_t h, int64_t q) {
    return mask ? mask + b * s.mask_batch + h * s.mask_head + q * s.mask_query : nullptr;
}

INLINE int64_t begin(const Place &place, int64_t b, int64_t h) { return b * place.batch + h * place.head; }

// Cuts one piece of memory, which each thread keeps, into parts.
class Room {
  public:
    explicit Room(int64_t words) {
        static thread_local std::vector<unsigned char> kept;
        if (int64_t(kept.size()) < WORD * words) kept.resize(WORD * words);
        next = kept.data();
    }
    template <class T>
    T *take(int64_t words) {
        T *begin = reinterpret_cast<T *>(next);
        next += WORD * words;
        return begin;
    }

  private:
    static constexpr int64_t WORD = 4;  // bytes of a float, and of a pair
    unsigned char *next;
};
