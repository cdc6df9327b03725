/* The screened forward of the tail-corrected backward on a CPU (screen.cpp), for ctypes. A call is one thread's work: the
 * caller shares it out. */
#ifndef LOGITLESS_SCREEN_H
#define LOGITLESS_SCREEN_H

#include <stdint.h>

#define LOGITLESS_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum logitless_screen_dtype {
    LOGITLESS_SCREEN_FLOAT32 = 0,
    LOGITLESS_SCREEN_BFLOAT16 = 1,
    LOGITLESS_SCREEN_FLOAT16 = 2
};

struct logitless_screen {
    /* in */
    const void *hidden;     /* [N, depth] */
    const void *weight;     /* [vocabulary, depth] */
    const float *bias;      /* [vocabulary], or null */
    const int64_t *targets; /* [N], in [0, vocabulary) */
    const int64_t *order;   /* [vocabulary], the entry at each place of the panels; null: as they stand in the head */
    const int64_t *places;  /* [N], the targets' places */
    const int32_t *panels;  /* [vocabulary up to a multiple of 16, (depth + 1) / 2], from logitless_screen_pack */
    const float *units;     /* [vocabulary up to a multiple of 16], from there, times slope */
    const float *offset;    /* likewise, by place: slope times bias; -inf beyond the vocabulary */
    int64_t vocabulary, depth, hidden_stride, weight_stride;
    int32_t dtype;          /* of hidden and weight; their columns are contiguous */
    float slope;            /* of a logit by its raw product */
    float largest_unit;     /* of units */
    float keep;             /* probability from which an entry is kept */
    /* out */
    float *logprob, *lse;   /* [N] */
    float *rows;            /* [N, ceil(vocabulary / 256) + depth]: slope times the mass that is left, by block of places;
                               slope times the sum of p times the head's row over the kept entries */
};

/* Whether this processor has the instructions: AVX2, FMA and F16C. */
LOGITLESS_API int32_t logitless_screen_supported(void);

/* Places [first, first + count) of the head into panels and units; first is a multiple of 16. */
LOGITLESS_API void logitless_screen_pack(const void *weight, int32_t dtype, int64_t vocabulary, int64_t depth,
                                         int64_t stride, const int64_t *order, int64_t first, int64_t count,
                                         int32_t *panels, float *units);

/* Tokens [first, first + count).
 *   logits [count up to a multiple of 6, vocabulary up to one of 16]: room to work in.
 *   counts [count]: entries kept of each token, the target's not among them. columns, values [room]: them, token after
 *   token, in the order of their places; a value is slope times p.
 * Returns how many entries were kept, or -1 where there was no room for them; nothing written holds then. */
LOGITLESS_API int64_t logitless_screen_chunk(const struct logitless_screen *screen, int64_t first, int64_t count,
                                             float *logits, int32_t *counts, int32_t *columns, float *values,
                                             int64_t room);

#ifdef __cplusplus
}
#endif

#endif
