/* An adapter's tensors into its rank pages, by several threads: each takes tensor after tensor and brings it through its
   caches a piece at a time - read, digested, checked and laid out. `lora/compiled.py` packs the structs; all fields have
   8 bytes. */

#define _POSIX_C_SOURCE 200809L /* pread */

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "vectors.h"

#define RANKS 8          /* of a page */
#define PIECE (1 << 16)  /* bytes that are read at a time, where a row of B is not longer */
#define MOST_THREADS 64  /* beside the caller's */
#define BLOCK 128        /* out-features that are turned at a time: their ranks stay in the first level cache */
enum { F16 = 2 };        /* beside F32 and BF16 */
enum { DONE = 1, NOT_FINITE = 2, SHORTER = 3, FAILED = 1000 }; /* states of a tensor; FAILED + errno */

typedef struct {
    i64 rows, columns, stored; /* as stored: A [r, K], B [N, r] */
    i64 turned;                /* whether a rank is a column (B); else a page's ranks follow each other */
    double ratio;              /* to be multiplied with */
    i64 first, pages;          /* number of its first page, and how many there are from it on */
    i64 offset, stride;        /* in bytes: where in each page it begins, from one rank to the next */
} tensor;

typedef struct {
    i64 threads, dtype, count; /* the caller's is one of them; of the pages; tensors */
    i64 widest;                /* bytes of the longest row of a B */
    const tensor *tensors;
    char **pages;
    i64 fd;        /* of the file, or -1 */
    const i64 *at; /* of each tensor: where in the file it begins, or its address */
    unsigned char (*sha256)[32]; /* out */
    i64 *state;                  /* out; 0: not looked at, another one has failed */
    _Atomic i64 next, failed;
    void *(*new_digest)(void), (*free_digest)(void *); /* EVP_MD_CTX_new and _free */
    int (*begin)(void *, const void *, void *);        /* EVP_DigestInit_ex, _Update, _Final_ex: 1 is well */
    int (*update)(void *, const void *, size_t);
    int (*end)(void *, unsigned char *, unsigned *);
    const void *algorithm; /* EVP_sha256() */
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

INLINE i64 bytes_of(int type) { return type == F32 ? 4 : 2; }

static char *place_of(const lay_out_args *c, const tensor *t, i64 rank) {
    return c->pages[t->first + rank / RANKS] + t->offset + rank % RANKS * t->stride;
}

static i64 fetch(i64 fd, i64 at, char *to, i64 nbytes) { /* 0, or what becomes of the tensor */
    if (fd < 0) {
        memcpy(to, (const char *)at, nbytes);
        return 0;
    }
    while (nbytes) {
        ssize_t count = pread(fd, to, nbytes, at);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return count ? FAILED + errno : SHORTER;
        to += count, at += count, nbytes -= count;
    }
    return 0;
}

/* `count` values from the `first` on, of B whole rows, of A what belongs to one page. */
static i64 take_piece(const lay_out_args *c, const tensor *t, i64 at, i64 first, i64 count, void *digest, char *raw) {
    i64 stored = bytes_of(t->stored), width = bytes_of(c->dtype);
    int alike = t->stored == c->dtype;
    char *converted = raw + MAX(PIECE, c->widest), *ready = converted;
    if (!t->turned) /* a page is written by nobody else, and read by nobody before all is done */
        ready = place_of(c, t, first / t->columns) + first % t->columns * width;
    char *read = alike && (!t->turned || t->ratio == 1) ? ready : raw;
    i64 state = fetch(c->fd, at + first * stored, read, count * stored);
    if (state)
        return state;
    if (c->update(digest, read, count * stored) != 1)
        return FAILED + ENOMEM;
    if (!alike)
        convert(read, ready, count, t->stored, c->dtype);
    if (not_finite(alike ? read : ready, count, c->dtype))
        return NOT_FINITE;
    if (t->ratio != 1)
        for (i64 i = 0; i < count; i++)
            put_value(ready, i, c->dtype, value_of(read, i, t->stored) * (float)t->ratio);
    if (t->turned)
        for (i64 row = first / t->columns, end = row + count / t->columns; row < end; row += BLOCK)
            for (i64 rank = 0; rank < t->columns; rank++)
                turn(ready + ((row * t->columns - first) + rank) * width, place_of(c, t, rank) + row * width,
                     MIN(BLOCK, end - row), t->columns, width);
    return 0;
}

static i64 take(const lay_out_args *c, i64 number, void *digest, char *raw) {
    const tensor *t = &c->tensors[number];
    i64 values = t->rows * t->columns, ranks = t->turned ? t->columns : t->rows, stored = bytes_of(t->stored);
    i64 most = t->turned ? MAX(1, PIECE / (t->columns * stored)) * t->columns : PIECE / stored;
    if (c->begin(digest, c->algorithm, NULL) != 1)
        return FAILED + ENOMEM;
    for (i64 first = 0, count; first < values; first += count) {
        i64 left = t->turned ? values : RANKS * t->columns - first % (RANKS * t->columns);
        count = MIN(most, MIN(left, values - first));
        i64 state = take_piece(c, t, c->at[number], first, count, digest, raw);
        if (state)
            return state;
    }
    for (i64 rank = ranks; rank < t->pages * RANKS; rank++)
        memset(place_of(c, t, rank), 0, (t->turned ? t->rows : t->columns) * bytes_of(c->dtype));
    return c->end(digest, c->sha256[number], NULL) == 1 ? DONE : FAILED + ENOMEM;
}

static void *work(void *shared) { /* what is not NULL where there is no memory to work with */
    lay_out_args *c = shared;
    char *raw = malloc(3 * MAX(PIECE, c->widest)); /* and as many values converted, float16 to float32 at the worst */
    void *digest = c->new_digest(), *failed = raw && digest ? NULL : c;
    if (!failed)
        for (i64 i; !c->failed && (i = atomic_fetch_add(&c->next, 1)) < c->count;) {
            c->state[i] = take(c, i, digest, raw);
            if (c->state[i] != DONE)
                c->failed = 1;
        }
    free(raw);
    c->free_digest(digest);
    return failed;
}

int lay_out(lay_out_args *c) { /* ENOMEM, or 0: what became of each tensor stands in its state */
    static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; /* one load at a time: threads are bounded, not those of one */
    pthread_t others[MOST_THREADS];
    i64 count = 0;
    pthread_mutex_lock(&turn);
    while (count < MIN(c->threads - 1, MOST_THREADS) && !pthread_create(&others[count], NULL, work, c))
        count++;
    void *failed = work(c), *other_failed;
    for (i64 i = 0; i < count; i++) {
        pthread_join(others[i], &other_failed);
        failed = other_failed ? failed : NULL; /* one that could work has done all */
    }
    pthread_mutex_unlock(&turn);
    return failed ? ENOMEM : 0;
}
