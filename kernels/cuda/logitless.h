/* The C interface of the CUDA library (and of its twin that runs the same kernels on the CPU, for the tests).
 *
 * Conventions
 *   - Every function that works returns int32_t: 0 done; negative: an argument, LOGITLESS_BAD_...; positive: a CUDA
 *     error. logitless_explain(code) is a sentence for it. Arguments are checked before anything starts.
 *   - Pointers are device memory of the GPU `device` (host memory for the twin); `stream` is a cudaStream_t. Work is
 *     queued on the stream: nothing waits, nothing is allocated, so a call may be captured into a CUDA graph, once the
 *     same call was made outside of one: the first of a kernel loads it. The calling thread's current device is
 *     `device` afterwards.
 *   - Memory is the caller's, scratch included: where a function takes `workspace`, a function of the same name with
 *     _workspace says how many bytes it must have, at least 16-byte aligned. It needs no clearing.
 *   - A pointer that may be null says so. Sizes and strides are int64_t and count elements; a matrix is row-major with
 *     unit column stride and the row stride given. Any alignment that suits the element works; 16 bytes is fast.
 *   - Types of matrices are codes, enum logitless_dtype. Vectors of statistics are float32; float64 where the matrix is.
 *   - logit_scale, softcap (0: none) and temperature are those of equation 1 of kernels/MATH.md.
 *
 * Plain C, without CUDA's headers. tests/test_cuda_library.py holds the Python signatures against this file, so a
 * declaration is: one LOGITLESS_API statement, a named argument after each type, types void, char, float, double,
 * int32_t, int64_t and pointers to them. */
#ifndef LOGITLESS_H
#define LOGITLESS_H

#include <stdint.h>

#if defined(__GNUC__)
#define LOGITLESS_VISIBLE __attribute__((visibility("default")))
#else
#define LOGITLESS_VISIBLE
#endif

#ifdef __cplusplus
#define LOGITLESS_API extern "C" LOGITLESS_VISIBLE
#else
#define LOGITLESS_API LOGITLESS_VISIBLE
#endif

enum logitless_dtype {
    LOGITLESS_FLOAT32 = 0,
    LOGITLESS_BFLOAT16 = 1,
    LOGITLESS_FLOAT16 = 2,
    LOGITLESS_FLOAT64 = 3
};

enum logitless_code {
    LOGITLESS_DONE = 0,
    LOGITLESS_BAD_DTYPE = -1,     /* a code that the function does not take, or a combination */
    LOGITLESS_BAD_SIZE = -2,      /* negative, zero where something is needed, or too large for a grid */
    LOGITLESS_BAD_STRIDE = -3,    /* a row stride below the row's length */
    LOGITLESS_BAD_POINTER = -4,   /* null where it may not be, or not aligned to its element */
    LOGITLESS_BAD_WORKSPACE = -5, /* fewer bytes than the _workspace function says */
    LOGITLESS_BAD_OPTION = -6,    /* a scale, softcap or temperature that is not positive and finite */
    LOGITLESS_BAD_DEVICE = -7,    /* a GPU that the library has no code for */
    LOGITLESS_NOT_BUILT = -8,     /* a kernel that this build leaves out */
    LOGITLESS_BAD_MOMENTS = -9,   /* a moment_count that is neither 2 nor 5, or 2 where a result needs all */
    LOGITLESS_BAD_CONFIGURATION = -10 /* a configuration that this build of the function does not have */
};

/* ------------------------------------------------------------------------------------------------ the library */

/* "cuda", or "host" for the twin. */
LOGITLESS_API const char *logitless_target(void);

/* A sentence for a code, static memory, for any number. Needs no driver. */
LOGITLESS_API const char *logitless_explain(int32_t code);

/* 0 where kernels of this library can run on the device; otherwise why not, such as a missing driver. */
LOGITLESS_API int32_t logitless_check_device(int32_t device);

/* ------------------------------------------------------------------------------------------------ chunk kernels */

/* How many bytes of workspace logitless_measure needs at most: rows of few tokens are cut into parts. */
LOGITLESS_API int64_t logitless_measure_workspace(int64_t rows, int64_t vocabulary, int32_t raw_dtype);

/* One read of a chunk's raw products: equations 3 to 10.
 *   raw [rows, vocabulary] of raw_dtype (any), stride raw_stride; bias [vocabulary], float32 (float64), may be null.
 *   targets [rows], in [0, vocabulary).
 *   Results [rows], each may be null: logprob, lse, entropy, mean_logit, correct, log_sum_sq.
 *   block_lse [rows, ceil(vocabulary / block_columns)], stride block_stride, may be null: logsumexp of each block of
 *   the vocabulary, the target left out (-inf for a block with nothing else). block_columns is a power of two, at least 32. */
