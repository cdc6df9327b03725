/* liblogitless_cpu in plain C, for ctypes. A call is one thread's work: the caller shares tokens or rows out.
 *
 * Every function exists once for each set of instructions (`set`, one that logitless_cpu_sets reports). */
#ifndef LOGITLESS_CPU_H
#define LOGITLESS_CPU_H

#include <stdint.h>

#define LOGITLESS_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum logitless_cpu_dtype {
    LOGITLESS_CPU_FLOAT32 = 0,
    LOGITLESS_CPU_BFLOAT16 = 1,
    LOGITLESS_CPU_FLOAT16 = 2
};

enum logitless_cpu_set {
    LOGITLESS_CPU_AVX2 = 0,        /* AVX2, FMA, F16C */
    LOGITLESS_CPU_AVX512 = 1,      /* AVX-512 F, BW, DQ, VL and VNNI */
    LOGITLESS_CPU_AVX512_BF16 = 2, /* and AVX512-BF16 */
    LOGITLESS_CPU_AMX = 3          /* and AMX's tiles of bfloat16, which the kernel has to permit */
};

/* The sparse forward of some tokens (stream.h). */
struct logitless_stream {
    /* in */
    const void *hidden;     /* [N, depth] */
    const void *weight;     /* [vocabulary, depth] */
    const float *bias;      /* [vocabulary], or null */
    const int64_t *targets; /* [N], in [0, vocabulary) */
    const int64_t *order;   /* [vocabulary], the entry at each place of the tail's blocks; null: as they stand */
    const int64_t *places;  /* [N], the targets' places */
    const float *units;     /* [vocabulary] by entry, from logitless_cpu_units; null: products of full precision */
    int64_t vocabulary, depth, hidden_stride, weight_stride;
    int32_t dtype;          /* of hidden and weight; their columns are contiguous */
    float slope;            /* of a logit by its raw product */
    float largest_unit;     /* of units; 0 without them */
    float keep;             /* probability from which an entry is kept */
    /* out */
    float *logprob, *lse;   /* [N] */
    float *rows;            /* [N, ceil(vocabulary / 256) + depth]: slope times the mass that is left, by block of places;
                               slope times the sum of p times the head's row over the kept entries */
};

/* The head's gradient from entries (spread.h). */
struct logitless_spread {
    const void *hidden;     /* [N, depth] */
    const int64_t *order;   /* as above */
    const int64_t *starts;  /* [blocks + 1]: where each block's entries begin in token, column and value */
    const int32_t *token, *column;
    const float *value;
    const float *tail;      /* [blocks, depth]: what each entry of a block gets, times its share */
    const float *share;     /* [vocabulary] by entry */
    float *out;             /* [vocabulary, depth] */
    int64_t vocabulary, depth, hidden_stride, out_stride;
    int32_t dtype;          /* of hidden */
    int32_t add;            /* whether `out` is added to, or overwritten */
};

/* Entries in the order of their blocks, each times a factor of its token (library.cpp). */
struct logitless_route {
    const int32_t *counts;  /* [N] entries of each token; below 0: none */
    const int32_t *column;  /* [K] */
    const float *value;     /* [K] */
    const float *factor;    /* [N] */
    const int32_t *block;   /* [vocabulary] of each entry */
    int32_t *out_token, *out_column;
    float *out_value;       /* [as many as stay]; all three null: count them */
    float *tail;            /* [N, blocks] what does not stay is added to, as it is counted */
    int64_t tail_stride;
    float threshold;        /* the size from which an entry stays */
};

/* Bit s is set if this processor, and its operating system, can run set s. */
LOGITLESS_API int32_t logitless_cpu_sets(void);

/* Whether the library's float32 products lead a math library's: on AMD's processors with AVX-512, which Intel's MKL, and so
 * PyTorch, multiplies with AVX2 on. */
LOGITLESS_API int32_t logitless_cpu_leads(int32_t set);

/* Whether the products of a stream over operands of this dtype have an error beyond float32's, and so need units. */
LOGITLESS_API int32_t logitless_cpu_screens(int32_t set, int32_t dtype);

/* The unit of each of `count` rows: its norm over the largest integer's. NaN where the norm is not finite. */
LOGITLESS_API void logitless_cpu_units(int32_t set, const void *rows, int32_t dtype, int64_t count, int64_t depth,
                                       int64_t stride, float *units);

/* Tokens [first, first + count).
 *   counts [count]: entries kept of each token, the target's not among them. columns, values [room]: them, token after
 *   token, in the order of their places; a value is slope times p.
 * Returns how many entries were kept, -1 where there was no room for them, or -2 where there was no memory; nothing
 * written holds then. */
LOGITLESS_API int64_t logitless_cpu_stream(int32_t set, const struct logitless_stream *stream, int64_t first,
                                           int64_t count, int32_t *counts, int32_t *columns, float *values,
                                           int64_t room);

/* Tokens [first, first + count), whose entries begin at `start`. next [blocks]: counts those that stay of each block; or
 * where the next one of each goes, and so where the one after goes. */
LOGITLESS_API void logitless_cpu_route(const struct logitless_route *route, int64_t first, int64_t count,
                                       int64_t start, int64_t *next);

/* Blocks [first, last) of the vocabulary. */
LOGITLESS_API void logitless_cpu_spread(int32_t set, const struct logitless_spread *spread, int64_t first,
                                        int64_t last);

/* out [rows, columns] (row stride out_stride) = or += a [rows, depth] b [depth, columns] in float32.
 *   a, b: of float32, or both of bfloat16; element (i, k) of a is at i a_row + k a_column, of b at k b_row + j b_column.
 *   bfloat16: a_column and b_row are 1 with AMX. A set without instructions for bfloat16 does not take it.
 * Returns 0, or -2 where there was no memory. */
LOGITLESS_API int32_t logitless_cpu_product(int32_t set, int32_t dtype, const void *a, int64_t a_row, int64_t a_column,
                                            const void *b, int64_t b_row, int64_t b_column, float *out,
                                            int64_t out_stride, int64_t rows, int64_t columns, int64_t depth,
                                            int32_t add);

/* A chunk of raw products, vocabulary-major: z [vocabulary, count], row stride `stride`.
 *   z becomes e = exp(slope (z + bias) - top), 0 at the target and below 2^-125, with top the largest logit;
 *   or that goes in bfloat16 to `narrow` (same shape and stride), and z is undefined.
 *   target_logit [count]. moments [5, count], row stride moments_stride: top, the sum of those e that are 1, that of the rest,
 *   the sums of e log e (0 unless want has 1) and of e^2 (0 unless want has 2). slope is positive. */
LOGITLESS_API void logitless_cpu_measure(int32_t set, float *z, int64_t stride, int64_t vocabulary, int64_t count,
                                         const float *bias, float slope, const int64_t *targets, int32_t want,
                                         uint16_t *narrow, float *target_logit, float *moments, int64_t moments_stride);

#ifdef __cplusplus
}
#endif

#endif
