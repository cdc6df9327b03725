/* Calls the kernels over shapes that take every path, on memory allocated to the byte: what the
 * sanitizers watch. It checks that a row's gradient sums to zero; the tests in Python check the rest. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../logitless.h"

static uint64_t state = 88172645463325252u;

/* In [0, 1). */
static double uniform(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}

static void require(int32_t code, const char *what) {
    if (code == LOGITLESS_DONE) return;
    fprintf(stderr, "%s: %s\n", what, logitless_explain(code));
    exit(1);
}

static void *memory(int64_t bytes) {
    void *made = malloc(bytes > 0 ? (size_t)bytes : 1);
    if (made == NULL) exit(2);
    return made;
}

static float *vector(int64_t rows) { return memory(rows * (int64_t)sizeof(float)); }

/* The sum of bfloat16 or float32 entries. */
static double row_sum(const void *row, int64_t columns, int32_t dtype) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) {
        union {
            uint32_t bits;
            float value;
        } x;
        x.bits = dtype == LOGITLESS_FLOAT32 ? ((const uint32_t *)row)[j] : (uint32_t)((const uint16_t *)row)[j] << 16;
        sum += (double)x.value;
    }
    return sum;
}

static void chunk(int64_t rows, int64_t vocabulary, int64_t stride, int64_t block, double softcap, int32_t gradient) {
    const int64_t blocks = block ? (vocabulary + block - 1) / block : 0;
    float *raw = vector((rows - 1) * stride + vocabulary), *bias = vector(vocabulary), *found[6], *ones = vector(rows);
    float *block_lse = blocks ? vector(rows * blocks) : NULL, *target_gradient = vector(rows);
    int64_t *targets = memory(rows * (int64_t)sizeof(int64_t));
    const int64_t bytes = logitless_measure_workspace(rows, vocabulary, LOGITLESS_FLOAT32);
    void *workspace = memory(bytes);
    for (int k = 0; k < 6; ++k) found[k] = vector(rows);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < vocabulary; ++j) raw[i * stride + j] = (float)(8 * uniform() - 4);
        targets[i] = (int64_t)(uniform() * (double)vocabulary);
        ones[i] = 1;
    }
    for (int64_t j = 0; j < vocabulary; ++j) bias[j] = (float)uniform();
    require(logitless_measure(raw, LOGITLESS_FLOAT32, rows, vocabulary, stride, bias, targets, 0.5, softcap, 2.0, found[0],
                              found[1], found[2], found[3], found[4], found[5], block_lse, blocks, block, workspace,
                              bytes, 0, NULL),
            "measure");
    require(logitless_gradient(raw, LOGITLESS_FLOAT32, rows, vocabulary, stride, bias, targets, 0.5, softcap, 2.0, found[0],
                               found[1], found[2], ones, NULL, NULL, NULL, target_gradient, gradient, 0, NULL),
            "gradient");
    for (int64_t i = 0; i < rows && softcap == 0; ++i) {
        const double sum = row_sum(raw + i * stride, vocabulary, gradient) + (double)target_gradient[i];
        if (!(fabs(sum) < (gradient == LOGITLESS_FLOAT32 ? 1e-5 : 1e-2))) {
            fprintf(stderr, "row %ld of %ld: the gradient sums to %g\n", (long)i, (long)vocabulary, sum);
            exit(1);
        }
    }
    for (int k = 0; k < 6; ++k) free(found[k]);
    free(raw), free(bias), free(ones), free(block_lse), free(target_gradient), free(targets), free(workspace);
}

static void merge(int64_t parts, int64_t rows, int32_t count) {
    float *moments = vector(parts * count * rows), *target = vector(rows), *lse = vector(rows);
    float *block_lse = vector(rows * parts);
    for (int64_t i = 0; i < parts * count * rows; ++i) moments[i] = (float)uniform();
    for (int64_t i = 0; i < rows; ++i) target[i] = (float)uniform();
    require(logitless_merge(moments, target, LOGITLESS_FLOAT32, parts, count, rows, parts * 7, NULL, lse, NULL, NULL, NULL,
                            NULL, block_lse, parts, 0, NULL),
            "merge");
    free(moments), free(target), free(lse), free(block_lse);
}

static uint16_t *halves(int64_t count) {
    uint16_t *made = memory(count * 2);
    for (int64_t k = 0; k < count; ++k) {
        union {
            float value;
            uint32_t bits;
        } x;
        x.value = (float)(2 * uniform() - 1);
        made[k] = (uint16_t)(x.bits >> 16);
    }
    return made;
}