LOGITLESS_API int32_t logitless_measure(const void *raw, int32_t raw_dtype, int64_t rows, int64_t vocabulary,
                                        int64_t raw_stride, const void *bias, const int64_t *targets,
                                        double logit_scale, double softcap, double temperature, void *logprob,
                                        void *lse, void *entropy, void *mean_logit, void *correct, void *log_sum_sq,
                                        void *block_lse, int64_t block_stride, int64_t block_columns,
                                        void *workspace, int64_t workspace_bytes, int32_t device, void *stream);

/* One read and one write: raw products become their gradient, in place, equations 11 to 13.
 *   raw, bias, targets and options as above. logprob, lse [rows]; entropy [rows], needed with entropy_gradient alone.
 *   Upstream gradients [rows], each may be null for zero.
 *   The gradient [rows, vocabulary] of gradient_dtype begins where raw does. Same dtype: the same rows. A half type of
 *   float32: row i begins where raw's row i does, so its stride is 2 raw_stride, and the rest of the memory of raw is
 *   left in any state. A wider type than raw's is refused. The target's entry is 0 in there, and written to
 *   target_gradient [rows] (type of the statistics). */
LOGITLESS_API int32_t logitless_gradient(void *raw, int32_t raw_dtype, int64_t rows, int64_t vocabulary,
                                         int64_t raw_stride, const void *bias, const int64_t *targets,
                                         double logit_scale, double softcap, double temperature, const void *logprob,
                                         const void *lse, const void *entropy, const void *logprob_gradient,
                                         const void *lse_gradient, const void *entropy_gradient,
                                         const void *mean_logit_gradient, void *target_gradient,
                                         int32_t gradient_dtype, int32_t device, void *stream);

/* ------------------------------------------------------------------------------------------------ fused forwards */

/* hidden [rows, depth] x weight [vocabulary, depth]^T: the moments of each part of the vocabulary, for logitless_merge, and
 * the raw products where they are asked for; otherwise these never reach memory.
 *   hidden, weight: bfloat16 or float16, of strides hidden_stride and weight_stride. Rows begin at multiples of 16 bytes,
 *   and depth and strides are multiples of 8: where they are not, a GEMM and logitless_measure do the work.
 *   bias [vocabulary], float32, may be null. targets [rows], in [0, vocabulary).
 *   moments [parts, moment_count, rows] and target_logit [rows] are written, float32. A part is 128 columns, the last one
 *   what is left; moment_count is 2 (max and sum: logprob, lse, correct and blocks) or 5 (all).
 *   raw [rows, vocabulary], float32, stride raw_stride, may be null: the products before bias and transform, what a GEMM
 *   would leave for logitless_measure and logitless_gradient.
 * logitless_forward_sm80 runs on every GPU that the library has code for. logitless_forward_sm90 runs on Hopper alone;
 * 0 is its configuration to use, and others are built for measurements. */
LOGITLESS_API int32_t logitless_forward_sm80(const void *hidden, const void *weight, int32_t dtype, int64_t rows,
                                             int64_t vocabulary, int64_t depth, int64_t hidden_stride,
                                             int64_t weight_stride, const void *bias, const int64_t *targets,
                                             double logit_scale, double softcap, double temperature, void *moments,
                                             int32_t moment_count, void *target_logit, void *raw, int64_t raw_stride,
                                             int32_t device, void *stream);

LOGITLESS_API int32_t logitless_forward_sm90(const void *hidden, const void *weight, int32_t dtype, int64_t rows,
                                             int64_t vocabulary, int64_t depth, int64_t hidden_stride,
                                             int64_t weight_stride, const void *bias, const int64_t *targets,
                                             double logit_scale, double softcap, double temperature, void *moments,
                                             int32_t moment_count, void *target_logit, void *raw, int64_t raw_stride,
                                             int32_t configuration, int32_t device, void *stream);

/* The name of a configuration of this build, "<schedule>_<tile>_<cluster>"; null beyond the last. All but number 0 take
 * bfloat16 alone, and are left out unless the build asks for them (LOGITLESS_FORWARD_CONFIGURATIONS). */
LOGITLESS_API const char *logitless_forward_sm90_configuration(int32_t index);

/* ------------------------------------------------------------------------------------------------ partial results */

