/* attention of few queries over paged keys: split over keys (FlashDecoding), merged after.

   A sequence's result is the same whatever else is in the batch and whatever the number of threads. native.py packs the
   fields of attention_args, all of 8 bytes, in their order. */

#include <stdlib.h>

#include "dots.h"
#include "threads.h"

#define KEYS 256      /* of one part: fixed, so that a result does not depend on threads or batch mates */
#define MAX_QUERIES 8 /* of one sequence; native.py leaves longer ones to the reference */
#define WIDE (LANES == 16 ? 4 : 2)

typedef struct {
    i64 threads, type, B, H, G, D, page_size, max_pages, window;
    const char *q, *k_cache, *v_cache; /* [T, H, D], [P, page_size, G, D] */
    const int32_t *tables, *lengths, *starts; /* [B, max_pages], [B], [B + 1] */
    char *out;                                /* [T, H, D] */
    const float *sinks; /* [H]: the score of a key that has no value, or NULL */
    double scale, cap; /* cap > 0: scores are cap * tanh(score / cap) */
} attention_args;

typedef struct {
    i64 queries, first, parts; /* of one sequence: its first part begins at key `first` * KEYS */
    float *partial;            /* [parts, queries * H, D + 2]: sum of weights times values, maximum, sum of weights */
} sequence;

typedef struct {
    const attention_args *args;
    sequence *sequences;
} attention_job;

INLINE void add_values(rows v, int type, const float *weights, i64 keys, i64 d, int wide, int queries, float *out,
                       i64 ld) {
    /* out[i * ld + d ...] = sum over keys of weights[i, key] v[key, d ...] for `wide` registers of values */
    vec acc[4][4] = {0};
    for (i64 key = 0; key < keys; key++) {
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) {
            vec value = load(v[key], d + j * LANES, type);
#pragma GCC unroll 4
            for (int i = 0; i < queries; i++)
                acc[i][j] += value * weights[i * KEYS + key];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++)
            memcpy(out + i * ld + d + j * LANES, &acc[i][j], sizeof(vec));
}

INLINE void all_values(rows v, int type, const float *weights, i64 keys, i64 D, int queries, float *out, i64 ld) {
    i64 d = 0;
    for (; d + WIDE * LANES <= D; d += WIDE * LANES)
        add_values(v, type, weights, keys, d, WIDE, queries, out, ld);
    for (; d < D; d += LANES)
        add_values(v, type, weights, keys, d, 1, queries, out, ld);
}

INLINE void attend(const attention_args *c, int type, const sequence *s, i64 b, i64 part, i64 group) {
    const char *k[KEYS + 3], *v[KEYS + 3];
    i64 width = c->D * size(type), shared = c->H / c->G, length = c->lengths[b];
    i64 low = (s->first + part) * KEYS, keys = MIN(length - low, KEYS);
    const int32_t *page = c->tables + b * c->max_pages + low / c->page_size;
    for (i64 key = 0, offset = low % c->page_size; key < keys; key++, offset++) {
        if (offset == c->page_size) {
            page++;
            offset = 0;
        }
        i64 at = ((*page * c->page_size + offset) * c->G + group) * width;
        k[key] = c->k_cache + at;
        v[key] = c->v_cache + at;
    }
    v[keys] = v[keys + 1] = v[keys + 2] = v[keys - 1];
    k[keys] = k[keys + 1] = k[keys + 2] = k[keys - 1]; /* scores are taken four at a time */
    for (i64 first = 0; first < s->queries * shared; first += 4) {
        float weights[4 * KEYS] __attribute__((aligned(64)));
        const char *q[4];
        int queries = (int)MIN(4, s->queries * shared - first);
        float *out = s->partial + (part * s->queries * c->H + group * s->queries * shared + first) * (c->D + 2);
        for (int i = 0; i < queries; i++) {
            i64 query = c->starts[b] + (first + i) / shared, head = group * shared + (first + i) % shared;
            q[i] = c->q + (query * c->H + head) * width;
        }
        for (i64 key = 0; key < keys; key += 4) {
            for (i64 i = 0; first == 0 && i < 4; i++) {
                prefetch(k[MIN(key + 32 + i, keys)], width);
                prefetch(v[key + i], width);
            }
            DOTS_OF[type][type](k + key, q, c->D, queries, weights + key, KEYS, k[key]);
        }
        for (int i = 0; c->cap > 0 && i < queries; i++)
            for (i64 key = 0; key < keys; key += LANES) { /* tanh x = 1 - 2 / (e^2x + 1), which x of any size survives */
                vec score, one = (vec){0} + 1.0f;
                memcpy(&score, weights + i * KEYS + key, sizeof score);
                score = one - 2.0f / (exponential(score * (float)(2 * c->scale / c->cap)) + 1.0f);
                score *= (float)(c->cap / c->scale);
                memcpy(weights + i * KEYS + key, &score, sizeof score);
            }
        for (int i = 0; i < queries; i++) {
            float *w = weights + i * KEYS, top = -INFINITY;
            i64 end = length - s->queries + (first + i) / shared + 1 - low; /* keys that this query sees: from, end */
            i64 from = c->window > 0 ? MAX(end - c->window, 0) : 0;
            vec zero = {0}, total = zero, best = zero - INFINITY;
            end = MIN(end, keys);
            for (i64 key = 0; key < MIN(from, keys); key++)
                w[key] = -INFINITY;
            for (i64 key = MAX(end, 0); key < (keys + LANES - 1) / LANES * LANES; key++)
                w[key] = -INFINITY;
            for (i64 key = 0; key < keys; key += LANES) {
                vec score = load((char *)(w + key), 0, F32);
                best = pick((word)(score > best), score, best);
            }
            for (int lane = 0; lane < LANES; lane++)
                top = MAX(top, best[lane]);
            for (i64 key = 0; key < keys; key += LANES) {
                vec score = load((char *)(w + key), 0, F32);
                vec weight = pick((word)(score == -INFINITY), zero, exponential((score - top) * (float)c->scale));
                total += weight;
                memcpy(w + key, &weight, sizeof weight);
            }
            out[i * (c->D + 2) + c->D] = top * (float)c->scale;
            out[i * (c->D + 2) + c->D + 1] = sum(total);
        }
        switch (queries) {
        case 1: all_values(v, type, weights, keys, c->D, 1, out, c->D + 2); break;
        case 2: all_values(v, type, weights, keys, c->D, 2, out, c->D + 2); break;
        case 3: all_values(v, type, weights, keys, c->D, 3, out, c->D + 2); break;
        case 4: all_values(v, type, weights, keys, c->D, 4, out, c->D + 2); break;
        }
    }
}