/* The fused forward, and the sparse backward of what it left, whose two sums of d_hidden agree. */
static void fused(int64_t rows, int64_t vocabulary, int64_t depth, int32_t count, int64_t raw_stride) {
    const int64_t parts = (vocabulary + 127) / 128, spans = (rows + 127) / 128;
    uint16_t *hidden = halves(rows * depth), *weight = halves(vocabulary * depth), *gradient = memory(rows * parts * 256);
    float *moments = vector(parts * count * rows), *raw = vector(rows * raw_stride), *target_logit = vector(rows);
    float *lse = vector(rows), *ones = vector(rows);
    float *block_lse = vector(rows * parts), *tail = vector(rows * parts), *d_weight = vector(vocabulary * depth);
    float *d_hidden[2], threshold = 0.1f;
    int64_t *targets = memory(rows * (int64_t)sizeof(int64_t));
    int32_t *starts = memory((parts * spans + 1) * 4), *tokens = memory(rows * parts * 4);
    for (int64_t i = 0; i < rows; ++i) {
        targets[i] = (int64_t)(uniform() * (double)vocabulary);
        ones[i] = 1;
    }
    require(logitless_forward_sm80(hidden, weight, LOGITLESS_BFLOAT16, rows, vocabulary, depth, depth, depth, NULL,
                                   targets, 1.0, 0.0, 1.0, moments, count, target_logit, raw, raw_stride, 0, NULL),
            "forward_sm80");
    require(logitless_merge(moments, target_logit, LOGITLESS_FLOAT32, parts, count, rows, vocabulary, NULL, lse, NULL, NULL,
                            NULL, NULL, block_lse, parts, 0, NULL),
            "merge");
    require(logitless_route(block_lse, parts, lse, ones, &threshold, rows, parts, starts, tokens, tail, parts, 0, NULL),
            "route");
    require(logitless_sparse_gradient(hidden, weight, rows, vocabulary, depth, depth, depth, NULL, targets, 1.0, 0.0, 1.0,
                                      lse, NULL, ones, NULL, NULL, starts, tokens, 0, parts, gradient, rows * parts, 0,
                                      NULL),
            "sparse_gradient");
    for (int64_t k = 0; k < vocabulary * depth; ++k) d_weight[k] = 0;
    require(logitless_sparse_d_weight(gradient, hidden, rows, vocabulary, depth, depth, starts, tokens, 0, parts, d_weight,
                                      depth, 0, NULL),
            "sparse_d_weight");
    for (int32_t ordered = 0; ordered < 2; ++ordered) {
        d_hidden[ordered] = vector(rows * depth);
        for (int64_t k = 0; k < rows * depth; ++k) d_hidden[ordered][k] = 0;
        require(logitless_sparse_d_hidden(gradient, weight, rows, vocabulary, depth, depth, starts, tokens, 0, parts,
                                          ordered, d_hidden[ordered], depth, 0, NULL),
                "sparse_d_hidden");
    }
    for (int64_t k = 0; k < rows * depth; ++k)
        if (!(fabs((double)(d_hidden[0][k] - d_hidden[1][k])) < 1e-5)) {
            fprintf(stderr, "d_hidden[%ld]: %g and, ordered, %g\n", (long)k, (double)d_hidden[0][k],
                    (double)d_hidden[1][k]);
            exit(1);
        }
    free(hidden), free(weight), free(raw), free(gradient), free(moments), free(target_logit), free(lse), free(ones);
    free(block_lse), free(tail), free(d_weight), free(d_hidden[0]), free(d_hidden[1]), free(targets), free(starts);
    free(tokens);
}

int main(void) {
    require(logitless_check_device(0), "check_device");
    const int32_t dtypes[] = {LOGITLESS_FLOAT32, LOGITLESS_BFLOAT16};
    for (int d = 0; d < 2; ++d) {
        chunk(5, 1, 1, 0, 0.0, dtypes[d]);           /* nothing but the target */
        chunk(3, 23, 23, 32, 0.0, dtypes[d]);        /* a warp for a row, unaligned */
        chunk(2, 700, 704, 64, 0.0, dtypes[d]);      /* several steps of it, aligned, a ragged end */
        chunk(1, 3000, 3000, 0, 30.0, dtypes[d]);    /* a block for a row */
        chunk(1, 2051, 2051, 256, 0.0, dtypes[d]);   /* the same, unaligned, blocks of more than one group */
        chunk(1, 16500, 16500, 128, 0.0, dtypes[d]); /* a row cut in two */
    }
    merge(1, 1, 5);
    merge(19, 37, 5);
    merge(19, 37, 2);
    fused(3, 9, 8, 2, 9);         /* one tile, mostly beyond the edges; raw products one by one */
    fused(130, 140, 104, 5, 140); /* two each way, and more stages than shared memory holds; two at once */
    puts("swept");
    return 0;
}