/* Statistics from partial ones, by equation 4.
 *   moments [parts, moment_count, rows]: of each part of the vocabulary, of the columns other than the target, the numbers
 *   of rows.h's Moments in their order: max, sum, shifted, squares, total; -inf, 0, 0, 0, 0 for a part with none.
 *   moment_count 2: the first two alone, and entropy, mean_logit and log_sum_sq are null.
 *   target_logit [rows], finished (equation 1). vocabulary: columns in all, the target's included.
 *   dtype of all vectors: LOGITLESS_FLOAT32 or LOGITLESS_FLOAT64. Results as for logitless_measure.
 *   block_lse [rows, parts], stride block_stride, may be null: here a part is a block. */
LOGITLESS_API int32_t logitless_merge(const void *moments, const void *target_logit, int32_t dtype, int64_t parts,
                                      int32_t moment_count, int64_t rows, int64_t vocabulary, void *logprob, void *lse,
                                      void *entropy, void *mean_logit, void *correct, void *log_sum_sq,
                                      void *block_lse, int64_t block_stride, int32_t device, void *stream);

/* ------------------------------------------------------------------------------------------------ sparse backward */

/* Which pairs of a token and a block of the vocabulary a tail-corrected backward computes: those whose
 * magnitude[i] exp(block_lse[i, b] - lse[i]) is at least threshold[0] (never where it is 0, always where it is NaN).
 *   block_lse [rows, blocks], stride block_stride, without the target, as logitless_merge leaves it; lse, magnitude [rows],
 *   threshold [1]: float32, all on the device.
 *   tokens [rows blocks]: the tokens of block 0 in order, then of block 1, ...; what is beyond the list is left as it was.
 *   starts [blocks ceil(rows / 128) + 1]: where the tokens in [128 s, 128 s + 128) of block b begin, at
 *   b ceil(rows / 128) + s; the list's length at the end.
 *   tail [rows, blocks], float32, stride tail_stride, may be null: the mass of the pairs left out, 0 for the others.
 *   rows blocks is below 2^31. */
LOGITLESS_API int32_t logitless_route(const void *block_lse, int64_t block_stride, const void *lse,
                                      const void *magnitude, const void *threshold, int64_t rows, int64_t blocks,
                                      int32_t *starts, int32_t *tokens, void *tail, int64_t tail_stride, int32_t device,
                                      void *stream);

/* The listed part of dL/ds (equations 11 and 13) for blocks [first_block, first_block + block_count) of 128 columns.
 *   hidden, weight: bfloat16, with what logitless_forward_sm80 asks of them; bias, targets and options as there.
 *   lse [rows]; entropy [rows], needed with entropy_gradient alone; upstream gradients [rows], null for zero: float32. The
 *   mean logit's part, the same for all columns where no softcap bends it, is left to the caller.
 *   starts, tokens: from logitless_route, with blocks = ceil(vocabulary / 128).
 *   gradient [gradient_rows, 128], bfloat16, gradient_rows >= rows block_count: row r is that of listed pair r, counted from
 *   the first pair of first_block. The target's entry is 0; rows beyond the list are left as they were. */
LOGITLESS_API int32_t logitless_sparse_gradient(const void *hidden, const void *weight, int64_t rows,
                                                int64_t vocabulary, int64_t depth, int64_t hidden_stride,
                                                int64_t weight_stride, const void *bias, const int64_t *targets,
                                                double logit_scale, double softcap, double temperature, const void *lse,
                                                const void *entropy, const void *logprob_gradient,
                                                const void *lse_gradient, const void *entropy_gradient,
                                                const int32_t *starts, const int32_t *tokens, int64_t first_block,
                                                int64_t block_count, void *gradient, int64_t gradient_rows,
                                                int32_t device, void *stream);

/* d_weight [vocabulary, depth] += gradient^T hidden over those pairs. float32, rows at multiples of 16 bytes. */
LOGITLESS_API int32_t logitless_sparse_d_weight(const void *gradient, const void *hidden, int64_t rows,
                                                int64_t vocabulary, int64_t depth, int64_t hidden_stride,
                                                const int32_t *starts, const int32_t *tokens, int64_t first_block,
                                                int64_t block_count, void *d_weight, int64_t d_weight_stride,
                                                int32_t device, void *stream);

/* d_hidden [rows, depth] += gradient weight over those pairs. float32, rows at multiples of 16 bytes. ordered = 0: by
 * reductions in memory, in any order; 1: in the order of the blocks, the same bits every time, with more work. */
LOGITLESS_API int32_t logitless_sparse_d_hidden(const void *gradient, const void *weight, int64_t rows,
                                                int64_t vocabulary, int64_t depth, int64_t weight_stride,
                                                const int32_t *starts, const int32_t *tokens, int64_t first_block,
                                                int64_t block_count, int32_t ordered, void *d_hidden,
                                                int64_t d_hidden_stride, int32_t device, void *stream);

#endif
