/* An adapter's tensors into its rank pages: read, digested, checked and laid out, one tensor at a time by as many
   threads as call `lay_out` with one and the same struct. `lora/compiled.py` packs it; all fields have 8 bytes. */

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "vectors.h"

#define RANKS 8   /* of a page */
#define BLOCK 64  /* out-features that are turned at a time: their ranks stay in the first level cache */
enum { F16 = 2 }; /* beside F32 and BF16 */
enum { DONE = 1, NOT_FINITE = 2, SHORTER = 3, FAILED = 1000 }; /* states of a tensor; FAILED + errno */

typedef struct {
    i64 fd, at, nbytes;         /* bytes from `at` of a file, or with fd -1 from the address `at` */
    i64 rows, columns, stored;  /* as stored: A [r, K], B [N, r] */
    i64 turned;                 /* whether a rank is a column (B) */
    double ratio;               /* to be multiplied with */
    char **pages;               /* where the first rank of each page belongs */
    i64 count, stride;          /* pages; bytes from one rank of a page to the next */
    unsigned char sha256[32];   /* out */
    i64 state;                  /* out; 0: not looked at, another one has failed */
} tensor;

typedef int digest(const void *, size_t, unsigned char *, unsigned int *, const void *, void *); /* EVP_Digest */

typedef struct {
    i64 dtype, count, longest; /* of the pages; tensors; bytes of the largest */
    tensor *tensors;
    _Atomic i64 next;
    _Atomic i64 failed;
    digest *digest;
    const void *sha256; /* EVP_sha256() */
} lay_out_args;

INLINE float half_to_float(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff, word;
    float value;
    if (magnitude < 0x400) /* subnormal: multiples of 2^-24 */
        value = magnitude * 5.9604644775390625e-8f;
    else {
        word = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000 : 0x38000000);
        memcpy(&value, &word, 4);
    }
    memcpy(&word, &value, 4);
    word |= sign;
    memcpy(&value, &word, 4);
    return value;
}

INLINE uint16_t float_to_half(float value) { /* to nearest, ties to even */
    uint32_t word, sign;
    memcpy(&word, &value, 4);
    sign = word >> 16 & 0x8000;
    word &= 0x7fffffff;
    if (word >= 0x7f800000)
        return sign | (word > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (word >= 0x477ff000) /* 65520 and above round to infinity */
        return sign | 0x7c00;
    if (word < 0x38800000) { /* below 2^-14 the sum's last bit is worth 2^-24 */
        float magnitude;
        memcpy(&magnitude, &word, 4);
        magnitude += 0.5f;
        memcpy(&word, &magnitude, 4);
        return sign | (word - 0x3f000000);
    }
    return sign | ((word - 0x38000000 + 0xfff + (word >> 13 & 1)) >> 13);
}

INLINE float value_of(const char *p, i64 i, int type) {
    uint16_t bits;
    uint32_t word;
    float value;
    if (type == F32) {
        memcpy(&value, p + 4 * i, 4);
        return value;
    }
    memcpy(&bits, p + 2 * i, 2);
    if (type == F16)
        return half_to_float(bits);
    word = (uint32_t)bits << 16;
    memcpy(&value, &word, 4);
    return value;
}

INLINE void put_value(char *p, i64 i, int type, float value) {
    uint16_t bits;
    uint32_t word;
    if (type == F32) {
        memcpy(p + 4 * i, &value, 4);
        return;
    }
    if (type == F16)
        bits = float_to_half(value);
    else {
        memcpy(&word, &value, 4);
        bits = value != value ? word >> 16 | 0x40 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    memcpy(p + 2 * i, &bits, 2);
}

INLINE int not_finite(const char *p, i64 count, int type) { /* whether one has an exponent of ones */
    if (type == F32) {
        uint32_t found = 0, word;
        for (i64 i = 0; i < count; i++) {
            memcpy(&word, p + 4 * i, 4);
            found |= (word & 0x7f800000) == 0x7f800000;
        }
        return found != 0;
    }
    uint16_t found = 0, bits, ones = type == F16 ? 0x7c00 : 0x7f80;
    for (i64 i = 0; i < count; i++) {
        memcpy(&bits, p + 2 * i, 2);
        found |= (bits & ones) == ones;
    }
    return found != 0;
}

/* Values in the pages' dtype, the ratio left out. */
INLINE void convert(const char *raw, char *out, i64 count, int stored, int dtype) {
    for (i64 i = 0; i < count; i++)
        put_value(out, i, dtype, value_of(raw, i, stored));
}

INLINE void turn(const char *from, char *to, i64 rows, i64 columns, i64 width) { /* one column of `rows` rows */
    if (width == 2)
        for (i64 n = 0; n < rows; n++)
            memcpy(to + 2 * n, from + 2 * n * columns, 2);
    else
        for (i64 n = 0; n < rows; n++)
            memcpy(to + 4 * n, from + 4 * n * columns, 4);
}

static void put(const tensor *t, const char *values, i64 width) { /* every rank to its place, zeros where none is */
    i64 ranks = t->turned ? t->columns : t->rows, length = t->turned ? t->rows : t->columns;
    for (i64 low = 0; low < (t->turned ? length : 1); low += BLOCK)
        for (i64 rank = 0; rank < t->count * RANKS; rank++) {
            char *to = t->pages[rank / RANKS] + rank % RANKS * t->stride;
            if (!t->turned) {
                if (rank < ranks)
                    memcpy(to, values + rank * length * width, length * width);
                else
                    memset(to, 0, length * width);
            } else if (rank < ranks)
                turn(values + (low * ranks + rank) * width, to + low * width, MIN(BLOCK, length - low), ranks, width);
            else
                memset(to + low * width, 0, MIN(BLOCK, length - low) * width);
        }
}

static i64 take(const lay_out_args *c, tensor *t, char *raw, char *converted) {
    i64 values = t->rows * t->columns, width = size(c->dtype == F32 ? F32 : BF16);
    if (t->fd < 0)
        memcpy(raw, (const char *)t->at, t->nbytes);
    else
        for (i64 have = 0; have < t->nbytes;) {
            ssize_t count = pread(t->fd, raw + have, t->nbytes - have, t->at + have);
            if (count < 0 && errno == EINTR)
                continue;
            if (count <= 0)
                return count ? FAILED + errno : SHORTER;
            have += count;
        }
    c->digest(raw, t->nbytes, t->sha256, NULL, c->sha256, NULL);
    const char *ready = raw;
    if (t->stored != c->dtype) {
        convert(raw, converted, values, t->stored, c->dtype);
        ready = converted;
    }
    if (not_finite(ready, values, c->dtype))
        return NOT_FINITE;
    if (t->ratio != 1) {
        for (i64 i = 0; i < values; i++)
            put_value(converted, i, c->dtype, value_of(raw, i, t->stored) * (float)t->ratio);
        ready = converted;
    }
    put(t, ready, width);
    return DONE;
}

int lay_out(lay_out_args *c) { /* ENOMEM, or 0: what became of each tensor stands in its state */
    char *raw = malloc(c->longest), *converted = malloc(2 * c->longest); /* float16 to float32 at the worst */
    if (raw && converted)
        for (i64 i; !c->failed && (i = atomic_fetch_add(&c->next, 1)) < c->count;) {
            c->tensors[i].state = take(c, &c->tensors[i], raw, converted);
            if (c->tensors[i].state != DONE)
                c->failed = 1;
        }
    int result = raw && converted ? 0 : ENOMEM;
    free(raw);
    free(converted);
    return result;
}
