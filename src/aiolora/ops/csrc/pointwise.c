/* Element by element, a row of the batch at a time: norm, gate_mul, rope_store. native.py packs the fields of the
   `_args`, all of 8 bytes, in their order. */

#include "threads.h"
#include "vectors.h"

typedef struct {
    i64 threads, type, T, H;
    const char *residual, *y, *bias; /* [T, H], [T, H] or null (rms_norm: residual is x), [H] or null */
    const char *weight;
    char *out, *total; /* [T, H]; total is null where y is */
    double eps, offset; /* of the weight */
} norm_args;

INLINE void norm_row(const norm_args *c, int type, i64 row) {
    i64 at = row * c->H * size(type);
    const char *x = c->residual + at;
    char *out = c->out + at;
    vec squares = {0};
    if (c->y) { /* the new residual, as rounded as it is stored */
        char *total = c->total + at;
        for (i64 i = 0; i < c->H; i += LANES) {
            vec value = load_some(c->y + at, i, type, c->H - i);
            if (c->bias)
                value += load_some(c->bias, i, type, c->H - i);
            store_some(total, i, type, value + load_some(x, i, type, c->H - i), c->H - i);
        }
        x = total;
    }
    for (i64 i = 0; i < c->H; i += LANES) {
        vec value = load_some(x, i, type, c->H - i);
        squares += value * value;
    }
    float scale = 1.0f / sqrtf(sum(squares) / c->H + (float)c->eps);
    for (i64 i = 0; i < c->H; i += LANES) {
        vec value = load_some(x, i, type, c->H - i);
        value *= load_some(c->weight, i, type, c->H - i) + (float)c->offset;
        store_some(out, i, type, value * scale, c->H - i);
    }
}

static void norm_worker(void *argument, int thread, int threads) {
    const norm_args *c = argument;
    i64 low, high;
    span(c->T, thread, threads, &low, &high);
    for (i64 t = low; t < high; t++)
        if (c->type == BF16)
            norm_row(c, BF16, t);
        else
            norm_row(c, F32, t);
}

int norm(norm_args *c) {
    launch(norm_worker, c, c->T * c->H < SERIAL ? 1 : c->threads);
    return 0;
}

typedef struct {
    i64 threads, type, T, I;
    const char *y, *bias; /* [T, 2 I] = (gate, up), [2 I] or null */
    char *out;            /* [T, I] */
    i64 gelu;             /* tanh's approximation of GELU, x * sigmoid(2 u), in the place of SiLU, x * sigmoid(x) */
} gate_args;

INLINE void gate_row(const gate_args *c, int type, i64 row) {
    const char *gate = c->y + row * 2 * c->I * size(type), *up = gate + c->I * size(type);
    for (i64 i = 0; i < c->I; i += LANES) {
        vec g = load_some(gate, i, type, c->I - i), u = load_some(up, i, type, c->I - i);
        if (c->bias) {
            g += load_some(c->bias, i, type, c->I - i);
            u += load_some(c->bias + c->I * size(type), i, type, c->I - i);
        }
        vec open = c->gelu ? g * (g * g * 0.0713548162726f + 1.5957691216057f) : g;
        store_some(c->out + row * c->I * size(type), i, type, g / (exponential(-open) + 1.0f) * u, c->I - i);
    }
}

static void gate_worker(void *argument, int thread, int threads) {
    const gate_args *c = argument;
    i64 low, high;
    span(c->T, thread, threads, &low, &high);
    for (i64 t = low; t < high; t++)
        if (c->type == BF16)
            gate_row(c, BF16, t);
        else
            gate_row(c, F32, t);
}

int gate_mul(gate_args *c) {
    launch(gate_worker, c, c->T * c->I < SERIAL ? 1 : c->threads);
    return 0;
}

#define MAX_HEAD 512 /* as MAX_HEAD_DIM in native.py */

typedef struct {
    i64 threads, type, T, H, G, D, R;
    const char *y, *bias;          /* [T, (H + 2 G) D], [(H + 2 G) D] or null */
    const char *q_norm, *k_norm;   /* [D] or null */
    const float *cos_sin;          /* [positions, R]: the first R of a head's D are rotated */
    const int32_t *positions, *slots; /* [T] */
    char *q, *k_cache, *v_cache;   /* [T, H, D], [slots, G, D] */
    double eps, offset;            /* of the norms */
} rope_args;

INLINE void rope_token(const rope_args *c, int type, i64 t) {
    i64 D = c->D, R = c->R, middle = R / 2, slot = c->slots[t];
    const char *cos_row = (const char *)(c->cos_sin + c->positions[t] * R);
    for (i64 head = 0; head < c->H + 2 * c->G; head++) {
        float values[MAX_HEAD];
        char *x = (char *)values, *out;
        const char *weight = head < c->H ? c->q_norm : head < c->H + c->G ? c->k_norm : 0;
        vec squares = {0};
        if (head < c->H)
            out = c->q + (t * c->H + head) * D * size(type);
        else if (slot < 0)
            return;
        else if (head < c->H + c->G)
            out = c->k_cache + (slot * c->G + head - c->H) * D * size(type);
        else
            out = c->v_cache + (slot * c->G + head - c->H - c->G) * D * size(type);
        for (i64 i = 0; i < D; i += LANES) {
            vec value = load_some(c->y + t * (c->H + 2 * c->G) * D * size(type), head * D + i, type, D - i);
            if (c->bias)
                value += load_some(c->bias, head * D + i, type, D - i);
            squares += value * value;
            store_some(x, i, F32, value, D - i);
        }
        if (weight) {
            float scale = 1.0f / sqrtf(sum(squares) / D + (float)c->eps);
            for (i64 i = 0; i < D; i += LANES) {
                vec gain = load_some(weight, i, type, D - i) + (float)c->offset;
                store_some(x, i, F32, load_some(x, i, F32, D - i) * scale * gain, D - i);
            }
        }
        for (i64 i = head < c->H + c->G ? R : 0; i < D; i += LANES)
            store_some(out, i, type, load_some(x, i, F32, D - i), D - i);
        if (head >= c->H + c->G)
            continue;
        for (i64 i = 0; i < middle; i += LANES) {
            vec low = load_some(x, i, F32, middle - i), high = load_some(x, middle + i, F32, middle - i);
            vec cosine = load_some(cos_row, i, F32, middle - i), sine = load_some(cos_row, middle + i, F32, middle - i);
            store_some(out, i, type, low * cosine - high * sine, middle - i);
            store_some(out, middle + i, type, high * cosine + low * sine, middle - i);
        }
    }
}

static void rope_worker(void *argument, int thread, int threads) {
    const rope_args *c = argument;
    i64 low, high;
    span(c->T, thread, threads, &low, &high);
    for (i64 t = low; t < high; t++)
        if (c->type == BF16)
            rope_token(c, BF16, t);
        else
            rope_token(c, F32, t);
}

int rope_store(rope_args *c) {
    launch(rope_worker, c, c->T * (c->H + 2 * c->G) * c->D < SERIAL ? 1 : c->threads);
    return 0;
}