INLINE void merge(const attention_args *c, int type, const sequence *s, i64 b, i64 row) {
    i64 shared = c->H / c->G, group = row / (s->queries * shared), i = row % (s->queries * shared);
    i64 query = c->starts[b] + i / shared, head = group * shared + i % shared, ld = s->queries * c->H * (c->D + 2);
    const float *part = s->partial + row * (c->D + 2);
    float top = c->sinks ? c->sinks[head] : -INFINITY, total = 0;
    vec zero = {0};
    for (i64 p = 0; p < s->parts; p++)
        top = MAX(top, part[p * ld + c->D]);
    if (c->sinks)
        total = exponential(zero + c->sinks[head] - top)[0];
    for (i64 p = 0; p < s->parts; p++)
        total += part[p * ld + c->D + 1] * exponential(zero + part[p * ld + c->D] - top)[0];
    for (i64 d = 0; d < c->D; d += LANES) {
        vec out = zero;
        for (i64 p = 0; p < s->parts; p++)
            out += load((const char *)(part + p * ld), d, F32) * exponential(zero + part[p * ld + c->D] - top);
        store_some(c->out + (query * c->H + head) * c->D * size(type), d, type, out / total, LANES);
    }
}

static void attention_worker(void *argument, int thread, int threads) {
    const attention_job *job = argument;
    const attention_args *c = job->args;
    i64 unit = 0;
    for (i64 b = 0; b < c->B; b++)
        for (i64 i = 0; i < job->sequences[b].parts * c->G; i++) {
            if (unit++ % threads != thread)
                continue;
            if (c->type == BF16)
                attend(c, BF16, job->sequences + b, b, i / c->G, i % c->G);
            else
                attend(c, F32, job->sequences + b, b, i / c->G, i % c->G);
        }
    meet();
    unit = 0;
    for (i64 b = 0; b < c->B; b++)
        for (i64 row = 0; row < job->sequences[b].queries * c->H; row++) {
            if (unit++ % threads != thread)
                continue;
            if (c->type == BF16)
                merge(c, BF16, job->sequences + b, b, row);
            else
                merge(c, F32, job->sequences + b, b, row);
        }
}

int attention(const attention_args *c) { /* returns how many sequences have over MAX_QUERIES, -1: no memory */
    attention_job job = {c, malloc(c->B * sizeof(sequence))};
    i64 floats = 0, work = 0;
    int left = 0;
    if (!job.sequences)
        return -1;
    for (i64 b = 0; b < c->B; b++) {
        sequence *s = job.sequences + b;
        i64 queries = c->starts[b + 1] - c->starts[b], length = c->lengths[b];
        s->queries = queries <= MAX_QUERIES ? queries : 0;
        left += queries > MAX_QUERIES;
        s->first = c->window > 0 ? MAX(length - queries + 1 - c->window, 0) / KEYS : 0;
        s->parts = s->queries ? (length - s->first * KEYS + KEYS - 1) / KEYS : 0;
        floats += s->parts * s->queries * c->H * (c->D + 2);
        work += s->queries * c->H * c->D * (length - s->first * KEYS);
    }
    float *partial = malloc((floats + 1) * sizeof(float));
    if (!partial) {
        free(job.sequences);
        return -1;
    }
    floats = 0;
    for (i64 b = 0; b < c->B; b++) {
        job.sequences[b].partial = partial + floats;
        floats += job.sequences[b].parts * job.sequences[b].queries * c->H * (c->D + 2);
    }
    launch(attention_worker, &job, work < SERIAL ? 1 : c->threads);
    free(partial);
    free(job.sequences);
    return left;
}
